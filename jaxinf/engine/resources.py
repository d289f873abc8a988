"""What a piece of work costs: seconds, and peak memory of host and devices."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def measured() -> Iterator[dict]:
  """Yields a dict of `seconds`, `core_seconds`, `peak_host_mib` and `peak_device_mib` afterwards.

  core_seconds are those of all threads of the process, which other work on the machine hardly
  changes. On Linux the host's peak is that of the block; elsewhere of the process so far.
  peak_device_mib, the most of any local device so far, is None where devices keep no count (CPU).
  """
  cost: dict = {}
  _reset_peak()
  began, worked = time.perf_counter(), time.process_time()
  yield cost
  cost["seconds"] = round(time.perf_counter() - began, 2)
  cost["core_seconds"] = round(time.process_time() - worked, 2)
  cost["peak_host_mib"] = round(_peak_host_mib())
  peaks = [device.memory_stats() or {} for device in jax.local_devices()]
  used = [stats["peak_bytes_in_use"] for stats in peaks if "peak_bytes_in_use" in stats]
  cost["peak_device_mib"] = round(max(used) / 2**20) if used else None


def _reset_peak() -> None:
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def _peak_host_mib() -> float:
  try:
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) / 1024
  except (OSError, ValueError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
