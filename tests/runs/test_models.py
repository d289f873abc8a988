"""Several models of one run: each is a run with another seed, and answers are means over them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jaxinf import benchmark
from jaxinf.benchmark import retraining, scoring
from jaxinf.engine import artifacts
from jaxinf.evaluation.lds import lds
from jaxinf.planning.stages import finished_stages
from jaxinf.runs import serving
from jaxinf.runs.perform import perform
from jaxinf.runs.run import key_of, load_scores
from jaxinf.runs.stage import STAGES
from jaxinf.scores.models import mean_scores
from tests.report.parsed import Page
from tests.running import run_of

TWO = {"train.num_models": 2, "index.compression": None, "score.methods": ("influence", "pixel")}
EACH = [name for name, stage in STAGES.items() if stage.models == "each"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run of one model, up to its store."""
  run = run_of(tmp_path_factory.mktemp("run") / "work", {**TWO, "train.num_models": 1})
  for stage in ("train", "sample", "curvature", "attribute", "index", "report"):
    perform(run, stage)
  return run


@pytest.fixture(scope="module")
def both(alone):
  """The same folder with a second model, and what was written when before it came."""
  before = {path: path.stat().st_mtime_ns for path in alone.workdir.glob("*/manifest.json")}
  run = run_of(alone.workdir, TWO)
  for stage in ("all", "index"):
    perform(run, stage)
  return run, before


def test_a_second_model_extends_what_is_there(alone, both):
  run, before = both
  changed = {path.parent.name for path, at in before.items() if path.stat().st_mtime_ns != at}
  assert changed == {"report"}
  for name in EACH:
    assert key_of(run, name) == key_of(alone, name)
    assert artifacts.has_manifest(run.workdir / "models" / "1" / name)
  assert finished_stages(run, EACH) == (tuple(EACH), ())
  more = run_of(run.workdir, {**TWO, "train.num_models": 3})
  assert finished_stages(more, EACH) == ((), ())


def test_a_model_is_that_of_a_run_with_another_seed(both, tmp_path):
  """So that one which is trained already can be put in."""
  run, _ = both
  other = run_of(tmp_path, {**TWO, "train.num_models": 1, "seed": 1000})
  key = json.loads((run.workdir / "models/1/train/manifest.json").read_text())["key"]
  assert key == artifacts.plain(key_of(other, "train")) and key["seed"] == 1000
  shutil.copytree(run.workdir / "models/1/train", other.folder("train"))
  shutil.copytree(run.workdir / "models/1/curvature", other.folder("curvature"))
  for stage in ("train", "curvature"):
    perform(other, stage)  # reused: of other settings it would be refused
  first, second = (artifacts.read(m.folder("train")).arrays for m in run.each_model())
  assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_scores_are_means_that_know_their_models(alone, both):
  run, _ = both
  models = [load_scores(model) for model in run.each_model()]
  np.testing.assert_array_equal(models[0].replicate_values, load_scores(alone).replicate_values)
  found = load_scores(run)
  expected = mean_scores(models)
  np.testing.assert_array_equal(found.replicate_values, expected.replicate_values)
  np.testing.assert_array_equal(found.model_values, [x.values for x in models])
  assert found.settings["num_models"] == 2 and (found.model_std_errors > 0).all()


def test_the_report_says_what_survives_another_training_run(alone, both):
  run, _ = both
  text = Page((run.folder("report") / "index.html").read_text()).text
  assert "The scores are means over 2 models" in text and "survive a new training run" in text
  best = load_scores(run).top(1)
  assert str(best.ids[0, 0]) in text and " models ± " in text
  assert "train, model 1" in text


def test_the_store_answers_with_means_over_models(both, tmp_path):
  run, _ = both
  samples = artifacts.read(run.folder("sample")).arrays["images"][:2]
  pixels = np.rint((np.clip(samples, -1, 1) + 1) * 127.5).astype(np.uint8)
  np.savez(tmp_path / "new.npz", images=pixels, ids=np.array(["x", "y"]))
  shutil.copytree(run.workdir, tmp_path / "work")
  asked = dataclasses.replace(run, workdir=tmp_path / "work", images=tmp_path / "new.npz")
  found = serving.query(asked).arrays
  images = serving._given_images(asked)
  stores = serving.opened_stores(asked)
  each = [store.query(**serving._question(model, store, images)) for model, store in stores]
  expected = mean_scores(each).top(3)
  np.testing.assert_array_equal(found["ids"], expected.ids)
  np.testing.assert_array_equal(found["model_std_errors"], expected.model_std_errors)
  # An append that was stopped between two stores goes on with the second.
  first = dataclasses.replace(asked.each_model()[0], images=asked.images)
  serving.append(first)
  assert [len(store) for _, store in serving.opened_stores(asked)] == [26, 24]
  serving.append(asked)
  assert [len(store) for _, store in serving.opened_stores(asked)] == [26, 26]
  with pytest.raises(ValueError, match="2 of 2 ids are in the store already"):
    serving.append(asked)
  serving.delete(dataclasses.replace(asked, ids=("x", "y")))
  assert [len(store) for _, store in serving.opened_stores(asked)] == [24, 24]


def test_tables_have_a_column_for_every_number_of_models(both, capsys):
  run, _ = both
  for stage in ("retrain", "measure", "evaluate"):
    perform(run, stage)
  shown = capsys.readouterr().out
  assert " 2 models  " in shown and " 2 models, × 0.5" in shown
  rows = {row.name: row for row in scoring.rows_of(run)}
  tables = artifacts.read(run.folder("evaluate")).notes["tables"]
  entries = {entry["name"]: entry for entry in tables["loss"]["entries"]}
  names = ["as they are", "negative × 0.5"]
  assert list(entries["pixel"]["readouts"]) == names
  readouts = entries["influence, loss"]["readouts"]
  assert list(readouts) == [*names, "2 models", "2 models, × 0.5"]
  row, truth = rows["influence, loss"], benchmark.measuring.retrained(run, "loss")
  sweeps = [scoring.scored(model, row) for model in run.each_model()]
  mean = mean_scores([sweep.at(1e-8) for sweep in sweeps])
  for name, weight in (("2 models", 1.0), ("2 models, × 0.5", 0.5)):
    found = lds(mean, retraining.subsets_of(run), truth, negative_weight=weight, num_resamples=2)
    assert readouts[name]["default"]["mean"] == pytest.approx(found.mean, abs=1e-12)
  assert not (run.workdir / "models" / "1" / "score" / "pixel").exists()


def test_seeds_of_models_and_of_retrained_ones_are_apart(tmp_path):
  fields = {"retrain.num_seeds": 1000, "retrain.num_subsets": 2}
  with pytest.raises(ValueError, match="num_seeds must be below 1000"):
    retraining.subset_specs(run_of(tmp_path, {**fields, **TWO}))
  with pytest.raises(ValueError, match=r"train\.num_models"):
    run_of(tmp_path, {"train.num_models": 0}).each_model()
