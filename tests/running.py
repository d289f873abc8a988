"""Tiny runs as tests have them: in this process, in others, and in others that are killed."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinf.runs.config import typed
from jaxinf.runs.run import Run
from tests import tiny

ROOT = Path(__file__).parents[1]
DEADLINE = 300  # seconds for a process that takes ten


def run_of(
  workdir: Path, fields: Mapping[str, Any] | None = None, num_devices: int = 1, **given: Any
) -> Run:
  """The run of tests/tiny.py in a folder.

  Args:
    workdir: of its artefacts.
    fields: of the config that differ, by path, such as "train.steps".
    num_devices: it computes on the first of them.
    given: further fields of Run.
  """
  config = tiny.get_config()
  config.update_from_flattened_dict(dict(fields or {}))
  devices = jax.local_devices()[:num_devices]
  return Run(typed(config), workdir, **{"devices": devices, **given})


def start(
  stage: str,
  workdir: Path,
  *arguments: str,
  fields: Mapping[str, Any] | None = None,
  variables: Mapping[str, str] | None = None,
  program: Sequence[str] = ("-m", "jaxinf"),
) -> "Process":
  """The command of a stage, of the config in tests/tiny.py, in a process of its own.

  Args:
    stage, workdir: what it does, and where.
    arguments: further ones.
    fields: of the config, by path.
    variables: of its environment, beside ours.
    program: what Python runs.
  """
  command = [sys.executable, *program, stage, "--config=tests/tiny.py"]
  command += [f"--workdir={workdir}", *arguments]
  command += [f"--config.{path}={value}" for path, value in (fields or {}).items()]
  environment = os.environ | dict(variables or {})
  return Process(command, environment)


class Process(subprocess.Popen):
  """A process that logs to a file: while it is waited for nobody reads a pipe, which would fill."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
    super().__init__(command, cwd=ROOT, env=environment, stderr=self._log, text=True)

  def said(self) -> str:
    """What it logged, after its end."""
    self.wait()
    self._log.seek(0)
    return self._log.read()


def outcome(process: Process) -> str:
  """What it logged; a process that does not end within DEADLINE is killed, and the test fails."""
  try:
    process.wait(timeout=DEADLINE)
  except subprocess.TimeoutExpired:
    process.kill()
    pytest.fail(f"it did not end in time: {process.said()}")
  return process.said()


def succeed(*processes: Process) -> list[str]:
  """What they logged, after the last has ended; the test fails where one did not succeed."""
  said = [outcome(process) for process in processes]
  assert all(process.returncode == 0 for process in processes), said
  return said


def kill_when(ready: Callable[[], bool], *processes: Process) -> None:
  """Kills them all as kill −9 does, once that is so, which must be before one of them ends."""
  deadline, failure = time.monotonic() + DEADLINE, ""
  while not failure and not ready():
    if time.monotonic() > deadline:
      failure = "not ready in time"
    if any(process.poll() is not None for process in processes):
      failure = "ended before it could be killed"
    time.sleep(0.001)
  for process in processes:
    process.kill()
  said = [process.said() for process in processes]
  if failure:
    pytest.fail(f"{failure}: {said}")
