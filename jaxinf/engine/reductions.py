"""A kernel summed over all rows."""

import collections
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from jaxinf.core.types import PyTree
from jaxinf.engine import processes, rehearsal
from jaxinf.engine.devices import IN_FLIGHT, first, local_devices, replicate
from jaxinf.engine.kernels import Kernel, Program, in_64_bits, summing
from jaxinf.engine.maps import sharded_batches
from jaxinf.engine.progress import Progress
from jaxinf.engine.worklist import Rows


class Partial(Protocol):
  """Where a reduction keeps its sums so far: an interrupted one goes on from there.

  Sums are the leaves of the kernel's output, each with a leading axis of the devices that summed.
  """

  every: int  # batches between two savings; each waits for the devices and copies their sums

  def load(self) -> tuple[int, list[np.ndarray]] | None:
    """(number of rows in the sums, the sums), or None where nothing was saved."""

  def save(self, rows_done: int, sums: list[np.ndarray]) -> None: ...


def reduce_batches(
  kernel: Kernel,
  operands: PyTree,
  rows: Rows,
  *,
  batch_size: int,
  label: str | None,
  unit: str = "examples",
  devices: Sequence[jax.Device] | None = None,
  partial: Partial | None = None,
) -> PyTree:
  """Sums `kernel` over all batches; returns the sums as NumPy arrays, over rows of all processes.

  Args:
    kernel: kernel(operands, batch) → pytree of sums over the batch, with padding (mask 0) left out.
    operands, rows, batch_size, unit, devices: as for `map_batches`.
    label: what the progress bar says; None for none.
    partial: where sums are kept and, where it has some, gone on from: bitwise as without a stop on
      as many devices and in batches as large, up to rounding otherwise.

  Raises:
    ValueError: there are no rows, or `partial` holds the sums of something else.
  """
  devices = local_devices(devices)
  programs = summing(kernel, tuple(devices))
  operands = replicate(operands, devices, in_64_bits(kernel))
  done, end = processes.share(len(rows))
  first_batch, _ = next(sharded_batches(rows, batch_size, devices, done, end))
  sums = programs.zeros(operands, first_batch)
  if partial is not None and (saved := partial.load()) is not None:
    done, sums = saved[0], _resumed(sums, *saved, end, len(devices), programs.place)
  pending: collections.deque = collections.deque()
  trial = rehearsal.trial(label, len(rows.ids), end - done)

  def finish(progress):
    marker, count = pending.popleft()
    marker.block_until_ready()
    progress.advance(count)
    trial.done(count)

  with Progress(processes.label(label), end, unit, start=done) as progress:
    batches = sharded_batches(rows, batch_size, devices, done, end)
    for number, (batch, count) in enumerate(trial.few(batches if done < end else ()), start=1):
      sums, marker = programs.accumulate(sums, operands, batch)
      done += count
      pending.append((marker, count))
      if len(pending) > IN_FLIGHT:
        finish(progress)
      last = done == end  # so that a later pass, when stopped, need not repeat this one
      if partial is not None and (last or number % partial.every == 0):
        partial.save(done, [np.asarray(leaf) for leaf in jax.tree.leaves(sums)])
    while pending:
      finish(progress)
  leaves, structure = jax.tree.flatten(first(programs.total(sums)))
  return jax.tree.unflatten(structure, processes.summed(leaves))


def _resumed(
  like: PyTree,
  done: int,
  saved: list[np.ndarray],
  num_rows: int,
  num_devices: int,
  place: Program,
) -> PyTree:
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
  if len(saved[0]) != num_devices:
    padding = ((0, num_devices - 1),)
    totals = [np.sum(a, axis=0, keepdims=True, dtype=a.dtype) for a in saved]
    saved = [np.pad(a, padding + ((0, 0),) * (a.ndim - 1)) for a in totals]
  return place(jax.tree.unflatten(structure, saved))
