"""kill −9 in the middle of a fit: run again, it goes on from its last saved sums."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxinf.engine import artifacts
from jaxinf.runs.perform import perform
from tests.running import kill_when, run_of, start, succeed

FIELDS = {
  "curvature.draws": 40,
  "curvature.batch_size": 4,
  "curvature.kind": "ekfac",
  "curvature.checkpoint_every": 1,
}


def written_twice(file: Path) -> Callable[[], bool]:
  versions: set[int] = set()

  def happened() -> bool:
    if file.exists():
      versions.add(file.stat().st_mtime_ns)
    return len(versions) == 2

  return happened


def test_a_killed_fit_goes_on_and_gives_the_same_curvature(tmp_path):
  """Killed in the first pass, and again in the second: bitwise the same eigenbases."""
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  run = run_of(whole, FIELDS)  # one device, as in the processes
  perform(run, "train")
  shutil.copytree(whole, killed)
  sums = killed / "curvature" / "sums"
  for name in ("curvature.npz", "eigenvalues.npz"):
    kill_when(written_twice(sums / name), start("curvature", killed, fields=FIELDS))
  assert not (killed / "curvature" / "manifest.json").exists()
  (log,) = succeed(start("curvature", killed, fields=FIELDS))
  again = re.search(r"^curvature: \d+ of 960 pairs", log, re.M)
  assert not again, "the first pass is not redone"
  assert not sums.exists()
  perform(run, "curvature")
  ours, theirs = (artifacts.read(w / "curvature").arrays for w in (killed, whole))
  assert ours.keys() == theirs.keys()
  for name, expected in theirs.items():
    np.testing.assert_array_equal(ours[name], expected)
