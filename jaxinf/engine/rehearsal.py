"""Rehearsals: the drivers go through a few batches of each pass, and say what one takes.

In `with rehearsing(…)` a driver stops after a few batches and gives the last outputs again for the
rows that are left, so that whatever calls it goes on as ever, with numbers that mean nothing. The
`Rehearsal` knows then what every pass will take. Elsewhere nothing of this happens.
"""

import contextlib
import contextvars
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.core.types import Array, PyTree
from jaxinf.engine import processes

AXIS = "devices"  # of mapped programs

BATCHES = 12  # of a pass, at most: their mean is then good to some percent beside other processes
_SECONDS = 10.0  # after which fewer do; processes stop together, and have all of them
_WARM = 2  # batches that are in flight when the first ends, and may have been done meanwhile
_ROWS = 640  # of matrices that are decomposed; the time of larger ones follows by d³

_CURRENT: contextvars.ContextVar["Rehearsal | None"] = contextvars.ContextVar(
  "rehearsal", default=None
)


class Trial:
  """A pass of a driver, which nobody watches: a `Pass` where there is a rehearsal."""

  def few(self, batches: Iterable) -> Iterable:
    """The batches to go through: all of them."""
    return batches

  def second(self, function: Callable, window: int) -> Callable:
    """The function that applies a second kernel to the outputs of `window` batches at a time."""
    del window
    return function

  def done(self, rows: int, output: PyTree = None, batches: int = 1) -> PyTree:
    """Says that so many rows have arrived, and gives their output back."""
    del rows, batches
    return output

  def repeated(self) -> Iterable[PyTree]:
    """Outputs in the place of those of the rows that were left out."""
    return ()


def trial(label: str | None, examples: int | None, rows: int) -> Trial:
  """The trial of a pass over so many rows, of so many examples; None where they are steps."""
  found = _CURRENT.get()
  return Trial() if found is None else found.begun(label, examples, rows)


def under_way() -> bool:
  """Whether this is a rehearsal: models are then random, and numbers mean nothing."""
  return _CURRENT.get() is not None


def in_full(examples: int, rows: int) -> int:
  """Rows that the run in full has in the place of these, which are of so many examples."""
  found = _CURRENT.get()
  return rows if found is None else found.in_full(examples, rows)


@contextlib.contextmanager
def part(times: float) -> Iterator[None]:
  """A part of a pass, besides its batches, that the run in full does so many times."""
  found = _CURRENT.get()
  with contextlib.nullcontext() if found is None else found.part(times):
    yield


def program(mapped: Any, function: Callable) -> Callable:
  """What calls a mapped program; `function` is what it maps."""
  found = _CURRENT.get()
  return mapped if found is None else lambda *arguments: found.call(mapped, function, arguments)


def decomposed(eigh: Callable[[Array], tuple[Array, Array]], matrix: Array) -> tuple[Array, Array]:
  """eigh(matrix) of [..., d, d]; in a rehearsal, of a large one, ones and the identity instead."""
  found = _CURRENT.get()
  if found is None or matrix.shape[-1] <= _ROWS:
    return eigh(matrix)
  return found.decomposed(eigh, matrix)


@contextlib.contextmanager
def rehearsing(
  sizes: Mapping[int, int],
  clock: Callable[[], float] = time.perf_counter,
  most_bytes: int | None = None,
  growth: float = 1.0,
) -> Iterator["Rehearsal"]:
  """What is called in here is a rehearsal.

  Args:
    sizes: number of examples here → in the run in full; passes over other numbers are as they are.
    clock: seconds.
    most_bytes: of each device: a program that needs more is compiled and not run. None: any.
    growth: of the operands of second kernels, in passes over examples that grow in number.
  """
  found = Rehearsal(sizes, clock, most_bytes, growth)
  token, began = _CURRENT.set(found), found.now()
  try:
    yield found
  finally:
    _CURRENT.reset(token)
    found.total = found.now() - began


@dataclasses.dataclass
class Use:
  """Operations of calls, None where not known, and bytes of workspace on a device."""

  operations: float | None = 0.0
  workspace: int = 0

  def add(self, call: "Use") -> None:
    """Adds those of a call."""
    both = self.operations, call.operations
    self.operations = None if both[0] is None or both[1] is None else both[0] + both[1]
    self.workspace = max(self.workspace, call.workspace)


class Rehearsal:
  """What was rehearsed. Its clock stands still while programs compile.

  Attributes:
    passes: of the drivers, in order.
    compiling: seconds for the programs of passes.
    total: seconds that the rehearsal took, compiling left out.
    parts: seconds of what `part` wrapped, in the run in full.
    decomposing: seconds of large eigendecompositions.
    workspace: bytes of the largest program on a device, second kernels left out.
    too_large: whether a program was not run, so that times mean nothing.
  """

  def __init__(
    self,
    sizes: Mapping[int, int],
    clock: Callable[[], float],
    most_bytes: int | None,
    growth: float,
  ):
    self._sizes, self._clock, self._most_bytes, self._growth = sizes, clock, most_bytes, growth
    self._paused, self._within, self._programs = 0.0, [], {}  # type: float, list[float], dict
    self.passes: list[Pass] = []
    self.active: Pass | None = None  # which programs are called for
    self.compiling = self.total = self.parts = self.decomposing = 0.0
    self.workspace, self.too_large = 0, False

  @property
  def besides(self) -> float:
    """Seconds of what is no batch of a pass."""
    return max(0.0, self.total - sum(p.seconds * p.num_done for p in self.passes))

  def now(self) -> float:
    return self._clock() - self._paused

  @contextlib.contextmanager
  def paused(self) -> Iterator[list[float]]:
    """Stops the clock; afterwards the list holds the seconds in here, without pauses within."""
    took: list[float] = []
    self._within.append(0.0)
    began = self._clock()
    try:
      yield took
    finally:
      seconds = self._clock() - began
      took.append(seconds - self._within.pop())
      if self._within:
        self._within[-1] += seconds
      else:
        self._paused += seconds

  def begun(self, label: str | None, examples: int | None, rows: int) -> "Pass":
    growth = self._growth if examples in self._sizes else 1.0
    in_full = rows if examples is None else self.in_full(examples, rows)
    self.passes.append(Pass(self, label or "", rows, in_full, growth))
    return self.passes[-1]

  def in_full(self, examples: int, rows: int) -> int:
    return math.ceil(rows * self._sizes.get(examples, examples) / examples)

  @property
  def seconds(self) -> float | None:
    """Of all batches and parts in the run in full; None where that is not known."""
    if self.too_large:
      return None
    more = lambda p: (p.growth - 1) * p.second_seconds
    return self.parts + sum(p.batches * (p.seconds + more(p)) for p in self.passes)

  @property
  def operations(self) -> float | None:
    """Of all batches, on one device; None where that is not known."""
    total = 0.0
    for one in self.passes:
      first, second = (one.operations(kernel) for kernel in (0, 1))
      if first is None or second is None:
        return None
      total += one.batches * (first + second * one.growth)
    return total

  @property
  def workspace_in_full(self) -> int:
    """Bytes on each device, besides inputs and outputs."""
    return max(self.workspace, *(math.ceil(p.uses[1].workspace * p.growth) for p in self.passes), 0)

  @contextlib.contextmanager
  def part(self, times: float) -> Iterator[None]:
    active, self.active = self.active, None
    with self.paused() as took:
      yield
    self.parts, self.active = self.parts + times * took[0], active

  def decomposed(self, eigh: Callable, matrix: Array) -> tuple[Array, Array]:
    size = matrix.shape[-1]
    with self.paused() as took:
      jax.block_until_ready(eigh(matrix[..., :_ROWS, :_ROWS]))
    self.decomposing += took[0] * (size / _ROWS) ** 3
    return np.ones(matrix.shape[:-1]), np.broadcast_to(np.eye(size), matrix.shape)

  def call(self, mapped: Any, function: Callable, arguments: tuple) -> PyTree:
    """The program's outputs, for the pass that is active; zeros where it would not fit."""
    leaves, structure = jax.tree.flatten(arguments)
    key = mapped, structure, tuple((np.shape(x), np.dtype(x.dtype).name) for x in leaves)
    if key not in self._programs:
      self._programs[key] = self._compiled(mapped, function, arguments)
    compiled, used = self._programs[key]
    own = Use() if self.active is None else self.active.uses[self.active.in_second]
    own.add(used)
    if self.active is None or not self.active.in_second:
      self.workspace = max(self.workspace, used.workspace)
    needed = used.workspace + sum(x.nbytes // len(x) for x in leaves)
    if self._most_bytes is not None and needed > self._most_bytes:
      self.too_large = True
      shapes = jax.eval_shape(mapped, *arguments)
      return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)
    return compiled(*arguments)

  def _compiled(self, mapped: Any, function: Callable, arguments: tuple) -> tuple[Any, "Use"]:
    """The compiled program, and what a call uses."""
    with self.paused():
      began = self._clock()
      compiled = mapped.lower(*arguments).compile()
      self.compiling += self._clock() - began
      analysis = compiled.memory_analysis()
      # What is no part of a batch need not be counted, which takes as long as tracing.
      operations = 0.0 if self.active is None else num_operations(function, arguments)
    return compiled, Use(operations, int(analysis.temp_size_in_bytes) if analysis else 0)


@dataclasses.dataclass(eq=False)
class Pass(Trial):
  """A pass of a driver.

  Attributes:
    rehearsal: that it belongs to.
    label: of the driver.
    rows: that it has here.
    rows_in_full: in the run in full.
    growth: of the operands of its second kernel.
    uses: what it has of the first kernel, and of the second.
    second_seconds: of the second kernel, for a batch.
  """

  rehearsal: Rehearsal
  label: str
  rows: int
  rows_in_full: int
  growth: float
  uses: tuple[Use, Use] = dataclasses.field(default_factory=lambda: (Use(), Use()))
  second_seconds: float = 0.0
  in_second: bool = False
  _size: float = 1  # rows of a batch
  _rows_done: int = 0
  _window: int = 1
  _begun: int = 0  # batches
  _stamps: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # batches done, when
  _last: PyTree = None
  _applied: tuple[Callable, Sequence[PyTree]] | None = None  # to the last batches

  @property
  def num_done(self) -> int:
    """Batches that were done here."""
    return self._stamps[-1][0] if self._stamps else 0

  @property
  def batches(self) -> int:
    """Of the run in full."""
    return math.ceil(self.rows_in_full / self._size)

  @property
  def seconds(self) -> float:
    """Of a batch, as batches overlap: of those after the first ones."""
    if len(self._stamps) < 2:
      return 0.0
    several = len(self._stamps) > 2 + _WARM and self._window == 1
    first = min(1 + _WARM, len(self._stamps) - 2) if several else 0
    (before, began), (after, ended) = self._stamps[first], self._stamps[-1]
    return (ended - began) / (after - before)

  def operations(self, kernel: int) -> float | None:
    """Of a batch, by the first kernel (0) or the second (1), on a device."""
    found = self.uses[kernel].operations
    return None if found is None else found / max(1, self._begun)

  def few(self, batches: Iterable) -> Iterator:
    for batch in batches:
      if self._enough():
        break
      if not self._stamps:
        self._stamps.append((0, self.rehearsal.now()))
      self.rehearsal.active = self
      self._begun += 1
      yield batch
    self.rehearsal.active = None

  def second(self, function: Callable, window: int) -> Callable:
    self._window = window

    def apply(values):
      self.rehearsal.active, self.in_second = self, True
      outputs = function(values)
      self.in_second, self._applied = False, (function, values)
      return outputs

    return apply

  def done(self, rows: int, output: PyTree = None, batches: int = 1) -> PyTree:
    self._stamps.append((self.num_done + batches, self.rehearsal.now()))
    self._size, self._last = max(self._size, rows // batches), output
    self._rows_done += rows
    return output

  def repeated(self) -> Iterator[PyTree]:
    if self._applied is not None:
      self._time_second(*self._applied)
      self._applied = None
    while (left := self.rows - self._rows_done) > 0 and self._last is not None:
      rows = len(jax.tree.leaves(self._last)[0])
      self._rows_done += min(rows, left)
      yield jax.tree.map(lambda x: x[:left], self._last)

  def _enough(self) -> bool:
    if len(self._stamps) < 2 + _WARM or len(self._stamps) > BATCHES:
      return len(self._stamps) > BATCHES
    alone = processes.count() == 1
    return alone and self._stamps[-1][1] - self._stamps[0][1] > _SECONDS

  def _time_second(self, function: Callable, values: Sequence[PyTree]) -> None:
    """Times the second kernel by itself."""
    for _ in range(2):  # the first time it may be waiting for the device
      with self.rehearsal.paused() as took:
        jax.block_until_ready(function(values))
      self.second_seconds = took[0] / len(values)


def num_operations(function: Callable, arguments: PyTree) -> float | None:
  """Floating-point operations of one call on one device by XLA's count; None where not known.

  XLA counts the body of a loop once, so that a program with one is not counted. On CPUs our kernels
  go through a batch in a loop of chunks where other devices take it at once, so the program that is
  counted is a GPU's, which needs none.

  Args:
    function: of arrays without a device axis.
    arguments: arrays with one, or their shapes.
  """
  one = lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], x.dtype)
  # Over a dummy, so that there is an axis of devices to sum over, and no operation has it.
  counted = lambda *given: jax.vmap(lambda _: function(*given), axis_name=AXIS)(np.zeros(1))
  traced = jax.jit(counted).trace(*jax.tree.map(one, arguments))
  try:
    lowered = traced.lower(lowering_platforms=("cuda",))
  except (ValueError, NotImplementedError):  # a network calls Python, or has a part for CPUs alone
    return None
  if "stablehlo.while" in lowered.as_text():
    return None
  return float((lowered.cost_analysis() or {}).get("flops", 0.0))
