"""Features of examples: gradients with respect to all parameters, averaged over draws, projected.

φ = P ∇m, with m the mean of a measurement over ALL draws of one group. The gradients come at the
speed of an ordinary batch. Each call of the projection makes P anew, so that rows wait on the host
until there is a block of them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.attribution.examples import Examples, content_of
from jaxinf.attribution.kernels import DrawGroups, flat, gradient_operands
from jaxinf.compression.projection import Projection
from jaxinf.core.types import Array, Batch, Matrices, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import PartialOutputs, Resume
from jaxinf.engine.devices import mapped
from jaxinf.layers.coverage import Selection
from jaxinf.layers.per_example import checked_draws, default_groups
from jaxinf.layers.register import Registration, register

# Every layer, scales and shifts among them; which curvature a layer would have does not matter.
_EVERYTHING = Selection(skip=(), diagonal=(".",))


def register_everything(
  task: Task, image_shape: tuple[int, ...], conditioning: PyTree = None
) -> Registration:
  """The layers of a model, with all its parameters; ValueError with the table where one has none.

  Args:
    task: the model.
    image_shape: (H, W, C).
    conditioning: pytree of arrays [N, …] of which the shapes matter; or None.
  """
  task.check_images(image_shape, conditioning)
  try:
    model = register(
      task.apply_fn, task.params, image_shape, _EVERYTHING, conditioning=conditioning
    )
  except ValueError as error:
    raise ValueError(
      f"Projected gradients are those of all parameters, but not all are in layers: {error}"
    ) from error
  covered = sum(math.prod(layer.matrix_shape) for layer in model.layers)
  if covered != (num := sum(leaf.size for leaf in jax.tree.leaves(task.params))):
    raise ValueError(
      f"The model has {num:,} parameters, but its layers {covered:,}: one would be left out or "
      "counted twice. Give each layer parameters of its own."
    )
  return model


def flat_kernel(kernel: engine.Kernel) -> engine.Kernel:
  """The kernel of gradients as long vectors [B, P], layer after layer."""

  def joined(operands: PyTree, batch: Batch) -> jax.Array:
    grads: Matrices = kernel(operands, batch)
    return jnp.concatenate([flat(matrices) for matrices in grads.values()], axis=1)

  return joined


def features_of(
  kernel: engine.Kernel,
  params: Params,
  examples: Examples,
  groups: DrawGroups,
  *,
  num_groups: int,
  stream_name: str,
  projection: Projection,
  batch_size: int,
  block_mib: float = 1024,
  devices: Sequence[jax.Device] | None = None,
  partial: engine.PartialRows | None = None,
) -> np.ndarray:
  """[n, G, k] float32 features of examples, one of each of their G groups of draws.

  Args:
    kernel: (operands of `gradient_operands`, rows) → long gradients [B, P], as of `flat_kernel`.
    params: at which gradients are taken.
    examples: n of them.
    groups: the draws of one group.
    num_groups: G.
    stream_name: of the draws, QUERY or TRAIN.
    projection: P.
    batch_size: (image, draw) pairs at a time over all devices.
    block_mib, devices: as of `FeaturePass`.
    partial: where features are kept and, where it has some, gone on from.
  """
  feature_pass = FeaturePass(projection, max(1, batch_size // groups.size), block_mib, devices)
  rows = feature_pass(
    kernel, gradient_operands(params, stream_name), examples.rows(num_groups),
    label=f"{stream_name.replace('_gradients', '')} features", partial=partial,
  )  # fmt: skip
  return rows.reshape(len(examples.ids), num_groups, projection.dim)


@dataclasses.dataclass(frozen=True)
class FeaturePass:
  """How rows of examples become features.

  Attributes:
    projection: P.
    batch_size: rows of gradients at a time over all local devices.
    block_mib: of gradients that wait on the host and are projected at once; the devices share them.
    devices: local devices; all of them where None.
  """

  projection: Projection
  batch_size: int
  block_mib: float = 1024
  devices: Sequence[jax.Device] | None = None

  def __call__(
    self,
    kernel: engine.Kernel,
    operands: PyTree,
    rows: engine.Rows,
    *,
    label: str,
    partial: engine.PartialRows | None = None,
  ) -> np.ndarray:
    """[len(rows), k] float32 features; with several processes each makes its share of them.

    Args:
      kernel: (operands, batch) → long gradients [B, P].
      operands: of the kernel, such as parameters.
      rows: what to go through.
      label: what the progress bar says.
      partial: where features are kept and, where it has some, gone on from.

    Raises:
      ValueError: features are not finite.
    """
    begin, end = processes.share(len(rows))
    outputs = [] if partial is None else partial.load()
    saved = len(outputs)
    done = begin + sum(map(len, outputs))
    stream = engine.stream_batches(
      kernel, operands, rows, batch_size=self.batch_size, label=label, unit="rows",
      devices=self.devices, span=(done, end),
    )  # fmt: skip
    batches = 0
    for block, num_batches in self._blocks(stream, end - done) if done < end or not outputs else ():
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
        "finite for these images at every timestep."
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
    num_devices = engine.num_devices(self.devices)
    most = max(1, int(self.block_mib * 2**20) // (4 * size))
    blocks = -(-total // most) or 1
    return max(1, -(-total // (blocks * num_devices))) * num_devices

  def _projected(self, block: np.ndarray, filled: int) -> np.ndarray:
    devices = engine.local_devices(self.devices)
    key = engine.replicate(jax.random.key_data(self.projection.key), devices)
    project = mapped(_projection_kernel(self.projection), tuple(devices))
    projected = np.asarray(project(key, engine.shard(block, devices)))
    return projected.reshape(-1, self.projection.dim)[:filled]


def _projection_kernel(projection: Projection) -> engine.Kernel:
  """(key data, rows [B, P]) → [B, k]: projections that differ in their seeds share a program."""
  return _kernel_of(dataclasses.replace(projection, seed=0))


@functools.lru_cache(maxsize=8)  # so that it compiles once
def _kernel_of(projection: Projection) -> engine.Kernel:
  def kernel(key: Array, rows: jax.Array) -> jax.Array:
    return projection(rows, jax.random.wrap_key_data(key))

  return kernel


def checked_checkpoints(params: Params, checkpoints: Sequence[Params]) -> tuple[Params, ...]:
  """The parameters and the checkpoints beside them; ValueError where their trees are not alike."""
  shape = lambda tree: jax.tree.map(lambda x: (np.shape(x), jnp.asarray(x).dtype), tree)
  for number, other in enumerate(checkpoints):
    if shape(other) != shape(params):
      raise ValueError(
        f"checkpoints[{number}] is no pytree like the task's parameters, with the same shapes and "
        "types: give parameters of the same network."
      )
  return (params, *checkpoints)


def split_draws(
  draws: int, draw_groups: int | None, query_draws: int, query_groups: int | None
) -> tuple[int, int]:
  """The numbers of groups, 2 each where it can be and none is given; ValueError for a bad split."""
  groups = default_groups(draws, most=2) if draw_groups is None else draw_groups
  asked = default_groups(query_draws, most=2) if query_groups is None else query_groups
  checked_draws(draws, groups, "draws", "draw_groups")
  checked_draws(query_draws, asked, "query_draws", "query_groups")
  return groups, asked


def check_pass(
  query_design: DrawDesign,
  measurements: Sequence[Measurement],
  resume: Resume | None,
  *,
  batch_size: int,
  block_mib: float,
) -> None:
  """Raises ValueError for sizes that are too small, mirrored queries, or what no key can name."""
  if batch_size < 1 or not block_mib > 0:
    raise ValueError(
      f"batch_size must be at least 1 and block_mib positive; got {batch_size} and {block_mib}."
    )
  if query_design.random_flip:
    raise ValueError("query_design mirrors images, but a query is measured as it is: leave it out.")
  if resume is not None and any(measurement.name is None for measurement in measurements):
    raise ValueError("With resume, give the Measurement a name that tells it from others.")


def partial_of(
  resume: Resume | None, name: str, settings: Mapping[str, Any], task: Task, *examples: Examples
) -> PartialOutputs | None:
  """Where the features called `name` are kept, of this task with these settings."""
  if resume is None:
    return None
  key = {**settings, "inputs": content_of(task, *examples)}
  return PartialOutputs(resume.folder / name, key, resume.every)


def finite(scores: np.ndarray) -> np.ndarray:
  """Scores as float32; ValueError where they are not finite."""
  scores = scores.astype(np.float32)
  if not np.isfinite(scores).all():
    raise ValueError("Some scores are not finite: raise the damping.")
  return scores
