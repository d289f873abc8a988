"""A kernel applied to every row, batch by batch: all outputs at once, or as they come."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.types import Array, PyTree
from jaxinf.engine import processes, rehearsal
from jaxinf.engine.devices import IN_FLIGHT, local_devices, replicate, shard
from jaxinf.engine.kernels import Kernel, compiled, in_64_bits, on_one_device
from jaxinf.engine.progress import Progress
from jaxinf.engine.worklist import Rows


class Blocks(NamedTuple):
  """A second kernel, for what the first made of a batch, whose operands come in several blocks.

  Attributes:
    kernel: kernel(operands, value) → array [B, R_block], of the first kernel's output `value`.
    operands: of each block, on the host; more than one visit the devices one after another, so
      that only one of them is in memory there.
  """

  kernel: Kernel
  operands: Sequence[PyTree]


class PartialRows(Protocol):
  """Where a map keeps its rows so far: an interrupted one goes on from there."""

  every: int  # batches between two savings

  def load(self) -> list[PyTree]:
    """What was saved, in order."""

  def save(self, outputs: list[PyTree]) -> None:
    """Saves the outputs of the batches since the last time."""


def map_batches(
  kernel: Kernel,
  operands: PyTree,
  rows: Rows,
  *,
  batch_size: int,
  label: str | None,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
  then: Blocks | None = None,
  partial: PartialRows | None = None,
) -> PyTree:
  """Applies `kernel` to all rows; returns its outputs as NumPy arrays with leading axis len(rows).

  With several processes each goes through its share of the rows, and all get all outputs.

  Args:
    kernel, operands, rows, batch_size, label, unit, devices, then: as for `stream_batches`.
    partial: where rows are kept and, where it has some, gone on from.
  """
  begin, end = processes.share(len(rows))
  outputs = [] if partial is None else partial.load()
  done = begin + sum(len(jax.tree.leaves(output)[0]) for output in outputs)
  saved = len(outputs)
  stream = stream_batches(
    kernel,
    operands,
    rows,
    batch_size=batch_size,
    label=label,
    unit=unit,
    devices=devices,
    then=then,
    span=(done, end),
  )
  for output in stream if done < end or not outputs else ():
    outputs.append(output)
    if partial is not None and len(outputs) - saved >= partial.every:
      partial.save(outputs[saved:])
      saved = len(outputs)
  if partial is not None and len(outputs) > saved:
    partial.save(outputs[saved:])
  whole = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
  return jax.tree.map(lambda x: processes.gathered(x, len(rows)), whole)


def stream_batches(
  kernel: Kernel,
  operands: PyTree,
  rows: Rows,
  *,
  batch_size: int,
  label: str | None,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
  then: Blocks | None = None,
  span: tuple[int, int] | None = None,
) -> Iterator[PyTree]:
  """Yields the outputs for the rows of `span` batch by batch, in order, as NumPy arrays.

  Args:
    kernel: kernel(operands, batch) → pytree of arrays with the batch's leading axis. Row i of the
      output may depend on row i of the batch alone.
    operands: pytree of arrays, replicated to every device.
    rows: what to go through.
    batch_size: rows at a time over all local devices together; rounded up to a multiple of them.
    label: what the progress bar says; None for none.
    unit: what a row is called there.
    devices: local devices; all of them where None.
    then: a second kernel on the outputs, whose outputs are yielded instead, [B, R] of all blocks.
    span: the rows [begin, end); all of this process's share where None.
  """
  devices = local_devices(devices)
  begin, end = processes.share(len(rows)) if span is None else span
  operands = replicate(operands, devices, in_64_bits(kernel))
  first_step = compiled(kernel, tuple(devices))
  then_all = _applied_in_blocks(then, devices) if then is not None else lambda values: values
  window = 1 if then is None else len(then.operands)
  trial = rehearsal.trial(label, len(rows.ids), end - begin)
  if then is not None:
    then_all = trial.second(then_all, window)
  waiting: list[tuple[PyTree, int]] = []
  pending: collections.deque = collections.deque()

  def apply_waiting():
    values, counts = zip(*waiting, strict=True)
    waiting.clear()
    pending.extend(zip(then_all(values), counts, strict=True))

  def finish(progress):
    output, num = pending.popleft()
    output = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:num], output)
    progress.advance(num)
    return trial.done(num, output)

  with Progress(processes.label(label), end, unit, start=begin) as progress:
    for batch, num in trial.few(sharded_batches(rows, batch_size, devices, begin, end)):
      waiting.append((first_step(operands, batch), num))
      if len(waiting) == window:
        apply_waiting()
      while len(pending) > IN_FLIGHT:
        yield finish(progress)
    if waiting:
      apply_waiting()
    while pending:
      yield finish(progress)
    yield from trial.repeated()


def _applied_in_blocks(then: Blocks, devices: list[jax.Device]) -> Callable:
  """The second kernel on several values at once, so that each block is moved once for all."""
  second_step = compiled(then.kernel, tuple(devices))
  if len(then.operands) == 1:
    placed = replicate(then.operands[0], devices, in_64_bits(then.kernel))
    return lambda values: [second_step(placed, value) for value in values]

  def apply(values):
    parts: list[list] = [[] for _ in values]
    for block in then.operands:
      placed = replicate(block, devices, in_64_bits(then.kernel))
      for part, value in zip(parts, values, strict=True):
        part.append(np.asarray(second_step(placed, value)))
      del placed  # before the next block comes
    return [np.concatenate(part, axis=-1) for part in parts]

  return apply


def spread(
  function: Callable[[Array], PyTree],
  items: Mapping[Any, Array],
  cost: Callable[[Array], float],
  devices: Sequence[jax.Device] | None = None,
) -> dict[Any, PyTree]:
  """Decompositions of every item, each on one device, so that all have about as much to do.

  Args:
    function: a JAX computation that decomposes [..., d, d], compiled once a shape.
    items: name → array [..., d, d].
    cost: what an item costs, in any unit; the costliest are dealt out first.
    devices: local devices; all of them where None.

  Returns:
    Name → result as NumPy arrays.
  """
  devices, program = local_devices(devices), on_one_device(function)
  load = [0.0] * len(devices)
  results = {}
  for name in sorted(items, key=lambda name: -cost(items[name])):
    least = load.index(min(load))
    load[least] += cost(items[name])
    run = lambda item: program(devices[least], item)  # noqa: B023
    results[name] = rehearsal.decomposed(run, items[name])
  return {name: jax.tree.map(np.asarray, results[name]) for name in items}


def sharded_batches(
  rows: Rows, batch_size: int, devices: Sequence[jax.Device], begin: int, end: int
) -> Iterator[tuple[Any, int]]:
  """Yields (batch [devices, b, …], number of real rows) for the rows begin … end − 1.

  Where there are none, one batch of padding, from which the shapes of outputs are known.
  """
  if not len(rows):
    raise ValueError("There are no examples to go through: the set is empty.")
  batch_size = min(checked_count(batch_size, "batch_size"), len(rows))
  size = math.ceil(batch_size / len(devices)) * len(devices)
  for row in range(begin, max(end, begin + 1), size):
    yield shard(rows.padded_batch(row, size, end), devices), max(0, min(size, end - row))
