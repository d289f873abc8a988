"""kill −9 in the middle of retraining a group of models: run again, it goes on from there."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinf import benchmark
from jaxinf.engine import artifacts
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed
from jaxinf.runs.perform import perform
from tests import tiny

ROOT = Path(__file__).parents[2]
STEPS = 100  # of all models, so that those of one seed train at once: first seed 0, then seed 1
EVERY = 10  # steps between checkpoints: 9 of them, each some 40 ms, are time enough to kill
GROUPS = [[f"{of}-seed-{k}" for of in ("full", "subset-0000", "subset-0001")] for k in (0, 1)]
DEADLINE = 300  # seconds for a process that takes ten
FIELDS = {"train.steps": STEPS, "retrain.steps": STEPS, "retrain.num_subsets": 2}


def start(workdir: Path) -> subprocess.Popen:
  fields = {**FIELDS, "train.checkpoint_every": EVERY}.items()
  command = [sys.executable, "-m", "jaxinf", "retrain", "--config=tests/tiny.py"]
  command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields)]
  return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> str:
  """What it logged; a process that does not end within DEADLINE is killed, and the test fails."""
  try:
    return process.communicate(timeout=DEADLINE)[1]
  except subprocess.TimeoutExpired:
    process.kill()
    pytest.fail(f"it did not end in time: {process.communicate()[1]}")


def kill_in_the_second_group(workdir: Path, finished: Path) -> None:
  """Starts retraining, and kills it once `finished` is there and the next group's checkpoint."""
  process = start(workdir)
  first: set[Path] = set()  # folders of checkpoints of the first group, which go after its models
  deadline = time.monotonic() + DEADLINE
  while True:
    groups = set((workdir / "retrain" / "unfinished").glob("*"))
    if not finished.exists():
      first |= groups
    elif any(path.name.isdigit() for group in groups - first for path in group.glob("*")):
      break
    if time.monotonic() > deadline:
      process.kill()
      pytest.fail(f"no second group in time: {process.communicate()[1]}")
    assert process.poll() is None, f"it ended before it could be killed: {process.stderr.read()}"
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_group_goes_on_and_gives_the_same_models(tmp_path):
  """Bitwise those of a run that was never killed, nor saved a checkpoint."""
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  config = tiny.get_config()
  config.update_from_flattened_dict({**FIELDS, "train.checkpoint_every": 2 * STEPS})
  run = runs.Run(typed(config), whole, jax.devices()[:1])  # one device, as in the processes
  perform(run, "train")
  perform(run, "sample")
  shutil.copytree(whole, killed)
  models = killed / "retrain"
  manifests = [[models / name / "manifest.json" for name in group] for group in GROUPS]
  kill_in_the_second_group(killed, manifests[0][-1])
  assert not any(path.exists() for path in manifests[1])
  before = [path.stat().st_mtime_ns for path in manifests[0]]
  process = start(killed)
  log = outcome(process)
  assert process.returncode == 0, log
  resumed = re.search(r"^retrain: resuming a group of 3 models at step (\d+)$", log, re.M)
  assert resumed and EVERY <= int(resumed[1]) < STEPS, log
  assert [path.stat().st_mtime_ns for path in manifests[0]] == before, "they are not redone"
  assert not list((models / "unfinished").glob("*"))
  benchmark.retrain(run)
  for name in itertools.chain(*GROUPS):
    ours, theirs = (artifacts.read(w / "retrain" / name).arrays for w in (killed, whole))
    assert ours.keys() == theirs.keys()
    for part, expected in theirs.items():
      np.testing.assert_array_equal(ours[part], expected)
