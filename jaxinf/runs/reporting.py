"""The stage that draws the answer, apart from the others: it alone takes matplotlib to load."""

from jaxinf.core.examples import Examples
from jaxinf.curvature.saving import coverage_from
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.report.rows import label_name
from jaxinf.report.run_page import write_report
from jaxinf.runs.latents import preparations
from jaxinf.runs.run import Run, load_scores
from jaxinf.runs.sampling import load_samples
from jaxinf.runs.stage import MAIN_LINE, STAGES
from jaxinf.scores.stability import rank_stability


def report(run: Run) -> Outcome:
  """Draws the page report/index.html."""
  line = (*preparations(run), *MAIN_LINE[:-1])
  scores, models = load_scores(run), run.each_model()
  manifests = {name: artifacts.read_manifest(run.folder(name)) for name in line}
  for model in models[1:]:
    others = (name for name in line if STAGES[name].models == "each")
    manifests |= {
      f"{name}, model {model.model_number}": artifacts.read_manifest(model.folder(name))
      for name in others
    }
  if len(models) > 1:  # how the order of the means holds; each model's notes are of its own
    replicates = len(scores.replicate_values)
    notes = {"stability": rank_stability(scores).summary()} if replicates > 1 else {}
    manifests["attribute"] = {**manifests["attribute"], "notes": notes}
  samples = load_samples(run, "pictures")
  files = write_report(
    run.folder("report"),
    config=run.config,
    dataset=run.dataset,
    samples=samples.data,
    scores=scores,
    coverage=coverage_from(manifests["curvature"]["notes"]),
    manifests=manifests,
    labels=made_from(run, samples),
  )
  return {}, {"files": [path.name for path in files]}, " and ".join(path.name for path in files)


def made_from(run: Run, samples: Examples) -> list[str] | None:
  """What each sample was made from in words, its class and its caption, where there are such."""
  given, captions = samples.conditioning or {}, artifacts.read(run.folder("sample")).arrays
  parts = []
  if "labels" in given:
    parts.append([label_name(run.dataset, int(label)) for label in given["labels"]])
  if "captions" in captions:
    parts.append(captions["captions"].tolist())
  return [", ".join(words) for words in zip(*parts, strict=True)] if parts else None
