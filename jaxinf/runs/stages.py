"""The stages of a run: load → compute → save, one function a stage.

train → sample → curvature → attribute → report. Each leaves an artefact under workdir/<stage>/; a
finished one is reused where config and inputs match, and refused with the difference where not.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from jaxinf import networks
from jaxinf.attribution.auto import AutoDraws
from jaxinf.attribution.influence import influence
from jaxinf.compression.compression import compression_named
from jaxinf.core.random import fold_in_each, stream
from jaxinf.curvature.fit import fit_curvature
from jaxinf.curvature.ggn import Solver
from jaxinf.diffusion import sampler
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine import Rows, artifacts, map_batches, processes
from jaxinf.engine.artifacts import Artifact
from jaxinf.engine.checkpoints import PartialOutputs, Resume
from jaxinf.engine.progress import clock
from jaxinf.engine.resources import measured
from jaxinf.networks import training
from jaxinf.report.run_page import write_report
from jaxinf.runs import serving, studies
from jaxinf.runs.config import as_dict
from jaxinf.runs.run import (
  ORDER,
  Outcome,
  Run,
  draw_design,
  key_of,
  load_coverage,
  load_curvature,
  load_samples,
  load_scores,
  load_task,
  scores_arrays,
)
from jaxinf.scores.damping import recommend_damping
from jaxinf.scores.stability import rank_stability

_LOG = logging.getLogger("jaxinf")

_AFTER = {"index": "next: query, with --images"}


def train(run: Run) -> Artifact:
  """Trains the model; the artefact holds its EMA parameters."""
  _ = run.model  # fields that do not fit are refused before anything begins
  return finish_stage(run, "train", _train)


def sample(run: Run) -> Artifact:
  """Generates the samples that will be explained.

  Trajectories lie apart, as they are large, and are generated anew where a copy left them out.
  """
  artifact = finish_stage(run, "sample", _sample)
  there = (run.folder("sample") / "trajectories" / "arrays.npz").exists()
  if run.config.sample.keep_trajectory and not processes.agreed(there):
    ids, arrays = _generated(run)
    if np.abs(arrays["images"] - artifact.arrays["images"]).max() > 0.01:
      raise ValueError(
        f"The samples of {run.folder('sample')} cannot be generated again here, and their "
        "trajectories are not there: delete them, and what was made of them, to begin anew."
      )
    _keep_trajectories(run, ids, arrays["trajectories"])
    shutil.rmtree(run.folder("sample") / "sums", ignore_errors=True)
  return artifact


def curvature(run: Run) -> Artifact:
  """Fits the curvature over all training images."""
  return finish_stage(run, "curvature", _curvature)


def curvature_study(run: Run) -> Artifact:
  """Compares approximations of the curvature with the exact one, on a few images and samples."""
  return finish_stage(run, "curvature-study", studies.curvature_study)


def compress_study(run: Run) -> Artifact:
  """Compares compressions of the query gradients, on a few images and samples."""
  return finish_stage(run, "compress-study", studies.compress_study)


def attribute(run: Run) -> Artifact:
  """Scores every training image for every sample."""
  return finish_stage(run, "attribute", _attribute)


def index(run: Run) -> Artifact:
  """Keeps the gradients of all training images, to answer new queries."""
  return finish_stage(run, "index", serving.index)


def report(run: Run) -> Artifact:
  """Draws the page report/index.html."""
  return finish_stage(run, "report", _report, alone=True)


def everything(run: Run) -> Artifact:
  """All stages in order; returns the last one's artefact."""
  return [stage(run) for stage in (train, sample, curvature, attribute, report)][-1]


def _train(run: Run) -> Outcome:
  config, folder = run.config.train, run.folder("train")
  state = training.init_state(run.model, run.dataset.image_shape, config, run.config.seed)
  checkpoints = artifacts.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
    _LOG.info("train: resuming from the checkpoint at step %d", step)
  log = artifacts.MetricsLog(folder, step or 0)
  try:
    state = training.fit(
      run.model, run.schedule, run.dataset, config, seed=run.config.seed, state=state,
      hooks=training.Hooks(save=checkpoints.save, log=log.write), devices=run.devices,
    )  # fmt: skip
  except training.NonFiniteLoss as error:
    good = checkpoints.latest()
    where = f"is that of step {good} in {folder / 'checkpoints'}" if good else "was yet to come"
    raise ValueError(f"{error} The last good checkpoint {where}.") from error
  finally:
    checkpoints.close()
    log.close()
  arrays = flax.traverse_util.flatten_dict(state.ema_params, sep="/")
  num = networks.num_params(state.ema_params)
  notes = {"num_parameters": num, "last_metrics": log.last(), "resumed_at_step": step}
  return arrays, notes, f"a model of {num:,} parameters"


def _sample(run: Run) -> Outcome:
  ids, arrays = _generated(run)
  if "trajectories" in arrays:
    _keep_trajectories(run, ids, arrays["trajectories"])
  return {"ids": ids, "images": arrays["images"]}, {}, f"{len(ids)} samples"


def _generated(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Ids [Q], and images [Q, H, W, C] and, if asked for, trajectories [Q, steps + 1, H, W, C]."""
  config, task = run.config.sample, load_task(run)
  if config.num_samples < 1:
    raise ValueError(f"sample.num_samples must be at least 1; got {config.num_samples}.")
  ids = np.array([f"sample_{i:04d}" for i in range(config.num_samples)])

  def kernel(params, batch):
    keys = fold_in_each(stream(run.config.seed, "sample"), batch.ids)
    images, trajectory = sampler.sample(
      task.apply_fn, params, task.schedule, keys, run.dataset.image_shape, sampler=config.sampler,
      num_steps=config.num_steps, keep_trajectory=config.keep_trajectory,
    )  # fmt: skip
    if trajectory is None:
      return {"images": images}
    return {"images": images, "trajectories": jnp.moveaxis(trajectory, 0, 1)}

  names = ["images"] + ["trajectories"] * config.keep_trajectory
  arrays = map_batches(
    kernel, task.params, Rows(None, np.arange(len(ids), dtype=np.uint32)),
    batch_size=config.batch_size, label="sample", unit="samples", devices=run.devices,
    partial=PartialOutputs(
      run.folder("sample") / "sums", key_of(run, "sample"), 1, dict.fromkeys(names, 0)
    ),
  )  # fmt: skip
  return ids, arrays


def _keep_trajectories(run: Run, ids: np.ndarray, trajectories: np.ndarray) -> None:
  place, arrays = run.folder("sample") / "trajectories", {"ids": ids, "trajectories": trajectories}
  if processes.is_primary():
    artifacts.write(place, key_of(run, "sample"), arrays, notes={}, cost={})
  processes.wait_for_all("trajectories written")


def _curvature(run: Run) -> Outcome:
  config = run.config.curvature
  fitted = fit_curvature(
    load_task(run), run.dataset.images, ids=run.dataset.ids, draws=config.draws,
    seed=run.config.seed, method=config.method, sharing=config.sharing,
    estimator=config.estimator, targets=config.targets, skip=config.skip,
    diagonal=config.diagonal, only=config.only, partitions=config.partitions,
    decompose=config.decompose, batch_size=config.batch_size, devices=run.devices,
    solver=Solver(**as_dict(config.solver)), random_flip=run.dataset.random_flip,
    resume=Resume(run.folder("curvature") / "sums", config.checkpoint_every),
  )  # fmt: skip
  arrays = {
    f"{name}/{field.name}": np.asarray(getattr(basis, field.name))
    for name, basis in fitted.bases.items()
    for field in dataclasses.fields(basis)
    if getattr(basis, field.name) is not None
  }
  notes = {
    "layers": [dataclasses.asdict(layer) for layer in fitted.layers],
    "coverage": [dataclasses.asdict(row) for row in fitted.coverage.rows],
    "settings": fitted.settings,
    "diagnostics": fitted.diagnostics,
  }
  return arrays, notes, f"the curvature of {len(fitted.layers)} layers"


def _attribute(run: Run) -> Outcome:
  config, task = run.config.attribute, load_task(run)
  of = measurement_named(config.measurement).of
  samples = load_samples(run, trajectories=of == "trajectories")
  if of not in samples:
    raise ValueError(
      f"attribute.measurement={config.measurement!r} is of {of}, and the samples have none: sample "
      "with sample.keep_trajectory=True in a new workdir, or choose another measurement."
    )
  draws: int | AutoDraws = config.draws
  if config.auto_draws:
    stop = config.stop
    draws = AutoDraws(
      stop.top_k, stop.agreement, config.draw_groups, stop.group_size, max_draws=config.draws
    )
  first, *others = influence(
    task, load_curvature(run, task), samples[of], run.dataset.images,
    damping=(config.damping, *config.sweep), draws=draws, seed=run.config.seed,
    measurement=config.measurement, query_ids=samples["ids"], train_ids=run.dataset.ids,
    draw_groups=config.draw_groups, query_draws=config.query_draws,
    query_groups=config.query_groups,
    design=draw_design(config.design, run.dataset.random_flip),
    compression=compression_named(config.compression, config.compression_size),
    query_blocks=config.query_blocks, precision=config.precision, batch_size=config.batch_size,
    devices=run.devices, resume=Resume(run.folder("attribute") / "sums", config.checkpoint_every),
  )  # fmt: skip
  arrays = scores_arrays(first)
  notes: dict[str, Any] = {"settings": first.settings}
  if len(first.group_values) > 1:
    notes["stability"] = rank_stability(first).summary()
    _LOG.info("attribute: %s", notes["stability"])
  if others:
    sweep = recommend_damping([first, *others])
    notes |= {"sweep": sweep.table(), "recommended_damping": sweep.recommended}
    _LOG.info("attribute: damping, without retraining\n%s", notes["sweep"])
    for scores in others:
      arrays |= scores_arrays(scores, prefix=f"damping-{scores.settings['damping']:e}/")
  shape = " × ".join(map(str, first.values.shape))
  return arrays, notes, f"scores of {shape} (sample, training image) pairs"


def _report(run: Run) -> Outcome:
  manifests = {name: artifacts.read_manifest(run.folder(name)) for name in ORDER[:-1]}
  files = write_report(
    run.folder("report"),
    config=run.config,
    dataset=run.dataset,
    samples=artifacts.read(run.folder("sample")).arrays["images"],
    scores=load_scores(run),
    coverage=load_coverage(manifests["curvature"]),
    manifests=manifests,
  )
  return {}, {"files": [path.name for path in files]}, " and ".join(path.name for path in files)


def finish_stage(
  run: Run, name: str, compute: Callable[[Run], Outcome], alone: bool = False
) -> Artifact:
  """Reuses a matching artefact; otherwise computes and saves it, and says what comes next.

  All processes compute, or the primary `alone`; it writes, and they go on when all is written.
  """
  if run.devices is not None and processes.count() > 1:
    raise ValueError("Several processes use all their devices: leave the run's devices None.")
  folder, key = run.folder(name), key_of(run, name)
  processes.check_same(json.dumps(artifacts.plain(key)), f"what the stage {name} depends on")
  rest = ORDER[ORDER.index(name) + 1 :] if name in ORDER else ()
  hint = f"next: {rest[0]}" if rest else _AFTER.get(name, f"open {folder.absolute()}/index.html")
  if processes.agreed(artifacts.finished(folder, key)):
    _LOG.info("%s: reused %s; %s", name, folder, hint)
    return artifacts.read(folder)
  if processes.is_primary():
    artifacts.begin(folder, key)
  _LOG.info("%s: begins (its functions are compiled first)", name)
  with measured() as cost:
    arrays, notes, what = compute(run) if processes.is_primary() or not alone else ({}, {}, "")
  artifact = None
  if processes.is_primary():
    artifact = artifacts.write(folder, key, arrays, notes=notes, cost=cost)
    shutil.rmtree(folder / "sums", ignore_errors=True)
    _LOG.info("%s: wrote %s to %s in %s; %s", name, what, folder, clock(cost["seconds"]), hint)
  processes.wait_for_all(f"{name} written")
  return artifact or artifacts.read(folder)
