"""Journey-TRAK: which training examples steer the way to a sample, at chosen timesteps of it."""

import dataclasses
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.trak import TRAK
from jaxinf.compression.projection import Projection
from jaxinf.core.arrays import read_rows
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import ApplyFn, Batch, Params
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import network_output
from jaxinf.diffusion.process import Process
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


def journey_trak(
  model: DiffusionModel,
  *,
  queries: Examples,
  train: Examples,
  timesteps: Sequence[int],
  damping: float,
  projection: Projection | int,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  clip: bool = True,
  compute: Compute = Compute(),
) -> Scores:
  """Journey-TRAK: `trak` of the loss at chosen steps of the way to each query.

  What is measured at a timestep t of the way is the loss there, at that t, of the clean example x̂_0
  that the model predicted; several timesteps are averaged.

  Reference: Georgiev et al. 2023, "The journey, not the destination" (arXiv:2312.06205).

  Args:
    model: of a process with discrete timesteps.
    queries: trajectories [Q, T + 1, …], states from x_T to the sample, one a timestep of the
      schedule. (The sampler's have the steps first: np.moveaxis(trajectory, 0, 1).)
    train, damping, projection, draws, query_draws, compute: as for `trak`.
    timesteps: K of them in [0, T).
    clip: whether x̂_0 is clipped to [-1, 1], as sampling of pixels does; not where data are latents.
  """
  method = JourneyTRAK(model, projection, tuple(timesteps), (damping,), query_draws, clip)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class JourneyTRAK:
  """Journey-TRAK as a method: see `journey_trak` for the fields."""

  model: DiffusionModel
  projection: Projection | int
  timesteps: tuple[int, ...]
  dampings: tuple[float, ...] = (1e-9,)
  query_draws: Draws | None = None
  clip: bool = True

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping, for queries that are trajectories."""
    predicted = predicted_examples(
      self.model, queries, self.timesteps, clip=self.clip, compute=compute
    )
    of_loss = TRAK(
      self.model,
      self.projection,
      self.dampings,
      measurement=_loss_at(self.timesteps),
      query_draws=self.query_draws,
    )
    return of_loss.scores(queries=predicted, train=train, draws=draws, compute=compute)


def predicted_examples(
  model: DiffusionModel,
  trajectories: Examples,
  timesteps: Sequence[int],
  *,
  clip: bool = True,
  compute: Compute = Compute(),
) -> Examples:
  """The clean examples x̂_0 [Q, K, …] that the model predicts at timesteps of trajectories.

  Args:
    model: of a process with discrete timesteps.
    trajectories: [Q, T + 1, …], from x_T to the sample.
    timesteps: K of them in [0, T).
    clip: as of `journey_trak`.
    compute: batch_size, states at a time over all devices, and devices.
  """
  _loss_at(timesteps).check(model.process)
  num_steps, shape = model.process.num_steps or 0, trajectories.data.shape
  if shape[1] != num_steps + 1:
    raise ValueError(
      f"A trajectory has a state for each of the {num_steps} timesteps and its sample, "
      f"{num_steps + 1} in all; got {shape[1]}. Sample with ddpm, or ddim in {num_steps} steps."
    )
  # State i is the network's input at timestep T − 1 − i.
  chosen = num_steps - 1 - np.asarray(timesteps, int)
  num = np.arange(len(trajectories))
  states = np.stack([read_rows(trajectories.data, num[[q]])[0, chosen] for q in num])
  each = np.repeat(num, len(timesteps))
  rows = Rows(
    states.reshape(-1, *states.shape[2:]),
    np.tile(timesteps, len(states)).astype(np.uint32),
    conditioning=jax.tree.map(lambda x: read_rows(x, each), trajectories.conditioning),
  )
  predicted = map_batches(
    PredictionKernel(model.apply_fn, model.process, clip),
    model.params,
    rows,
    batch_size=compute.batch_size,
    label="predicted examples",
    unit="states",
    devices=compute.devices,
  )
  return dataclasses.replace(trajectories, data=predicted.reshape(states.shape))


def _loss_at(timesteps: Sequence[int]) -> Measurement:
  """The measurement of that name, made once, so that its kernels are compiled once."""
  return measurement_named(f"journey_loss({','.join(map(str, timesteps))})")


@dataclasses.dataclass(frozen=True)
class PredictionKernel:
  """(params, states whose ids are timesteps) → x̂_0 [B, …]."""

  apply_fn: ApplyFn
  process: Process
  clip: bool

  def __call__(self, params: Params, batch: Batch) -> jax.Array:
    t = batch.ids.astype(jnp.int32)
    inputs, time = self.process.inputs(batch.data, t)
    output = network_output(self.apply_fn, params, inputs, time, batch.conditioning)
    chex.assert_equal_shape([output, batch.data])
    predicted = self.process.clean(batch.data, t, output)
    return jnp.clip(predicted, -1, 1) if self.clip else predicted
