"""Tiny runs as tests have them: in this process, in others, and in others that are killed."""

import os
import subprocess
import sys
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
) -> subprocess.Popen:
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
  return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> str:
  """What it logged; a process that does not end within DEADLINE is killed, and the test fails."""
  try:
    return process.communicate(timeout=DEADLINE)[1]
  except subprocess.TimeoutExpired:
    process.kill()
    pytest.fail(f"it did not end in time: {process.communicate()[1]}")


def succeed(*processes: subprocess.Popen) -> list[str]:
  """What they logged, after the last has ended; the test fails where one did not succeed."""
  said = [outcome(process) for process in processes]
  assert all(process.returncode == 0 for process in processes), said
  return said


def kill_when(ready: Callable[[], bool], *processes: subprocess.Popen) -> None:
  """Kills them all as kill −9 does, once that is so, which must be before one of them ends."""
  deadline = time.monotonic() + DEADLINE
  while not ready():
    late = time.monotonic() > deadline
    if late or any(process.poll() is not None for process in processes):
      for process in processes:
        process.kill()
      said = [process.communicate()[1] for process in processes]
      pytest.fail(f"{'not ready in time' if late else 'ended before it could be killed'}: {said}")
    time.sleep(0.001)
  for process in processes:
    process.kill()
  for process in processes:
    process.communicate()
