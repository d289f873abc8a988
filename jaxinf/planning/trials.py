"""Kernels on trial: compiled as a stage compiles them, and run on a few batches.

A `Stopwatch` is everything that takes or tells time; one that only pretends serves tests.
"""

import collections
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf import engine
from jaxinf.core.types import PyTree
from jaxinf.engine.devices import IN_FLIGHT

_ROUNDS = 3
_ROUND_SECONDS = 0.3  # at least, so that the clock's noise is small beside it
_ENOUGH_SECONDS = 5.0  # a first batch that takes as long is not repeated: nothing of it is warm-up
_MOST_BATCHES = 16  # of a round
_DISK_BYTES = 2**25  # written to measure the disk


@dataclasses.dataclass(frozen=True)
class Program:
  """A kernel as a stage drives it.

  Attributes:
    function: function(operands, batch), mapped over the devices.
    operands: pytree of host arrays, which go to every device.
    batch: number → batch with a device axis.
    fetched: whether its outputs go to the host.
    carried: whether it returns (operands for the next batch, anything).
  """

  function: Any
  operands: PyTree
  batch: Callable[[int], PyTree]
  fetched: bool = False
  carried: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a program took.

  Attributes:
    compiling: seconds of tracing and compiling.
    placing: seconds until its operands are on the devices.
    batch: seconds of a batch; None where it does not fit in memory, and was not run.
    workspace: bytes on each device while it runs, besides inputs and outputs; 0 where not known.
  """

  compiling: float
  placing: float
  batch: float | None
  workspace: int


@dataclasses.dataclass(frozen=True)
class Call:
  """Seconds of a function's first call, in which it compiles what it needs, and of a later one."""

  first: float
  again: float


@dataclasses.dataclass(frozen=True)
class Stopwatch:
  """Takes the time of programs, functions and the disk.

  Attributes:
    devices: local devices; all of them where None.
    most_bytes: on each device: a program that needs more is compiled and not run. None: any.
  """

  devices: Sequence[jax.Device] | None = None
  most_bytes: int | None = None

  def program(self, program: Program) -> Trial:
    """Compiles a program and runs a few batches of it."""
    began = time.perf_counter()
    num = engine.num_devices(self.devices)
    on_devices = lambda x: jax.ShapeDtypeStruct((num, *np.shape(x)), x.dtype)
    first = program.batch(0)
    lowered = program.function.lower(jax.tree.map(on_devices, program.operands), first)
    compiled = lowered.compile()
    compiling = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    workspace = int(analysis.temp_size_in_bytes) if analysis else 0
    needed = workspace + num_bytes(program.operands) + num_bytes(first) // num
    if self.most_bytes is not None and needed > self.most_bytes:
      return Trial(compiling, 0.0, None, workspace)
    began = time.perf_counter()
    operands = jax.block_until_ready(engine.replicate(program.operands, self.devices))
    placing = time.perf_counter() - began
    return Trial(compiling, placing, _batch_seconds(program, compiled, operands), workspace)

  def call(self, function: Callable[[], Any], *, repeats: int = 1) -> Call:
    """Calls a function, and again so many times, of which the shortest counts.

    With no repeats the first call counts as both.
    """
    times = []
    for _ in range(1 + repeats):
      began = time.perf_counter()
      jax.block_until_ready(function())
      times.append(time.perf_counter() - began)
    return Call(times[0], min(times[1:] or times))

  def disk_rate(self, folder: Path) -> float:
    """Bytes a second that reach the disk of a folder, or of the nearest one above that exists."""
    while not folder.exists():
      folder = folder.parent
    block = np.random.default_rng(0).bytes(_DISK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so that nothing can stay
      began = time.perf_counter()
      file.write(block)
      file.flush()
      os.fsync(file.fileno())
      return _DISK_BYTES / (time.perf_counter() - began)


def _batch_seconds(program: Program, compiled: Callable, operands: PyTree) -> float:
  """The median over rounds of a batch's mean time, batches overlapping as in the drivers."""
  done = 0

  def seconds_of(count: int) -> float:
    nonlocal operands, done
    pending: collections.deque = collections.deque()
    began = time.perf_counter()
    for number in range(done, done + count):
      output = compiled(operands, program.batch(number))
      if program.carried:
        operands, output = output
      pending.append(output)
      if len(pending) > IN_FLIGHT:
        finish(pending.popleft())
    while pending:
      finish(pending.popleft())
    done += count
    return (time.perf_counter() - began) / count

  def finish(output: PyTree) -> None:
    jax.block_until_ready(output)
    if program.fetched:
      jax.tree.map(np.asarray, output)

  first = seconds_of(1)
  if first >= _ENOUGH_SECONDS:
    return first
  count = min(_MOST_BATCHES, int(_ROUND_SECONDS / first) + 1)
  return statistics.median(seconds_of(count) for _ in range(_ROUNDS))


def num_operations(function: Callable, *arguments: PyTree) -> float | None:
  """Floating-point operations of one call by XLA's count; None where there is a loop.

  XLA counts the body of a loop once. On CPUs our kernels go through a batch in a loop of chunks
  where other devices take it at once, so the program that is counted is a GPU's, which needs none.

  Args:
    function: of JAX arrays.
    arguments: arrays, or their shapes.
  """
  traced = jax.jit(function).trace(*jax.tree.map(_struct, arguments))
  lowered = traced.lower(lowering_platforms=("cuda",))
  if "stablehlo.while" in lowered.as_text():
    return None
  return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def random_params(params: PyTree, seed: int = 0) -> PyTree:
  """Parameters N(0, 1 / fan-in): of zeros, or of numbers that vanish, times would be others."""
  rng = np.random.default_rng(seed)

  def filled(leaf):
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

  return jax.tree.map(filled, params)


def random_like(shapes: PyTree) -> PyTree:
  """Host arrays of those shapes and types: |N(0, 1)| where floating, 0 … 100 where not."""
  rng = np.random.default_rng(0)
  normal, integers = np.abs(rng.standard_normal(2**16)), rng.integers(0, 101, 2**16)

  def filled(leaf):
    kind = normal if jax.numpy.issubdtype(leaf.dtype, np.floating) else integers
    return np.resize(kind.astype(leaf.dtype), leaf.shape)

  return jax.tree.map(filled, shapes)


def num_bytes(tree: PyTree) -> int:
  """Bytes of arrays, or of their shapes."""
  return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def added(values: Iterable[float | None]) -> float | None:
  """The sum; None where a part is."""
  total = 0.0
  for value in values:
    if value is None:
      return None
    total += value
  return total


def times(value: float | None, count: float) -> float | None:
  """The product; None where the value is."""
  return None if value is None else value * count


def _struct(leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
