"""Which process is at work on a folder: what it leaves there of itself, and whether it lives."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROC = Path("/proc")  # of Linux


def this_process() -> dict[str, Any]:
  """Host and number of this process, and the time, in seconds since 1970."""
  return {"host": socket.gethostname(), "id": os.getpid(), "time": round(time.time(), 1)}


def is_alive(process: Mapping[str, Any]) -> bool | None:
  """Whether a process lives that left `this_process()`; None where it was on another host.

  Where another process has its number by now, which Linux tells, it does not.
  """
  if process["host"] != socket.gethostname():
    return None
  try:
    os.kill(process["id"], 0)  # sends nothing
  except ProcessLookupError:
    return False
  except PermissionError:  # of another user
    pass
  born = _born(process["id"])
  return born is None or born <= process["time"] + 1


def _born(number: int) -> float | None:
  """When the process of that number began, in seconds since 1970; None where not known."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    (boot,) = re.findall(r"^btime (\d+)$", (_PROC / "stat").read_text(), re.MULTILINE)
    return int(boot) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
  return None
