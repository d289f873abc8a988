"""True measurements of samples by retrained models, several models and measurements at once.

All models see the same draws of (t, ε) for a sample, and measurements with the same draws share
one forward pass, so that differences between models are not those of their noise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.types import ApplyFn, Array, Batch, Params
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.objective import float_images, predict
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine import Rows, map_batches
from jaxinf.layers.per_example import checked_draws, group_keys


@dataclasses.dataclass(frozen=True)
class Measured:
  """Measurements of Q queries by V models.

  Attributes:
    values: [V, Q] means over draws.
    std_errors: [V, Q] float32 of them over draws; NaN for one group of draws. Models share their
      draws, so that differences between models are less noisy than this says.
  """

  values: np.ndarray
  std_errors: np.ndarray


class Measuring:
  """Measures queries by models; compiled once for as many models at a time.

  Args:
    apply_fn, schedule: of every model.
    queries: [Q, H, W, C], or trajectories [Q, K, H, W, C] where the measurements are of them.
    query_numbers: [Q] uint32 example numbers, which the draws follow.
    measurements: name → Measurement; of one kind ("images" or "trajectories").
    draws: of (t, ε) for each query.
    draw_groups: groups these are split into, for standard errors.
    design: of a group's draws.
    seed: of the draws.
    batch_size: (query, draw) pairs at a time over all devices.
    devices: local devices; all of them where None.

  Raises:
    ValueError: draws do not split into groups, or measurements of two kinds.
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    schedule: Schedule,
    queries: Array,
    query_numbers: np.ndarray,
    measurements: Mapping[str, Measurement],
    *,
    draws: int,
    draw_groups: int = 1,
    design: DrawDesign = DrawDesign(),
    seed: int,
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,
  ):
    checked_draws(draws, draw_groups)
    if len({measurement.of for measurement in measurements.values()}) != 1:
      raise ValueError("Measure images and trajectories apart: they are different queries.")
    self._names, self._groups, self._size = tuple(measurements), draw_groups, draws // draw_groups
    self._rows = Rows(queries, query_numbers, draw_groups)
    self._batch_size, self._devices = max(1, batch_size // self._size), devices
    by_draw: dict[object, list[Measurement]] = {}
    for measurement in measurements.values():
      by_draw.setdefault(measurement.draw, []).append(measurement)
    order = [m for alike in by_draw.values() for m in alike]
    places = [next(i for i, m in enumerate(order) if m is own) for own in measurements.values()]
    size = self._size

    def kernel(params: Params, batch: Batch) -> jax.Array:
      """Values [B, measurements, V] of models [V, …]."""
      keys = fold_in_each(stream(seed, "measure"), design.numbers(batch.ids))
      keys = group_keys(keys, batch.draws, size)
      found = []
      for alike in by_draw.values():
        pairs = alike[0].pairs(schedule, batch.images, keys, batch.conditioning, design)
        outputs = jax.vmap(lambda p: predict(apply_fn, p, pairs))(params)  # noqa: B023
        for measurement in alike:
          values = jax.vmap(lambda out: measurement.value(schedule, out, pairs))(outputs)  # noqa: B023
          means = values.reshape(len(values), -1, size).mean(axis=2)
          if measurement.constant is not None:
            means = means + measurement.constant(schedule, float_images(batch.images))
          found.append(means.T)
      return jnp.stack([found[place] for place in places], axis=1)

    self._kernel = kernel

  def __call__(self, params: Sequence[Params], label: str | None = None) -> dict[str, Measured]:
    """Name → measurements by these models, in their order."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    values = map_batches(
      self._kernel, stacked, self._rows, batch_size=self._batch_size, label=label,
      unit="(sample, group) rows", devices=self._devices,
    )  # fmt: skip
    split = values.reshape(-1, self._groups, *values.shape[1:]).astype(np.float64)
    means = np.transpose(split.mean(axis=1), (1, 2, 0))
    errors = np.full_like(means, np.nan)
    if self._groups > 1:
      errors = np.transpose(split.std(axis=1, ddof=1), (1, 2, 0)) / np.sqrt(self._groups)
    return {
      name: Measured(means[i].astype(np.float32), errors[i].astype(np.float32))
      for i, name in enumerate(self._names)
    }
