"""What a stage costs, and the table of all stages."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxinf.engine.progress import clock
from jaxinf.planning.limits import Limits, size, warnings_of


@dataclasses.dataclass(frozen=True)
class StageCost:
  """What a stage takes in this process.

  Attributes:
    stage: its name.
    amount: of `unit`, that the stage goes through in all processes.
    unit: steps, samples or pairs.
    operations: of its kernels by XLA's count, floating-point, on all local devices; None where not
      known.
    seconds: by what they are spent on; None where that was not measured.
    device: bytes on each device, by what they hold.
    host: bytes of the host's memory, likewise, besides what JAX and its programs take.
    disk: bytes on the disk, likewise.
    notes: sentences on what the numbers leave out.
  """

  stage: str
  amount: int
  unit: str
  operations: float | None
  seconds: Mapping[str, float | None]
  device: Mapping[str, int]
  host: Mapping[str, int]
  disk: Mapping[str, int]
  notes: tuple[str, ...] = ()

  @property
  def total_seconds(self) -> float | None:
    """Of everything; None where a part is."""
    return added(self.seconds.values())

  def times(self, num: int) -> "StageCost":
    """Of doing the same for so many models, one after another, with what was compiled once."""
    if num == 1:
      return self
    again = lambda part, value: value if part == "compiling" or value is None else num * value
    return dataclasses.replace(
      self,
      amount=num * self.amount,
      operations=None if self.operations is None else num * self.operations,
      seconds={part: again(part, value) for part, value in self.seconds.items()},
      disk={part: num * value for part, value in self.disk.items()},
      notes=(*self.notes, f"for {num} models, one after another."),
    )

  @property
  def rate(self) -> float | None:
    """Operations a second while batches run."""
    batches = self.seconds.get("batches")
    return None if not batches or self.operations is None else self.operations / batches


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the stages of a run take.

  Attributes:
    stages: in their order.
    num_devices: local devices.
    limits: of this machine.
    process_bytes: of the host's memory that JAX and the compiled programs take.
    finished: names of stages whose results are there.
    seconds: that planning took.
    notes: sentences on the whole.
  """

  stages: tuple[StageCost, ...]
  num_devices: int
  limits: Limits
  process_bytes: int
  finished: tuple[str, ...] = ()
  seconds: float = 0.0
  notes: tuple[str, ...] = ()

  def __getitem__(self, stage: str) -> StageCost:
    return {cost.stage: cost for cost in self.stages}[stage]

  @property
  def warnings(self) -> tuple[str, ...]:
    """A sentence on everything that does not fit, with what to change."""
    left = [cost for cost in self.stages if cost.stage not in self.finished]
    return warnings_of(left, self.limits, self.num_devices, self.process_bytes)

  def table(self) -> str:
    """Aligned text: a line for each stage, then notes and warnings."""
    head = ("stage", "goes through", "FLOPs", "FLOP/s", "time", "of which compiling", "device",
            "host", "disk")  # fmt: skip
    rows = [head, *(self._row(cost) for cost in self.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      "  ".join(
        [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]
      ).rstrip()
      for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([*lines, "", *self._remarks(), *self.notes, *self._warned()])

  def as_dict(self) -> dict[str, Any]:
    """The same as plain numbers: seconds and bytes."""
    fields = dataclasses.asdict(self)
    stages = {cost.stage: dataclasses.asdict(cost) for cost in self.stages}
    for cost in self.stages:
      stages[cost.stage] |= {"total_seconds": cost.total_seconds, "operations_a_second": cost.rate}
    return fields | {"stages": list(stages.values()), "warnings": self.warnings}

  def _row(self, cost: StageCost) -> tuple[str, ...]:
    number = lambda x: "–" if x is None else f"{x:.1e}"
    duration = lambda x: "–" if x is None else clock(x)
    return (
      cost.stage + (", finished" if cost.stage in self.finished else ""),
      f"{cost.amount:,} {cost.unit}", number(cost.operations), number(cost.rate),
      duration(cost.total_seconds), duration(cost.seconds.get("compiling")),
      *(size(sum(part.values())) for part in (cost.device, cost.host, cost.disk)),
    )  # fmt: skip

  def _remarks(self) -> list[str]:
    left = [cost for cost in self.stages if cost.stage not in self.finished]
    total = added([cost.total_seconds for cost in left])
    ready = f"Finished already: {', '.join(self.finished)}. " if self.finished else ""
    return [
      f"{ready}In all {'an unknown time' if total is None else clock(total)} to go"
      f"; planning took {clock(self.seconds)}.",
      f"Memory is that of each local device ({self.num_devices} in all), and of the host besides "
      f"some {size(self.process_bytes)} for JAX and its programs. {self.limits}",
      *(f"{cost.stage}: {note}" for cost in self.stages for note in cost.notes),
    ]

  def _warned(self) -> list[str]:
    return [f"WARNING: {warning}" for warning in self.warnings]


def added(values: Iterable[float | None]) -> float | None:
  """The sum; None where a part is."""
  total = 0.0
  for value in values:
    if value is None:
      return None
    total += value
  return total
