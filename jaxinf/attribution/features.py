"""Features of examples: gradients with respect to all parameters, averaged over draws, projected.

φ = P ∇m, with m the mean of a measurement over ALL draws of one replicate. The gradients come at
the speed of an ordinary batch. Each call of the projection makes P anew. Therefore rows wait on the
host until there is a block of them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import GradientKernel, flat, row_operands
from jaxinf.compression.projection import Projection
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.random import wrapped
from jaxinf.core.types import Array, Batch, Matrices, PyTree
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine import processes, rehearsal
from jaxinf.engine.checkpoints import PartialOutputs
from jaxinf.engine.compute import Compute
from jaxinf.engine.devices import local_devices, num_devices, replicate, shard
from jaxinf.engine.kernels import Kernel, compiled
from jaxinf.engine.maps import PartialRows, stream_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, layers_of

# Every layer, scales and shifts among them; which curvature a layer would have does not matter.
_EVERYTHING = Selection(skip=(), diagonal=(".",))


def all_layers(model: DiffusionModel, examples: Examples, axes: int = 0) -> Registration:
  """The layers of a model, with all its parameters; ValueError with the table where one has none.

  Args:
    model: the model.
    examples: of which the shapes of a row count.
    axes: of the data that the network does not see.
  """
  try:
    layers = layers_of(model, examples, _EVERYTHING, axes=axes)
  except ValueError as error:
    raise ValueError(
      f"{error}\nProjected gradients are those of all parameters: none of them can be skipped here."
    ) from error
  covered = sum(math.prod(layer.matrix_shape) for layer in layers.layers)
  if covered != (num := sum(leaf.size for leaf in jax.tree.leaves(model.params))):
    raise ValueError(
      f"The model has {num:,} parameters, but its layers {covered:,}: one would be left out or "
      "counted twice. Give each layer parameters of its own."
    )
  return layers


@dataclasses.dataclass(frozen=True)
class FlatGradients:
  """Kernel of gradients as long vectors [B, P], layer after layer."""

  gradients: GradientKernel

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    grads: Matrices = self.gradients(operands, batch)
    return jnp.concatenate([flat(matrices) for matrices in grads.values()], axis=1)


@dataclasses.dataclass(frozen=True)
class ProjectionKernel:
  """Kernel from key data and rows [B, P] to [B, k]: projections of other seeds share a program."""

  projection: Projection

  def __call__(self, key: Array, rows: jax.Array) -> jax.Array:
    chex.assert_rank(rows, 2)
    return self.projection(rows, wrapped(key))


def features_of(
  kernel: Kernel,
  model: DiffusionModel,
  examples: Examples,
  draws: Draws,
  stream: str,
  *,
  projection: Projection,
  compute: Compute,
  partial: PartialRows | None = None,
) -> np.ndarray:
  """[n, G, k] float32 features of examples, one of each of their G replicates of draws.

  Args:
    kernel: (operands of `row_operands`, rows) → long gradients [B, P], such as `FlatGradients`.
    model: at whose parameters gradients are taken.
    examples: n of them.
    draws: of each.
    stream: of the draws, QUERY or TRAIN.
    projection: P.
    compute: how.
    partial: where features are kept and, where it has some, gone on from.
  """
  rows = FeaturePass(projection, compute)(
    kernel,
    row_operands(model.params, draws, stream),
    Rows.of(examples, draws.replicates),
    batch_size=compute.rows(draws),
    label=f"{stream.replace('_gradients', '')} features",
    partial=partial,
  )
  return rows.reshape(len(examples), -1, projection.dim)


@dataclasses.dataclass(frozen=True)
class FeaturePass:
  """How rows of gradients become features.

  Attributes:
    projection: P.
    compute: devices, and how much waits on the host to be projected at once.
  """

  projection: Projection
  compute: Compute

  def __call__(
    self,
    kernel: Kernel,
    operands: PyTree,
    rows: Rows,
    *,
    batch_size: int,
    label: str,
    partial: PartialRows | None = None,
  ) -> np.ndarray:
    """[len(rows), k] float32 features; with several processes each makes its share of them.

    Args:
      kernel: (operands, batch) → long gradients [B, P].
      operands: of the kernel, such as parameters.
      rows: what to go through.
      batch_size: rows of gradients at a time over all local devices.
      label: what the progress bar says.
      partial: where features are kept and, where it has some, gone on from.

    Raises:
      ValueError: features are not finite.
    """
    begin, end = processes.share(len(rows))
    outputs = [] if partial is None else partial.load()
    saved = len(outputs)
    done = begin + sum(map(len, outputs))
    stream = stream_batches(
      kernel,
      operands,
      rows,
      batch_size=batch_size,
      label=label,
      unit="rows",
      devices=self.compute.devices,
      span=(done, end),
    )
    batches, total = 0, end - done
    in_full = rehearsal.in_full(len(rows.ids), total)
    for block, num_batches in self._blocks(stream, in_full) if total or not outputs else ():
      with rehearsal.part(-(-in_full // len(block[0])) / max(1, -(-total // len(block[0])))):
        outputs.append(self._projected(*block))
      batches += num_batches
      if partial is not None and batches >= partial.every:
        partial.save(outputs[saved:])
        saved, batches = len(outputs), 0
    if partial is not None and len(outputs) > saved:
      partial.save(outputs[saved:])
    features = processes.gathered(np.concatenate(outputs), len(rows))
    if not np.isfinite(features).all():
      raise ValueError(
        f"Some {label} are not finite: gradients overflow. Check that the model's outputs are "
        "finite for these examples at every time."
      )
    return features

  def _blocks(
    self, stream: Iterator[np.ndarray], total: int
  ) -> Iterator[tuple[tuple[np.ndarray, int], int]]:
    """Yields ((rows [R, P], how many of them are filled), batches they came from), R the same."""
    block, filled, batches = np.zeros(0, np.float32), 0, 0
    for grads in stream:
      batches += 1
      if not block.size:
        block = np.zeros((self._block_rows(grads.shape[1], total), grads.shape[1]), np.float32)
      while len(grads):
        taken = grads[: len(block) - filled]
        block[filled : filled + len(taken)] = taken
        filled, grads = filled + len(taken), grads[len(taken) :]
        if filled == len(block):
          yield (block, filled), batches
          filled, batches = 0, 0
    if filled or not total:
      yield (block, filled), batches

  def _block_rows(self, size: int, total: int) -> int:
    """Rows of a block: as many as fit, in blocks of about equal size, on each device alike."""
    num = num_devices(self.compute.devices)
    most = max(1, int(self.compute.block_mib * 2**20) // (4 * size))
    blocks = -(-total // most) or 1
    return max(1, -(-total // (blocks * num))) * num

  def _projected(self, block: np.ndarray, filled: int) -> np.ndarray:
    devices = local_devices(self.compute.devices)
    key = replicate(jax.random.key_data(self.projection.key), devices)
    kernel = ProjectionKernel(dataclasses.replace(self.projection, seed=0))
    projected = np.asarray(compiled(kernel, tuple(devices))(key, shard(block, devices)))
    return projected.reshape(-1, self.projection.dim)[:filled]


def projection_of(projection: Projection | int, draws: Draws) -> Projection:
  """The projection that is asked for; a number is its dimension, with the seed of the draws."""
  return projection if isinstance(projection, Projection) else Projection(projection, draws.seed)


def split_draws(draws: Draws, asked: Draws | None) -> tuple[Draws, Draws]:
  """Those of training examples and of queries, in 2 replicates each where none are asked for.

  Each replicate is projected by itself.
  """
  if draws.stop is not None:
    raise ValueError("Projected methods take a fixed number of draws: Draws(num).")
  return draws.split(2), draws.of_queries(asked)


def check_named(compute: Compute, *measurements: Measurement) -> None:
  """Raises ValueError where a checkpoint's key could not tell a measurement from others."""
  if compute.checkpoint is not None and any(m.name is None for m in measurements):
    raise ValueError("With a checkpoint, give the Measurement a name that tells it from others.")


def partial_of(
  compute: Compute, name: str, settings: Mapping[str, Any], model: DiffusionModel, **examples
) -> PartialOutputs | None:
  """Where the features called `name` are kept, of this model with these settings."""
  if compute.checkpoint is None:
    return None
  key = {**settings, **content_of(model, **examples)}
  return PartialOutputs(compute.checkpoint.path(name), key, compute.checkpoint.every)


def settings_of_projected(
  model: DiffusionModel, draws: Draws, asked: Draws, projection: Projection, train: Examples
) -> dict[str, Any]:
  """What projected scores are computed with, as JSON."""
  return {
    "process": model.process.settings,
    **draws.settings(asked),
    **train.augmentation.settings,
    "projection": projection.kind,
    "projection_dim": projection.dim,
    "projection_seed": projection.seed,
  }


def finite(scores: np.ndarray) -> np.ndarray:
  """Scores as float32; ValueError where they are not finite."""
  scores = scores.astype(np.float32)
  if not np.isfinite(scores).all():
    raise ValueError("Some scores are not finite: raise the damping.")
  return scores
