"""kill −9 in the middle of a fit: run again, it goes on from its last saved sums."""

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

from jaxinf.engine import artifacts
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed
from jaxinf.runs.perform import perform
from tests import tiny

ROOT = Path(__file__).parents[2]
CURVATURE = {"draws": 100, "batch_size": 4, "method": "ekfac", "checkpoint_every": 1}


def start(workdir: Path) -> subprocess.Popen:
  fields = [f"--config.curvature.{name}={value}" for name, value in CURVATURE.items()]
  command = [sys.executable, "-m", "jaxinf", "curvature", "--config=tests/tiny.py"]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *fields], cwd=ROOT, stderr=subprocess.PIPE, text=True
  )


def kill_when(workdir: Path, written: Path) -> None:
  """Starts the fit, and kills it once the file has been written twice."""
  process = start(workdir)
  versions: set[int] = set()
  while len(versions) < 2:
    assert process.poll() is None, f"the fit ended before it could be killed: {process.stderr}"
    if written.exists():
      versions.add(written.stat().st_mtime_ns)
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_fit_goes_on_and_gives_the_same_curvature(tmp_path):
  """Killed in the first pass, and again in the second: bitwise the same eigenbases."""
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  config = tiny.get_config()
  config.curvature.update(CURVATURE)
  run = runs.Run(typed(config), whole, jax.devices()[:1])  # one device, as in the processes
  perform(run, "train")
  shutil.copytree(whole, killed)
  sums = killed / "curvature" / "sums"
  kill_when(killed, sums / "curvature.npz")
  kill_when(killed, sums / "eigenvalues.npz")
  assert not (killed / "curvature" / "manifest.json").exists()
  process = start(killed)
  _, log = process.communicate()
  assert process.returncode == 0, log
  assert not re.search(r"^curvature: \d+ of 2,?400 pairs", log, re.M), (
    "the first pass is not redone"
  )
  assert not sums.exists()
  perform(run, "curvature")
  ours, theirs = (artifacts.read(w / "curvature").arrays for w in (killed, whole))
  assert ours.keys() == theirs.keys()
  for name, expected in theirs.items():
    np.testing.assert_array_equal(ours[name], expected)
