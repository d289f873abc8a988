"""Everything is a map or a reduce over examples: the two drivers, and the only pmap.

A kernel is pure and sees one unsharded batch: `kernel(operands, batch)`, where `operands` (such as
parameters) are the same for every batch. The drivers own looping, padding, devices and progress.
Padded rows repeat the last one and have mask 0.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.progress import Progress
from jaxinf.types import Array, Batch, PyTree

_AXIS = "devices"
_IN_FLIGHT = 2  # results a device may be ahead of the host

Kernel = Callable[[PyTree, Batch], PyTree]


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a driver goes through: examples, or the (example, draw) pairs of `draws` draws each.

  Attributes:
    images: [N, H, W, C], or None where rows have no image yet.
    ids: [N] uint32 example numbers.
    draws: None for one row an example; S for S rows an example, example-major.
  """

  images: Array | None
  ids: np.ndarray
  draws: int | None = None

  def __len__(self) -> int:
    return len(self.ids) * (self.draws or 1)

  def padded_batch(self, start: int, size: int) -> Batch:
    """Rows start … start + size − 1; rows past the end are padding."""
    rows = np.arange(start, start + size)
    mask = (rows < len(self)).astype(np.float32)
    rows = np.minimum(rows, len(self) - 1)
    examples, draws = np.divmod(rows, self.draws or 1)
    return Batch(
      images=None if self.images is None else self.images[examples],
      ids=self.ids[examples],
      draws=None if self.draws is None else draws.astype(np.int32),
      mask=mask,
    )


def map_batches(
  kernel: Kernel,
  operands: PyTree,
  rows: Rows,
  *,
  batch_size: int,
  label: str,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
) -> PyTree:
  """Applies `kernel` to all rows; returns its outputs as NumPy arrays with leading axis len(rows).

  Args:
    kernel: kernel(operands, batch) → pytree of arrays with the batch's leading axis. Row i of the
      output may depend on row i of the batch alone.
    operands: pytree of arrays, replicated to every device.
    rows: what to go through.
    batch_size: rows at a time over all devices together; rounded up to a multiple of them.
    label: what the progress bar says.
    unit: what a row is called there.
    devices: local devices; all of them where None.
  """
  devices = _devices(devices)
  mapped = jax.pmap(kernel, axis_name=_AXIS, devices=devices)
  operands = replicate(operands, devices)
  outputs: list[PyTree] = []
  pending: collections.deque = collections.deque()

  def finish(progress):
    output, count = pending.popleft()
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], output)
    outputs.append(flat)
    progress.advance(count)

  with Progress(label, len(rows), unit) as progress:
    for batch, count in _sharded_batches(rows, batch_size, devices):
      pending.append((mapped(operands, batch), count))
      if len(pending) > _IN_FLIGHT:
        finish(progress)
    while pending:
      finish(progress)
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def reduce_batches(
  kernel: Kernel,
  operands: PyTree,
  rows: Rows,
  *,
  batch_size: int,
  label: str,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
) -> PyTree:
  """Sums `kernel` over all batches; returns the sums as NumPy arrays.

  Args:
    kernel: kernel(operands, batch) → pytree of sums over the batch, with padding (mask 0) left out.
    operands, rows, batch_size, label, unit, devices: as for `map_batches`.
  """
  devices = _devices(devices)

  def accumulate(sums, operands, batch):
    return jax.tree.map(jnp.add, sums, kernel(operands, batch))

  accumulate_all = jax.pmap(accumulate, axis_name=_AXIS, devices=devices, donate_argnums=0)
  total_all = jax.pmap(lambda x: jax.lax.psum(x, _AXIS), axis_name=_AXIS, devices=devices)
  operands = replicate(operands, devices)
  sums = None
  pending: collections.deque = collections.deque()

  def finish(progress):
    marker, count = pending.popleft()
    marker.block_until_ready()
    progress.advance(count)

  with Progress(label, len(rows), unit) as progress:
    for batch, count in _sharded_batches(rows, batch_size, devices):
      if sums is None:
        shapes = jax.eval_shape(kernel, _first(operands), _first(batch))
        sums = replicate(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), devices)
      sums = accumulate_all(sums, operands, batch)
      # A copy of one number: the sums themselves are donated to the next batch.
      pending.append((jax.tree.leaves(sums)[0].ravel()[:1] + 0, count))
      if len(pending) > _IN_FLIGHT:
        finish(progress)
    while pending:
      finish(progress)
  return first(total_all(sums))


def parallel_step(
  sums: Callable[[PyTree, PyTree], PyTree],
  update: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
  devices: Sequence[jax.Device] | None = None,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
  """One training step over sharded rows: state, metrics = update(state, Σ sums(state, rows)).

  Returns step(state, batch) for a state from `replicate` and a batch from `shard`. The state is
  donated.
  """

  def step(state, batch):
    return update(state, jax.lax.psum(sums(state, batch), _AXIS))

  return jax.pmap(step, axis_name=_AXIS, devices=_devices(devices), donate_argnums=0)


def replicate(tree: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """Copies a pytree of arrays to every device: a leading device axis is added."""
  devices = _devices(devices)
  copy = jax.pmap(lambda _, x: x, axis_name=_AXIS, in_axes=(0, None), devices=devices)
  return copy(np.arange(len(devices)), tree)


def shard(batch: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """Splits rows [B, …] evenly into [devices, B / devices, …]."""
  num = len(_devices(devices))
  return jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), batch)


def first(tree: PyTree) -> PyTree:
  """The first device's copy of a replicated pytree, as NumPy arrays."""
  return jax.tree.map(np.asarray, _first(tree))


def num_devices(devices: Sequence[jax.Device] | None = None) -> int:
  return len(_devices(devices))


def _first(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x[0], tree)


def _devices(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
  return list(jax.local_devices() if devices is None else devices)


def _sharded_batches(rows: Rows, batch_size: int, devices: list) -> Iterator[tuple[Any, int]]:
  """Yields (batch [devices, b, …], number of real rows)."""
  if not len(rows):
    raise ValueError("There are no examples to go through: the set of images is empty.")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
  size = math.ceil(min(batch_size, len(rows)) / len(devices)) * len(devices)
  for start in range(0, len(rows), size):
    yield shard(rows.padded_batch(start, size), devices), min(size, len(rows) - start)
