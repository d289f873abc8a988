"""What the stages of the main line compute: load → compute → an `Outcome`, one function a stage.

train → sample (in sampling.py) → curvature → attribute → report. `perform` keeps what they return
under workdir/<stage>/.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from jaxinf import networks
from jaxinf.attribution.auto import AutoDraws
from jaxinf.attribution.influence import influence
from jaxinf.compression.compression import compression_named
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.fit import fit_curvature
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Resume
from jaxinf.networks import training
from jaxinf.report.page import write_report
from jaxinf.runs.run import (
  Run,
  draw_design,
  load_coverage,
  load_curvature,
  load_scores,
  load_task,
  scores_arrays,
)
from jaxinf.runs.sampling import load_samples
from jaxinf.runs.stage import MAIN_LINE
from jaxinf.scores.damping import recommend_damping
from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import rank_stability

_LOG = logging.getLogger("jaxinf")


def train(run: Run) -> Outcome:
  """Trains the model, from its last checkpoint on; the arrays are its EMA parameters."""
  config, folder = run.config.train, run.folder("train")
  state = training.init_state(run.model, run.dataset.image_shape, config, run.config.seed)
  checkpoints = artifacts.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
    _LOG.info("train: resuming from the checkpoint at step %d", step)
  log = artifacts.MetricsLog(folder, step or 0)
  try:
    hooks = training.Hooks(save=checkpoints.save, log=log.write)
    state = _trained(run, state, hooks)
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


def curvature(run: Run) -> Outcome:
  """Fits the curvature over all training images."""
  fitted = _fitted(run)
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


def attribute(run: Run) -> Outcome:
  """Scores every training image for every sample."""
  first, *others = _scores(run)
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


def report(run: Run) -> Outcome:
  """Draws the page report/index.html."""
  manifests = {name: artifacts.read_manifest(run.folder(name)) for name in MAIN_LINE[:-1]}
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


def _trained(run: Run, state: training.TrainState, hooks: training.Hooks) -> training.TrainState:
  return training.fit(
    run.model,
    run.schedule,
    run.dataset,
    run.config.train,
    seed=run.config.seed,
    state=state,
    hooks=hooks,
    devices=run.devices,
  )


def _fitted(run: Run) -> Curvature:
  config = run.config.curvature
  return fit_curvature(
    load_task(run),
    run.dataset.images,
    ids=run.dataset.ids,
    draws=config.draws,
    seed=run.config.seed,
    method=config.method,
    sharing=config.sharing,
    estimator=config.estimator,
    targets=config.targets,
    skip=config.skip,
    diagonal=config.diagonal,
    only=config.only,
    partitions=config.partitions,
    decompose=config.decompose,
    batch_size=config.batch_size,
    devices=run.devices,
    solver=config.solver,
    random_flip=run.dataset.random_flip,
    resume=Resume(run.folder("curvature") / "sums", config.checkpoint_every),
  )


def _scores(run: Run) -> Sequence[Scores]:
  """Scores at the damping, then at those of the sweep."""
  config, task = run.config.attribute, load_task(run)
  queries, query_ids = _queries(run)
  return influence(
    task,
    load_curvature(run, task),
    queries,
    run.dataset.images,
    damping=(config.damping, *config.sweep),
    draws=_draws(run),
    seed=run.config.seed,
    measurement=config.measurement,
    query_ids=query_ids,
    train_ids=run.dataset.ids,
    draw_groups=config.draw_groups,
    query_draws=config.query_draws,
    query_groups=config.query_groups,
    design=draw_design(config.design, run.dataset.random_flip),
    compression=compression_named(config.compression, config.compression_size),
    query_blocks=config.query_blocks,
    precision=config.precision,
    batch_size=config.batch_size,
    devices=run.devices,
    resume=Resume(run.folder("attribute") / "sums", config.checkpoint_every),
  )


def _queries(run: Run) -> tuple[np.ndarray, np.ndarray]:
  """What the measurement is of, and the samples' ids; ValueError where they have no such thing."""
  measurement = run.config.attribute.measurement
  of = measurement_named(measurement).of
  samples = load_samples(run, trajectories=of == "trajectories")
  if of not in samples:
    raise ValueError(
      f"attribute.measurement={measurement!r} is of {of}, and the samples have none: sample "
      "with sample.keep_trajectory=True in a new workdir, or choose another measurement."
    )
  return samples[of], samples["ids"]


def _draws(run: Run) -> int | AutoDraws:
  """Draws of each training image: so many, or until the order is stable."""
  config, stop = run.config.attribute, run.config.attribute.stop
  if not config.auto_draws:
    return config.draws
  return AutoDraws(
    stop.top_k, stop.agreement, config.draw_groups, stop.group_size, max_draws=config.draws
  )
