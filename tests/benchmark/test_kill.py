"""kill −9 in the middle of retraining a group of models: run again, it goes on from there."""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxinf import benchmark
from jaxinf.engine import artifacts
from jaxinf.runs.perform import perform
from tests.running import kill_when, run_of, start, succeed

STEPS = 100  # of all models, so that those of one seed train at once: first seed 0, then seed 1
EVERY = 10  # steps between checkpoints: 9 of them, each some 40 ms, are time enough to kill
GROUPS = [[f"{of}-seed-{k}" for of in ("full", "subset-0000", "subset-0001")] for k in (0, 1)]
FIELDS = {"train.steps": STEPS, "retrain.steps": STEPS, "retrain.num_subsets": 2}


def second_group_is_saved(unfinished: Path, last_of_first: Path) -> Callable[[], bool]:
  """Whether the first group's last model is there, and a checkpoint of the next group."""
  first: set[Path] = set()  # folders of checkpoints of the first group, which go after its models

  def happened() -> bool:
    nonlocal first
    groups = set(unfinished.glob("*"))
    if not last_of_first.exists():
      first |= groups
      return False
    return any(path.name.isdigit() for group in groups - first for path in group.glob("*"))

  return happened


def test_a_killed_group_goes_on_and_gives_the_same_models(tmp_path):
  """Bitwise those of a run that was never killed, nor saved a checkpoint."""
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  # One device, as in the processes.
  run = run_of(whole, {**FIELDS, "train.checkpoint_every": 2 * STEPS})
  perform(run, "train")
  perform(run, "sample")
  shutil.copytree(whole, killed)
  models, saving = killed / "retrain", {**FIELDS, "train.checkpoint_every": EVERY}
  manifests = [[models / name / "manifest.json" for name in group] for group in GROUPS]
  happened = second_group_is_saved(models / "unfinished", manifests[0][-1])
  kill_when(happened, start("retrain", killed, fields=saving))
  assert not any(path.exists() for path in manifests[1])
  before = [path.stat().st_mtime_ns for path in manifests[0]]
  (log,) = succeed(start("retrain", killed, fields=saving))
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
