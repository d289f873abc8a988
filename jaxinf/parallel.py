"""Everything is a map or a reduce over examples: the two drivers, and the only pmap.

A kernel is pure and sees one unsharded batch: `kernel(operands, batch)`, where `operands` (such as
parameters) are the same for every batch. The drivers own looping, padding, devices and progress.
Padded rows repeat the last one and have mask 0.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.progress import Progress
from jaxinf.rows import Rows
from jaxinf.types import Array, Batch, PyTree

_AXIS = "devices"
_IN_FLIGHT = 2  # results a device may be ahead of the host

Kernel = Callable[[PyTree, Batch], PyTree]


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
  label: str | None,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
  partial: "Partial | None" = None,
) -> PyTree:
  """Sums `kernel` over all batches, once; the arguments are those of `Reduction`."""
  reduction = Reduction(kernel, label=label, unit=unit, devices=devices)
  return reduction(operands, rows, batch_size=batch_size, partial=partial)


class Partial(Protocol):
  """Where a reduction keeps its sums so far: an interrupted one goes on from there.

  Sums are the leaves of the kernel's output, each with a leading axis of the devices that summed.
  """

  every: int  # batches between two savings; each waits for the devices and copies their sums

  def load(self) -> tuple[int, list[np.ndarray]] | None:
    """(number of rows in the sums, the sums), or None where nothing was saved."""

  def save(self, rows_done: int, sums: list[np.ndarray]) -> None: ...


class Reduction:
  """Sums a kernel over all batches; compiled for the first rows, not again for more of that shape.

  Args:
    kernel: kernel(operands, batch) → pytree of sums over the batch, with padding (mask 0) left out.
    label, unit, devices: as for `map_batches`; no progress is shown where label is None.
  """

  def __init__(
    self,
    kernel: Kernel,
    *,
    label: str | None,
    unit: str = "examples",
    devices: Sequence[jax.Device] | None = None,
  ):
    self._label, self._unit, self._devices = label, unit, _devices(devices)

    def zeros(operands, batch):
      shapes = jax.eval_shape(kernel, operands, batch)
      return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(sums, operands, batch):
      sums = jax.tree.map(jnp.add, sums, kernel(operands, batch))
      # A number to wait for: the sums themselves are donated to the next batch.
      return sums, jax.tree.leaves(sums)[0].ravel()[:1]

    on_all = functools.partial(jax.pmap, axis_name=_AXIS, devices=self._devices)
    self._zeros = on_all(zeros)
    self._accumulate = on_all(accumulate, donate_argnums=0)
    self._total = on_all(lambda x: jax.lax.psum(x, _AXIS))
    self._place = on_all(lambda x: x)

  def __call__(
    self, operands: PyTree, rows: Rows, *, batch_size: int, partial: Partial | None = None
  ) -> PyTree:
    """The sums as NumPy arrays.

    Args:
      operands, rows, batch_size: as for `map_batches`.
      partial: where sums are kept and, where it has some, gone on from: bitwise as without a stop
        on as many devices and in batches as large, up to rounding otherwise.

    Raises:
      ValueError: there are no rows, or `partial` holds the sums of something else.
    """
    operands = replicate(operands, self._devices)
    first_batch, _ = next(_sharded_batches(rows, batch_size, self._devices))
    sums = self._zeros(operands, first_batch)
    done = 0
    if partial is not None and (saved := partial.load()) is not None:
      done, sums = saved[0], self._resumed(sums, *saved, len(rows))
    pending: collections.deque = collections.deque()

    def finish(progress):
      marker, count = pending.popleft()
      marker.block_until_ready()
      progress.advance(count)

    with Progress(self._label, len(rows), self._unit, start=done) as progress:
      batches = _sharded_batches(rows, batch_size, self._devices, start=done)
      for number, (batch, count) in enumerate(batches, start=1):
        sums, marker = self._accumulate(sums, operands, batch)
        done += count
        pending.append((marker, count))
        if len(pending) > _IN_FLIGHT:
          finish(progress)
        last = done == len(rows)  # so that a later pass, when stopped, need not repeat this one
        if partial is not None and (last or number % partial.every == 0):
          partial.save(done, [np.asarray(leaf) for leaf in jax.tree.leaves(sums)])
      while pending:
        finish(progress)
    return first(self._total(sums))

  def _resumed(self, like: PyTree, done: int, saved: list[np.ndarray], num_rows: int) -> PyTree:
    """Saved sums with the structure of `like`, on our devices: moved to the first if those differ.

    Raises:
      ValueError: they are other sums than `like`, or of more rows than there are.
    """
    leaves, structure = jax.tree.flatten(like)
    expected, found = ([(*a.shape[1:], str(a.dtype)) for a in arrays] for arrays in (leaves, saved))
    if expected != found or not 0 < done <= num_rows:
      raise ValueError(
        f"The partial sums are those of another computation: {found} over {done} rows, where "
        f"{expected} over at most {num_rows} are expected. Discard them to start again."
      )
    if len(saved[0]) != len(self._devices):
      padding = ((0, len(self._devices) - 1),)
      totals = [np.sum(a, axis=0, keepdims=True, dtype=a.dtype) for a in saved]
      saved = [np.pad(a, padding + ((0, 0),) * (a.ndim - 1)) for a in totals]
    return self._place(jax.tree.unflatten(structure, saved))


def spread(
  function: Callable[[Array], PyTree],
  items: Mapping[Any, Array],
  cost: Callable[[Array], float],
  devices: Sequence[jax.Device] | None = None,
) -> dict[Any, PyTree]:
  """function(item) of every item, each on one device, so that all have about as much to do.

  Args:
    function: a JAX computation, compiled once a shape.
    items: name → array.
    cost: what an item costs, in any unit; the costliest are dealt out first.
    devices: local devices; all of them where None.

  Returns:
    Name → result as NumPy arrays.
  """
  devices, compiled = _devices(devices), jax.jit(function)
  load = [0.0] * len(devices)
  results = {}
  for name in sorted(items, key=lambda name: -cost(items[name])):
    least = load.index(min(load))
    load[least] += cost(items[name])
    results[name] = compiled(jax.device_put(items[name], devices[least]))
  return {name: jax.tree.map(np.asarray, results[name]) for name in items}


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
  return _copy_to(tuple(devices))(np.arange(len(devices)), tree)


@functools.cache  # so that it compiles once for trees of the same shapes
def _copy_to(devices: tuple[jax.Device, ...]) -> Callable:
  return jax.pmap(lambda _, x: x, axis_name=_AXIS, in_axes=(0, None), devices=devices)


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


def _sharded_batches(
  rows: Rows, batch_size: int, devices: list, start: int = 0
) -> Iterator[tuple[Any, int]]:
  """Yields (batch [devices, b, …], number of real rows), from row `start` on."""
  if not len(rows):
    raise ValueError("There are no examples to go through: the set of images is empty.")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
  size = math.ceil(min(batch_size, len(rows)) / len(devices)) * len(devices)
  for row in range(start, len(rows), size):
    yield shard(rows.padded_batch(row, size), devices), min(size, len(rows) - row)
