"""What is said of a workdir, and what is removed from it: results by hand, whose state is known."""

import json
import os
import subprocess
import time

import numpy as np
import pytest

from jaxinf.benchmark.retraining import model_key, subset_specs
from jaxinf.engine import artifacts, working
from jaxinf.runs.cleaning import clean
from jaxinf.runs.config import typed
from jaxinf.runs.run import key_of
from jaxinf.runs.status import found_in, status
from tests import tiny
from tests.running import run_of

LONG_AGO = time.time() - 86_400


def finish(folder, value=0.0, key=None):
  """A finished result of one number; returns its content hash."""
  artifacts.begin(folder, key or {})
  arrays = {"value": np.array(value)}
  return artifacts.write(folder, key or {}, arrays, notes={}, cost={"seconds": 90.0}).content


def begin(folder, process=None):
  """A result that has begun: by a process that lives, unless another is given."""
  artifacts.begin(folder, {"train": {"steps": 4000}})
  if process is not None:
    place = folder / "started.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"process": process}))


def age(folder, seconds=LONG_AGO):
  for path in (folder, *folder.rglob("*")):
    os.utime(path, (seconds, seconds))


def states(workdir, config=None):
  return {str(f.folder.relative_to(workdir)): f.state for f in found_in(workdir, config)}


@pytest.fixture
def line(tmp_path):
  """A finished line from train to attribute, and a second model's curvature."""
  train = finish(tmp_path / "train")
  content = {"train_content": train}
  content["sample_content"] = finish(tmp_path / "sample", key=content)
  own = finish(tmp_path / "curvature", 1.0, content)
  finish(tmp_path / "attribute", key=content | {"curvature_content": own})
  other = finish(tmp_path / "models" / "1" / "train", 2.0)
  finish(tmp_path / "models" / "1" / "curvature", key={"train_content": other})
  return tmp_path


def test_a_line_whose_inputs_are_as_they_were_is_finished(line):
  found = states(line)
  assert set(found.values()) == {"finished"}
  assert list(found) == [
    "models/1/train", "train", "sample", "curvature", "models/1/curvature", "attribute"
  ]  # fmt: skip
  text = status(workdir=line, config=None)
  assert "finished" in text and "1 min 30 s" in text and "stale" not in text


def test_what_was_made_of_an_input_that_is_another_now_is_stale_and_so_is_what_was_made_of_it(line):
  before = artifacts.read_manifest(line / "curvature")
  now = finish(line / "curvature", 5.0, before["key"])
  found = {str(f.folder.relative_to(line)): f for f in found_in(line)}
  changed = f"its curvature was made anew: {before['content']} → {now}"
  assert found["attribute"].state == "stale" and found["attribute"].why == (changed,)
  assert [name for name, f in found.items() if f.state == "stale"] == ["attribute"]
  finish(line / "train", 3.0)
  stale = {str(f.folder.relative_to(line)): f.why for f in found_in(line) if f.state == "stale"}
  assert set(stale) == {"sample", "curvature", "attribute"}  # the other model has its own
  assert "its curvature is stale" in stale["attribute"]
  assert "attribute: stale" in status(workdir=line, config=None)


def test_a_config_says_what_it_would_change(tmp_path):
  config, run = tiny.get_config(), run_of(tmp_path)
  finish(run.folder("train"), key=key_of(run, "train"))
  for spec in subset_specs(run)[2:4]:
    finish(run.folder("retrain") / spec.name, key=model_key(run, spec))
  assert set(states(tmp_path, typed(config)).values()) == {"finished"}
  config.retrain.steps = 11
  text = status(workdir=tmp_path, config=typed(config))
  assert "2 stale" in text and "and 1 more: stale, steps: 10 → 11" in text.replace("retrain.", "")
  config.train.learning_rate, config.train.steps = 0.5, 30
  text = status(workdir=tmp_path, config=typed(config))
  assert "train: stale\n  train.steps: 20 → 30\n  train.learning_rate: 0.001 → 0.5" in text


def test_what_has_begun_is_running_where_its_process_lives(tmp_path):
  gone = subprocess.Popen(["true"])
  gone.wait()
  here = working.this_process()
  begin(tmp_path / "train")
  begin(tmp_path / "curvature", here | {"id": gone.pid})
  begin(tmp_path / "index", here | {"time": 0.0})  # its number is another process's by now
  begin(tmp_path / "sample", here | {"host": "elsewhere"})  # not known: it wrote a moment ago
  (tmp_path / "train" / "metrics.jsonl").write_text('{"step": 500, "loss": 1}\n{"step": 1')
  running = {"train": "running", "sample": "running"}
  assert states(tmp_path) == running | {"curvature": "unfinished", "index": "unfinished"}
  text = status(workdir=tmp_path, config=None)
  assert "train: running\n  step 500 of 4,000\n  process" in text
  age(tmp_path / "sample")
  assert states(tmp_path)["sample"] == "unfinished"


def test_json_holds_what_the_text_says(line):
  begin(line / "index")
  found = json.loads(status(workdir=line, config=None, json=True))
  stages = {stage["folder"]: stage for stage in found["stages"]}
  (index,) = stages["index"]["results"]
  assert index["state"] == "running" and index["seconds"] is None
  assert stages["train"]["results"][0]["seconds"] == 90.0
  files = [path for path in line.rglob("*") if path.is_file()]
  assert found["bytes"] == sum(path.stat().st_size for path in files)
  assert sum(stage["bytes"] for stage in stages.values()) == found["bytes"]


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
  for folder, said in ((tmp_path, "holds nothing of a run"), (tmp_path / "no", "is no folder")):
    with pytest.raises(ValueError, match=said):
      status(workdir=folder, config=None)
    with pytest.raises(ValueError, match=said):
      clean(workdir=folder, config=None)


@pytest.fixture
def untidy(line):
  """The line with what should go and what should stay beside it; the names of what should go."""
  begin(line / "index", {"host": "elsewhere", "id": 1, "time": 0.0})
  (line / "index" / "store").mkdir()
  (line / "train" / "checkpoints" / "500").mkdir(parents=True)
  (line / "curvature" / "sums").mkdir()
  (line / "curvature" / "arrays.partial.npz").write_bytes(b"half")
  (line / "retrain" / "unfinished" / "abc").mkdir(parents=True)
  finish(line / "retrain" / "full-seed-0")
  (line / ".jaxinf-plan-7").mkdir()
  (line / "train" / "metrics.jsonl").write_text("")
  (line / "notes.txt").write_text("mine")
  (line / "pictures").mkdir()
  (line / "study").symlink_to(line / "pictures")
  age(line)
  begin(line / "self-influence")  # at work now
  return line


GOES = {
  "index", "train/checkpoints", "curvature/sums", "curvature/arrays.partial.npz",
  "retrain/unfinished", ".jaxinf-plan-7",
}  # fmt: skip


def tree(workdir):
  return {str(path.relative_to(workdir)) for path in workdir.rglob("*")}


def test_unfinished_work_and_what_is_left_of_finished_work_goes_and_all_else_stays(untidy):
  before = tree(untidy)
  listed = clean(workdir=untidy, config=None, dry_run=True)
  assert tree(untidy) == before and "would be removed" in listed
  removed = clean(workdir=untidy, config=None)
  assert before - tree(untidy) == {
    n for n in before if any(f"{n}/".startswith(f"{g}/") for g in GOES)
  }
  assert removed == listed.replace("would be removed", "removed")
  assert {line.split(" (")[0].strip() for line in removed.splitlines()[1:-1]} == GOES
  assert "Running, and left alone: self-influence." in removed
  assert clean(workdir=untidy, config=None).startswith(f"{untidy}: 0.0 KiB removed")


def test_stale_results_go_where_that_is_asked_for_and_what_lies_within_them_stays(line):
  finish(line / "curvature", 5.0, artifacts.read_manifest(line / "curvature")["key"])
  clean(workdir=line, config=None)
  assert (line / "attribute" / "manifest.json").exists()
  finish(line / "attribute" / "inner")  # as counterfactual has its models below it
  clean(workdir=line, config=None, stale=True)
  assert tree(line / "attribute") == {
    "inner", "inner/arrays.npz", "inner/manifest.json", "inner/started.json"
  }  # fmt: skip
  assert set(states(line)) == {
    "models/1/train", "train", "sample", "curvature", "models/1/curvature", "attribute/inner"
  }  # fmt: skip
