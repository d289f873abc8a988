"""What this machine has, and what of a plan does not fit."""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bytes that there are.

  Attributes:
    device: of each device; None where it takes the host's memory (CPU), or keeps no count.
    host: of the host's memory; None where not known.
    disk: that are free, and may be taken.
  """

  device: int | None
  host: int | None
  disk: int | None

  def __str__(self) -> str:
    parts = (("device memory", self.device), ("host memory", self.host), ("free disk", self.disk))
    known = [f"{size(value)} of {what}" for what, value in parts if value is not None]
    return f"There are {', '.join(known)}."


class Costly(Protocol):
  """A `StageCost`."""

  @property
  def stage(self) -> str: ...
  @property
  def device(self) -> Mapping[str, int]: ...
  @property
  def host(self) -> Mapping[str, int]: ...
  @property
  def disk(self) -> Mapping[str, int]: ...


# (place, what takes most there) → what to change.
_REMEDIES = {
  ("device", "workspace"): "lower {section}.batch_size",
  ("device", "images"): "lower {section}.batch_size",
  ("device", "gradients"): "lower {section}.batch_size or raise {section}.replicates",
  ("device", "rows of queries"): "lower attribute.query_chunk",
  ("device", "sums"): "raise curvature.partitions",
  ("device", "rotations"): "raise curvature.partitions, or skip large layers by curvature.skip",
  ("host", "images"): "lower data.num_examples or sample.num_samples",
  ("host", "rows of queries"): "lower attribute.query_replicates or sample.num_samples, or take "
  "attribute.compression='int4'",
  ("host", "scores"): "lower attribute.replicates, attribute.query_replicates or "
  "sample.num_samples",
  ("host", "eigenbases"): "name large layers in curvature.diagonal or curvature.skip",
  ("disk", "rows"): "take index.compression='int4' or index.replicates=1",
  ("disk", "scores"): "lower attribute.replicates or sample.num_samples",
  ("disk", "eigenbases"): "name large layers in curvature.diagonal or curvature.skip",
  ("disk", "images"): "set sample.keep_trajectory=False or lower sample.num_samples",
}  # fmt: skip
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_SMALLER = "choose a smaller network (model)"


def limits_here(folder: Path, devices: Sequence[jax.Device], reserve: int = 0) -> Limits:
  """The limits of this machine; `reserve` bytes of the folder's disk are to stay free."""
  stats = [device.memory_stats() or {} for device in devices]
  known = [s["bytes_limit"] for s in stats if s.get("bytes_limit")]
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  return Limits(min(known, default=None), _host_bytes(), max(0, free - reserve))


def warnings_of(
  costs: Sequence[Costly], limits: Limits, num_devices: int, process_bytes: int
) -> tuple[str, ...]:
  """A sentence on everything that does not fit, with what to change.

  Where devices have no limit of their own, all their bytes count as the host's.
  """
  found = []
  for cost in costs:
    host = dict(cost.host)
    if limits.device is None:
      for name, value in cost.device.items():
        host[name] = host.get(name, 0) + num_devices * value
    elif (needed := sum(cost.device.values())) > limits.device:
      found.append(
        _warning(cost.stage, "device", "each device", cost.device, needed, limits.device)
      )
    if limits.host is not None and (needed := sum(host.values()) + process_bytes) > limits.host:
      found.append(_warning(cost.stage, "host", "the host", host, needed, limits.host))
  disk: dict[str, int] = {}
  for cost in costs:
    for name, value in cost.disk.items():
      disk[name] = disk.get(name, 0) + value
  if limits.disk is not None and (needed := sum(disk.values())) > limits.disk:
    found.append(_warning("run", "disk", "the disk", disk, needed, limits.disk))
  return tuple(found)


def size(num: float) -> str:
  """Bytes in KiB, MiB or GiB."""
  unit, name = next((u for u in _UNITS if num >= u[0]), _UNITS[-1])
  return f"{num / unit:,.1f} {name}"


def _warning(
  stage: str, place: str, where: str, parts: Mapping[str, int], needed: int, limit: int
) -> str:
  largest = _largest(parts)
  places: Iterable[str] = (place, "device") if place == "host" else (place,)
  remedy = next((_REMEDIES[p, largest] for p in places if (p, largest) in _REMEDIES), _SMALLER)
  return (
    f"{stage} takes {size(needed)} of {where}, where {size(limit)} are; most are {largest} "
    f"({size(parts[largest])}): {remedy.format(section=stage)}."
  )


def _largest(parts: Mapping[str, int]) -> str:
  return max(parts, key=lambda name: parts[name])


def _host_bytes() -> int | None:
  """The host's memory, or the part of it that a container may take."""
  try:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError):
    return None
  try:
    return min(total, int(_CGROUP.read_text()))
  except (ValueError, OSError):  # "max", or no such file
    return total
