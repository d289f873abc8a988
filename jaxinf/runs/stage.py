"""What there is to know of every stage, in one table: all else of a stage derives from its row.

Commands and `--help` follow from it, what a result depends on (`run.key_of`), which settings may
change freely, and what is to be done next. Functions are named by text, so that the table imports
nothing: what a stage takes to compute is loaded when it is asked for.
"""

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

LINE = "Stages, in order"
STORE = (
  "On a store of training gradients, which answers new queries without a pass over the training "
  "images"
)
PROOF = "The proof by retraining, after train and sample"
BESIDE = "Beside them, without computing anything"

EVERY_SECTION = ("*",)  # of what a stage reads
_MODEL = ("model", "diffusion")
_PROOF_READS = ("score", "measure", "retrain", "train", "curvature", *_MODEL)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage: a command of jaxinf.

  Attributes:
    name: of the command, and of the folder of its result.
    help: what it does, in a line of --help.
    does: "module:function" that does it to a run, and returns an `Outcome` where it is `kept`.
      Where empty, the stage is but its `steps`.
    group: heading of --help that it stands under.
    section: of the config, which is the stage's own; None where it has none.
    pace: fields of that section that change how fast the stage goes but not what it finds.
    extent: fields of it that say which results there are, each of which has a key of its own.
    reads: other sections that the result depends on, or single fields, as "curvature.skip".
    also: further sections that it reads, which its result has by other ways or depends on in part;
      EVERY_SECTION for all.
    needs: stages whose results it depends on.
    data: what of the training images it depends on: "images", "labelled" for their labels and names
      too, or None.
    kept: whether its result is an artefact in the run's folder of that name, under `run.key_of`.
      The others keep what they make themselves, or nothing.
    alone: the first process computes, and the others wait.
    models: of the run's models trained with other seeds, which its result is of: the "first", on
      its own; "each", so that every model has a result; or "all" of them together.
    anew: the result of other settings is replaced, because it is made in seconds.
    steps: stages that it is made of, in order.
    takes: the word that follows the name on the command line, where there is one.
    of_run: whether `does` takes the run. Otherwise it takes the word, and its flags by their names,
      and returns the text that is printed; `flags` are then all that it reads.
    flags: of the command line, that it reads beside --config and --workdir.
    dry_run: "module:function" from the run to what --dry-run prints, where it can.
    shows: "module:function" from the result of a stage that is kept to a text, which is printed
      whether the result was there or not.
    of_truth: "module:function" from --truth and --scores to what is printed, where it can do
      without a run.
    then: what to do next, where that is no stage of the same line; {folder} is the result's.
    key: "module:function" from the run to a dict of what else the result depends on.
  """

  name: str
  help: str
  does: str = ""
  group: str = LINE
  section: str | None = None
  pace: tuple[str, ...] = ()
  extent: tuple[str, ...] = ()
  reads: tuple[str, ...] = ()
  also: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  data: str | None = "images"
  kept: bool = False
  alone: bool = False
  models: str = "first"
  anew: bool = False
  steps: tuple[str, ...] = ()
  takes: str = ""
  of_run: bool = True
  flags: tuple[str, ...] = ()
  dry_run: str = ""
  shows: str = ""
  of_truth: str = ""
  then: str = ""
  key: str = ""

  @property
  def function(self) -> Callable[..., Any]:
    """What `does` names."""
    return pkgutil.resolve_name(self.does)


_OPEN = "open {folder}/index.html"

STAGES: dict[str, Stage] = {stage.name: stage for stage in (
  Stage("plan",
        "tell what each of them will take here in time, memory and disk; plan benchmark: each of "
        "the proof's (not part of all)",
        does="jaxinf.planning:show", also=EVERY_SECTION, takes="[LINE]", flags=("json",)),
  Stage("train-vae", "train a small autoencoder, where config.latent.autoencoder is trained",
        does="jaxinf.runs.latents:train_autoencoder", kept=True,
        section="vae", pace=("log_every", "checkpoint_every"), then="next: encode"),
  Stage("encode", "put all images through the autoencoder, where config.latent.autoencoder is set",
        does="jaxinf.runs.latents:encode", kept=True,
        section="latent", pace=("batch_size", "autoencoder", "sample"),
        key="jaxinf.runs.latents:autoencoder_key", then="next: train"),
  Stage("train", "train the model; checkpoints, metrics.jsonl and TensorBoard events on the way",
        does="jaxinf.runs.stages:train", kept=True, models="each",
        section="train", pace=("log_every", "checkpoint_every"), extent=("num_models",),
        reads=("model", "diffusion")),
  Stage("sample", "generate the samples to be explained",
        does="jaxinf.runs.sampling:sample", kept=True, data=None,
        section="sample", pace=("batch_size", "conditioning"), reads=("diffusion",),
        also=("data", "latent"),
        needs=("train",), key="jaxinf.runs.sampling:sampling_key"),
  Stage("curvature", "fit the K-FAC curvature over all training images",
        does="jaxinf.runs.stages:curvature", kept=True, models="each",
        section="curvature", pace=("batch_size", "partitions", "checkpoint_every"),
        reads=("diffusion",), needs=("train",), dry_run="jaxinf.runs.studies:curvature_memory"),
  Stage("curvature-study",
        "compare approximations of the curvature with the exact one (not part of all)",
        does="jaxinf.runs.studies:curvature_study", kept=True,
        section="curvature_study", pace=("batch_size",), reads=("diffusion", "curvature.skip"),
        needs=("train", "sample"), then=_OPEN),
  Stage("compress-study", "compare compressions of the query gradients (not part of all)",
        does="jaxinf.runs.studies:compress_study", kept=True,
        section="compress_study", pace=("batch_size",), needs=("train", "sample", "curvature"),
        then=_OPEN),
  Stage("attribute", "score every training image for every sample",
        does="jaxinf.runs.stages:attribute", kept=True, models="each",
        section="attribute", pace=("batch_size", "query_chunk", "checkpoint_every"),
        needs=("train", "sample", "curvature")),
  Stage("self-influence",
        "tell which training images are learned from themselves alone: rare, damaged, mislabelled "
        "or memorised ones (not part of all)",
        does="jaxinf.runs.self_influence:self_influences", kept=True,
        shows="jaxinf.runs.self_influence:largest",
        section="self_influence", pace=("batch_size", "checkpoint_every"),
        needs=("train", "curvature")),
  Stage("report", "draw DIR/report/index.html",
        does="jaxinf.runs.reporting:report", kept=True, alone=True, data="labelled",
        models="all", anew=True,
        section="report", needs=("attribute",), then=_OPEN),
  Stage("explore",
        "open the run in a browser: who supports each sample, what if images were removed, scores "
        "of images that you upload (not part of all; needs jaxinf[explore])",
        does="jaxinf.explorer.serve:explore", data=None, also=("data", "query"),
        flags=("host", "port")),
  Stage("all", "all of these that the config needs; finished stages are reused",
        steps=("train", "sample", "curvature", "attribute", "report")),

  Stage("index", "compute the gradients of all training images, and keep them in DIR/index/store",
        does="jaxinf.runs.serving:index", group=STORE, kept=True, models="each",
        section="index", pace=("batch_size", "reserve_mib"), needs=("train", "curvature"),
        then="next: query, with --images"),
  Stage("query", "score --images=new.npz (or a folder), at any config.query.damping",
        does="jaxinf.runs.serving:query", group=STORE,
        section="query", pace=("batch_size",), also=_MODEL, flags=("images", "json")),
  Stage("index-append", "add --images as training images",
        does="jaxinf.runs.serving:append", group=STORE, also=("index", *_MODEL),
        flags=("images",)),
  Stage("index-delete", "delete training images by --ids=ID,ID",
        does="jaxinf.runs.serving:delete", group=STORE, also=_MODEL, flags=("ids",)),
  Stage("index-verify", "read everything and compare the checksums",
        does="jaxinf.runs.serving:verify", group=STORE, also=_MODEL),

  Stage("retrain", "train models on random subsets of the training images, here part --shard=i/n",
        does="jaxinf.benchmark:retrain", group=PROOF,
        section="retrain", pace=("models_at_once",), extent=("num_subsets", "num_seeds"),
        also=("train", *_MODEL), flags=("shard",)),
  Stage("measure", "take the true measurements of the samples by each of these models",
        does="jaxinf.benchmark:measure", group=PROOF,
        section="measure", pace=("batch_size",), extent=("measurements",),
        also=("retrain", *_MODEL)),
  Stage("evaluate",
        "score by every method, and tell how well each predicts the measurements; or judge "
        "--scores=mine.npz by --truth=NAME, without config and workdir (without --scores: ours; "
        "--truth=all)",
        does="jaxinf.benchmark:evaluate", group=PROOF, section="evaluate", also=_PROOF_READS,
        flags=("json", "truth", "scores"), of_truth="jaxinf.benchmark:judged"),
  Stage("benchmark", "all of these, train and sample among them",
        does="jaxinf.benchmark:benchmark", group=PROOF,
        steps=("train", "sample", "retrain", "measure", "evaluate")),
  Stage("truth",
        "keep in DIR/truth what retraining said and our methods predicted, as a truth that "
        "evaluate --truth=DIR/truth judges anyone's scores by",
        does="jaxinf.benchmark:truth", group=PROOF),
  Stage("counterfactual", "retrain without the images that each method calls most supporting",
        does="jaxinf.benchmark:counterfactual", group=PROOF, section="counterfactual",
        also=_PROOF_READS, flags=("shard", "json")),
  Stage("study",
        "draw one of the paper's figures into DIR/study/NAME/; study all puts those that are there "
        "on one page, and any other NAME lists the names",
        does="jaxinf.benchmark.figures:study", group=PROOF, section="study", also=_PROOF_READS,
        takes="NAME"),

  Stage("new", "write a commented config for one's own data: --data=folder --path=FOLDER",
        does="jaxinf.runs.new_config:new", group=BESIDE, of_run=False, data=None, takes="FILE.py",
        flags=("data", "path")),
  Stage("status",
        "tell what is in DIR: what is finished, stale and why, unfinished or running, and the disk "
        "that it takes; with --config also what the config would change",
        does="jaxinf.runs.status:status", group=BESIDE, of_run=False, data=None,
        flags=("workdir", "config", "json")),
  Stage("clean",
        "remove from DIR unfinished work and what no stage needs any more, and with --stale stale "
        "results too; --dry-run lists it",
        does="jaxinf.runs.cleaning:clean", group=BESIDE, of_run=False, data=None,
        flags=("workdir", "config", "stale", "dry-run")),
  Stage("completion", "print what makes bash, zsh or fish complete jaxinf's words",
        does="jaxinf.runs.completion:completion", group=BESIDE, of_run=False, data=None,
        takes="SHELL"),
)}  # fmt: skip

MAIN_LINE = STAGES["all"].steps


def hint(name: str) -> str:
  """What to do after a stage: the next of the first line that goes on from it, or `then`."""
  for line in STAGES.values():
    if name in line.steps[:-1]:
      return f"next: {line.steps[line.steps.index(name) + 1]}"
  return STAGES[name].then
