"""True measurements of samples by retrained models, several models and measurements at once.

All models see the same draws of (t, ε) for a sample, and measurements with the same draws share
one forward pass, so that differences between models are not those of their noise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import Replicate, row_operands
from jaxinf.core.arrays import as_float
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_queries
from jaxinf.core.types import ApplyFn, Batch, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import predict
from jaxinf.diffusion.process import Process
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.statistics import mean_and_error

_STREAM = "measure"


@dataclasses.dataclass(frozen=True)
class Measured:
  """Measurements of Q queries by V models.

  Attributes:
    values: [V, Q] means over draws.
    std_errors: [V, Q] float32 of them over draws; NaN for one replicate. Models share their draws,
      so that differences between models are less noisy than this says.
  """

  values: np.ndarray
  std_errors: np.ndarray


def measure(
  model: DiffusionModel,
  params: Sequence[Params],
  queries: Examples,
  measurements: Mapping[str, Measurement],
  *,
  draws: Draws,
  compute: Compute = Compute(),
  label: str | None = None,
) -> dict[str, Measured]:
  """Name → measurements of queries by V models; compiled once for as many models at a time.

  Args:
    model: whose network and process all models have. It is the attributed one, with which
      measurements compare that do.
    params: of each model.
    queries: samples, or trajectories where the measurements are of them.
    measurements: name → Measurement; of one kind ("examples" or "trajectories").
    draws: of (t, ε) for each query.
    compute: batch_size, (query, draw) pairs at a time over all devices, and devices.
    label: what the progress bar says; None for none.

  Raises:
    ValueError: measurements of two kinds, or of another process.
  """
  if len({measurement.of for measurement in measurements.values()}) != 1:
    raise ValueError("Measure examples and trajectories apart: they are different queries.")
  for measurement in measurements.values():
    measurement.check(model.process)
  check_queries(queries)
  draws.check_plain("A true measurement")
  draws = draws.split()
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
  compares = any(measurement.compares for measurement in measurements.values())
  reference = model.params if compares else None
  kernel = MeasureKernel(
    model.apply_fn, model.process, tuple(measurements.values()), Replicate.of(draws)
  )
  values = map_batches(
    kernel,
    row_operands((stacked, reference), draws, _STREAM),
    Rows.of(queries, draws.replicates),
    batch_size=compute.rows(draws),
    label=label,
    unit="(sample, replicate) rows",
    devices=compute.devices,
  )
  split = values.reshape(len(queries), -1, *values.shape[1:]).astype(np.float64)
  means, errors = (np.transpose(x, (1, 2, 0)) for x in mean_and_error(split, axis=1))
  return {
    name: Measured(means[i].astype(np.float32), errors[i].astype(np.float32))
    for i, name in enumerate(measurements)
  }


@dataclasses.dataclass(frozen=True)
class MeasureKernel:
  """Kernel from models [V, …] and (query, replicate) rows to values [B, measurements, V].

  Its parameters are (those of all models, those of the attributed one or None).

  Attributes:
    apply_fn, process: of every model.
    measurements: what is measured; those with one way to draw share a forward pass.
    replicate: of the draws, with what each does to its example.
  """

  apply_fn: ApplyFn
  process: Process
  measurements: tuple[Measurement, ...]
  replicate: Replicate

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    (params, reference), origin = operands
    keys = self.replicate.keys(origin, batch)
    by_draw: dict[object, list[Measurement]] = {}
    for measurement in self.measurements:
      by_draw.setdefault(measurement.draw, []).append(measurement)
    found: dict[int, jax.Array] = {}
    for alike in by_draw.values():
      pairs = alike[0].pairs(
        self.process,
        batch.data,
        keys,
        batch.conditioning,
        self.replicate.draws,
        self.replicate.augmentation,
      )
      pairs = alike[0].compared(pairs, self.apply_fn, reference)
      outputs = jax.vmap(lambda p: predict(self.apply_fn, p, pairs))(params)  # noqa: B023
      for measurement in alike:
        values = jax.vmap(lambda out: measurement.value(self.process, out, pairs))(outputs)  # noqa: B023
        means = values.reshape(len(values), -1, self.replicate.draws.num).mean(axis=2)
        if measurement.constant is not None:
          means = means + measurement.constant(self.process, as_float(batch.data))
        found[id(measurement)] = means.T
    return jnp.stack([found[id(measurement)] for measurement in self.measurements], axis=1)
