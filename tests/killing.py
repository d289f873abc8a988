"""Killing processes of jaxinf in the middle of their work, to see that the next goes on from there.

`Killed` stands in for a kill where the test itself stops at a place of its choice.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE = 300  # seconds for what takes ten

needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")


class Killed(BaseException):
  """What no `except Exception` holds up, as with a kill."""


def start(
  stage: str,
  workdir: Path,
  changes: Mapping[str, Any],
  program: Sequence[str] = ("-m", "jaxinf"),
) -> subprocess.Popen:
  """A stage of the tiny run, under way in a process of its own; changes are of the config."""
  command = [sys.executable, *program, stage, "--config=tests/tiny.py", f"--workdir={workdir}"]
  fields = [f"--config.{path}={value}" for path, value in changes.items()]
  return subprocess.Popen([*command, *fields], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill_once(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
  """Kills the process as soon as something has happened; the test fails where it ends before."""
  deadline = time.monotonic() + DEADLINE
  while not happened():
    if process.poll() is not None:
      pytest.fail(f"it ended before it could be killed: {process.communicate()[1]}")
    if time.monotonic() > deadline:
      process.kill()
      pytest.fail(f"what was waited for did not happen: {process.communicate()[1]}")
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


def finished(process: subprocess.Popen) -> str:
  """What a process logged that ends well; the test fails where it does not."""
  try:
    log = process.communicate(timeout=DEADLINE)[1]
  except subprocess.TimeoutExpired:
    process.kill()
    pytest.fail(f"it did not end in time: {process.communicate()[1]}")
  assert process.returncode == 0, log
  return log
