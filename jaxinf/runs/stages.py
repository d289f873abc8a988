"""What the stages of the main line compute: load → compute → an `Outcome`, one function a stage.

train → sample (in sampling.py) → curvature → attribute → report. `perform` keeps what they return
under workdir/<stage>/.
"""

import dataclasses
import functools
import logging
from typing import Any

import flax.traverse_util

from jaxinf import networks
from jaxinf.attribution.influence import influence_sweep
from jaxinf.compression.compression import compression_named
from jaxinf.core.damping import damping_named, number_of
from jaxinf.core.draws import Draws, Stopping
from jaxinf.core.examples import Examples
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.fit import fit_curvature
from jaxinf.curvature.saving import arrays_of, notes_of
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.networks import training
from jaxinf.runs.resuming import trained
from jaxinf.runs.run import (
  AT_DAMPING,
  Run,
  kind_of_config,
  load_curvature,
  load_model,
  scores_arrays,
)
from jaxinf.runs.sampling import load_samples
from jaxinf.scores.damping import weigh_dampings
from jaxinf.scores.stability import rank_stability
from jaxinf.scores.sweep import Sweep

_LOG = logging.getLogger("jaxinf")


def train(run: Run) -> Outcome:
  """Trains the model, from its last checkpoint on; the arrays are its EMA parameters."""
  state = training.init_state(run.model, run.train, run.config.train, run.seed)
  fit = functools.partial(_trained, run)
  found = trained(run.folder("train"), "train", state, fit)
  params = found.state.ema_params
  num = networks.num_params(params)
  notes = {
    "num_parameters": num,
    "last_metrics": found.last_metrics,
    "resumed_at_step": found.resumed_at,
  }
  arrays = flax.traverse_util.flatten_dict(params, sep="/")
  return arrays, notes, f"a model of {num:,} parameters"


def curvature(run: Run) -> Outcome:
  """Fits the curvature over all training images."""
  fitted = _fitted(run)
  return arrays_of(fitted), notes_of(fitted), f"the curvature of {len(fitted.layers)} layers"


def attribute(run: Run) -> Outcome:
  """Scores every training image for every sample."""
  first, *others = _scores(run)
  arrays = scores_arrays(first)
  notes: dict[str, Any] = {"settings": first.settings}
  if len(first.replicate_values) > 1:
    notes["stability"] = rank_stability(first).summary()
    _LOG.info("attribute: %s", notes["stability"])
  if others:
    notes |= _recommended(Sweep((first, *others)))
    _LOG.info("attribute: damping, without retraining\n%s", notes["sweep"])
    for scores in others:
      arrays |= scores_arrays(scores, prefix=f"{AT_DAMPING}{scores.settings['damping']:e}/")
  shape = " × ".join(map(str, first.values.shape))
  return arrays, notes, f"scores of {shape} (sample, training image) pairs"


def _recommended(sweep: Sweep) -> dict[str, Any]:
  """The table of dampings, and the one to take where their scores repeat."""
  found = weigh_dampings(sweep)
  notes: dict[str, Any] = {"sweep": found.table()}
  if found.candidates.any():
    notes["recommended_damping"] = number_of(found.recommended)
  return notes


def _trained(run: Run, state: training.TrainState, hooks: training.Hooks) -> training.TrainState:
  return training.fit(
    run.model,
    run.process,
    run.train,
    run.config.train,
    seed=run.seed,
    state=state,
    hooks=hooks,
    devices=run.devices,
  )


def _fitted(run: Run) -> Curvature:
  config = run.config.curvature
  kept = Checkpointing(run.folder("curvature") / "sums", config.checkpoint_every)
  return fit_curvature(
    load_model(run),
    run.train,
    kind_of_config(config),
    draws=Draws(config.draws, seed=run.seed),
    skip=config.skip,
    diagonal=config.diagonal,
    only=config.only,
    partitions=config.partitions,
    decompose=config.decompose,
    compute=run.compute(config.batch_size, checkpoint=kept),
  )


def _scores(run: Run) -> Sweep:
  """Scores at the damping, then at those of the sweep."""
  config, model = run.config.attribute, load_model(run)
  kept = Checkpointing(run.folder("attribute") / "sums", config.checkpoint_every)
  compute = run.compute(config.batch_size, checkpoint=kept, query_chunk=config.query_chunk)
  draws, query_draws = draws_of(run)
  compression: Any = config.compression
  if config.compression_size is not None:
    compression = compression_named(config.compression, config.compression_size)
  return influence_sweep(
    load_curvature(run, model),
    queries=_queries(run),
    train=run.train,
    dampings=[damping_named(config.damping_kind, x) for x in (config.damping, *config.sweep)],
    draws=draws,
    query_draws=query_draws,
    measurement=config.measurement,
    compression=compression,
    precision=config.precision,
    compute=compute,
  )


def _queries(run: Run) -> Examples:
  """What the measurement is of; ValueError where the samples have no such thing."""
  measurement = run.config.attribute.measurement
  try:
    return load_samples(run, measurement_named(measurement).of)
  except ValueError as error:
    raise ValueError(f"attribute.measurement={measurement!r}: {error}") from error


def draws_of(run: Run) -> tuple[Draws, Draws]:
  """Draws of each training image: so many, or until the order is stable; and of each query."""
  config = run.config.attribute
  draws = run.draws(config.draws, config.replicates, config.design, config.loss_power)
  if config.auto_draws:
    stop, num = config.stop, config.stop.size * config.replicates
    most = Stopping(stop.top_k, stop.agreement, config.draws)
    draws = dataclasses.replace(draws, num=num, stop=most)
  asked = config.query_draws
  if asked is None:
    asked = 256 if config.auto_draws else config.draws
  return draws, run.draws(asked, config.query_replicates, config.design)
