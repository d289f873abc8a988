"""What is found in a folder: scores at all dampings, of all models, of these images and samples."""

import dataclasses
import json

import numpy as np
import pytest

from jaxinf.engine import artifacts
from jaxinf.explorer.findings import findings_of
from jaxinf.runs.run import scores_arrays
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Scores
from tests.running import run_of

DAMPINGS = (1e-4, 1e-2, 1e-6)  # the first is attribute.damping
IDS = np.array(["sample_0000", "sample_0001"])


def write(folder, key, arrays, **notes) -> str:
  return artifacts.write(folder, key, arrays, notes=notes, cost={}).content


def scores_at(run, damping) -> Scores:
  rng = np.random.default_rng([run.seed, int(1e7 * damping)])
  values = lambda num: rng.normal(size=(num, 2, len(run.dataset))).astype(np.float32)
  settings = {"measurement": "loss", "method": "kfac", "damping": damping, "draws": 4}
  return Scores(values(3), IDS, run.dataset.ids, settings, values(2), run.dataset.labels)


@pytest.fixture
def run(tmp_path):
  """A run of two models, as its stages leave it; no stage is done."""
  run = run_of(tmp_path / "work", {"train.num_models": 2})
  data = {"content": run.data_content}
  images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
  content = write(run.folder("sample"), {}, {"ids": IDS, "images": images})
  for model in run.each_model():
    first, *others = (scores_at(model, damping) for damping in DAMPINGS)
    arrays = scores_arrays(first)
    for scores in others:
      arrays |= scores_arrays(scores, f"damping-{scores.settings['damping']:e}/")
    key = {"attribute": {"sweep": DAMPINGS[1:]}, "data": data, "sample_content": content}
    write(model.folder("attribute"), key, arrays, settings=first.settings)
  values = np.stack([scores_at(run, damping).values for damping in DAMPINGS])
  arrays = {"values": values, "query_ids": IDS, "train_ids": run.dataset.ids}
  said = [{"measurement": "loss", "damping": damping} for damping in DAMPINGS]
  for name, measurement in (("trak", "loss"), ("das", None), ("influence", "loss")):
    method = {"method": name, "measurement": measurement}
    key = method | {"data": data, "sample_content": content}
    write(run.folder("score") / name, key, arrays, settings=said)
  write(run.folder("score") / "curvature-ekfac", {"data": data}, {"q_in": np.eye(2)})
  return run


def test_scores_are_means_over_models_at_each_damping(run):
  found = findings_of(run)
  assert found.source("attribute").dampings == DAMPINGS
  for place, damping in enumerate(DAMPINGS):
    expected = mean_scores([scores_at(model, damping) for model in run.each_model()])
    shown = found.scores("attribute", place)
    assert shown.settings["damping"] == damping
    for name in ("values", "std_errors", "model_std_errors"):
      np.testing.assert_array_equal(getattr(shown, name), getattr(expected, name))


def test_methods_come_in_their_order_and_at_their_default(run):
  found = findings_of(run)
  assert list(found.sources) == ["attribute", "score/influence", "score/trak", "score/das"]
  assert [source.title for source in found.sources.values()][1:] == [
    "influence, loss", "trak, loss", "das"
  ]  # fmt: skip
  np.testing.assert_array_equal(
    found.scores("score/trak", 2).values, scores_at(run, DAMPINGS[2]).values
  )


def test_other_samples_or_images_are_refused(run, caplog):
  arrays = dict(artifacts.read(run.folder("sample")).arrays)
  write(run.folder("sample"), {}, arrays | {"images": -arrays["images"]})
  with pytest.raises(ValueError, match="attribute is of other samples than those in .*sample"):
    findings_of(run)
  other = run_of(run.workdir, {"train.num_models": 2, "data.num_examples": 20})
  with pytest.raises(ValueError, match="other training images than config.data names"):
    findings_of(other)


def test_a_method_of_other_samples_is_left_out_with_a_warning(run, caplog):
  path = run.folder("score") / "trak" / "manifest.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps({**manifest, "key": {**manifest["key"], "sample_content": "x"}}))
  assert "score/trak" not in findings_of(run).sources
  assert "trak is of other samples" in caplog.text


def test_an_empty_folder_says_what_to_run(run, tmp_path):
  empty = dataclasses.replace(run, workdir=tmp_path / "none")
  with pytest.raises(ValueError, match="neither scores nor a store to explore: run the stage all"):
    findings_of(empty)
