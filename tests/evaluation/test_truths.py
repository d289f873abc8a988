"""Truths: retraining judges anyone's scores as it judged ours, and says what it cannot judge."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from setuptools import Distribution

import jaxinf
from configs import digits_mlp, digits_unet
from jaxinf.engine import artifacts
from jaxinf.evaluation import truths
from jaxinf.evaluation.lds import Retrained, lds, predictions
from jaxinf.runs.config import as_dict, typed
from jaxinf.scores.scores import Scores

ROOT = Path(__file__).parents[2]
CONFIGS = {"digits_mlp": digits_mlp, "digits_unet": digits_unet}
NUM_SUBSETS, NUM_QUERIES, NUM_TRAIN = 24, 5, 40


@pytest.fixture(scope="module")
def given():
  """Scores, and subsets of what they are of."""
  values = np.random.default_rng(0).normal(size=(1, NUM_QUERIES, NUM_TRAIN))
  query_ids = np.array([f"sample_{q}" for q in range(NUM_QUERIES)])
  scores = Scores(values, query_ids, np.array([f"image_{n}" for n in range(NUM_TRAIN)]), {})
  return scores, jaxinf.random_subsets(scores.train_ids, NUM_SUBSETS, share=0.5, seed=0)


@pytest.fixture(scope="module")
def truth(given, tmp_path_factory):
  """Written as the stage does it: models measure what the scores predict; ours are their signs."""
  scores, subsets = given
  retrained = Retrained(3 + predictions(scores, subsets)[:, None], scores.query_ids, "loss")
  ours = dataclasses.replace(scores, replicate_values=np.sign(scores.replicate_values))
  arrays = {
    "membership": np.packbits(subsets.membership, axis=1),
    "train_ids": subsets.train_ids,
    "query_ids": scores.query_ids,
    "samples": np.zeros((NUM_QUERIES, 2, 2, 1), np.float32),
    "values/loss": retrained.values,
    "predicted/000": predictions(ours, subsets).astype(np.float32),
    "params/out/bias": np.zeros(3, np.float32),
  }
  reference = {
    "name": "influence, loss", "damping": 1e-8, "best_for": ("loss",), "default": True,
    "lds": {"loss": truths.summary_of(lds(ours, subsets, retrained))},
    "cost": {"seconds": 9.0, "core_seconds": 12.3, "devices": ["cpu"]},
  }  # fmt: skip
  settings = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "train": {"steps": 4_000}}
  notes = {
    "references": [reference],
    "settings": settings | {"retrain": {"steps": 2_000}},
    "limits": {"loss": {"oracle": None, "ceiling": {"ceiling": 0.9, "interval": (0.8, 0.95)}}},
  }
  folder = tmp_path_factory.mktemp("run") / "truth"
  artifacts.write(folder, {}, arrays, notes=notes, cost={})
  return jaxinf.load_truth(folder)


def test_what_was_written_is_read(given, truth):
  scores, subsets = given
  np.testing.assert_array_equal(truth.subsets.membership, subsets.membership)
  np.testing.assert_array_equal(truth.subsets.train_ids, scores.train_ids)
  assert truth.retrained["loss"].values.shape == (NUM_SUBSETS, 1, NUM_QUERIES)
  assert list(truth.samples.ids) == list(scores.query_ids)
  assert truth.params["out"]["bias"].shape == (3,)


def test_scores_that_retraining_confirms_have_100_and_beat_ours_in_the_paired_test(given, truth):
  """And ids may come in any order."""
  scores, subsets = given
  q, n = (np.random.default_rng(1).permutation(size) for size in (NUM_QUERIES, NUM_TRAIN))
  shuffled = Scores(scores.replicate_values[:, q][..., n], scores.query_ids[q], scores.train_ids[n],
                    {})  # fmt: skip
  found = truth.evaluate(shuffled, name="mine")
  assert found.ldses[0].mean == 1 and found.standard.mean < 1
  expected = found.ldses[0].against(lds(scores, subsets, truth.retrained["loss"])).difference
  assert expected == pytest.approx(0, abs=1e-6)  # float32 resamples
  rows = [line for line in found.table().splitlines() if line.startswith("| ")]
  assert len({len(line) for line in rows}) == 1  # columns stand below each other
  first, ours, ceiling = (line.split(" | ") for line in rows[2:])
  assert first[0].strip("| ") == "**mine**" and first[2].strip() == "100.0 ± 0.0"
  test = found.ldses[0].against(truth.lds(truth.standard, "loss"))
  assert first[5].strip() == (f"{test.p_value:.3f}" if test.p_value >= 0.001 else "< 0.001")
  assert ours[0].strip("| ") == "influence, loss" and ours[6].strip(" |") == "12 core s"
  assert ceiling[2].strip() == "90.0"


def test_several_dampings_are_a_row_each(given, truth):
  scores, _ = given
  at = lambda damping, sign: dataclasses.replace(
    scores, replicate_values=sign * scores.replicate_values, settings={"damping": damping}
  )
  found = truth.evaluate(jaxinf.Sweep((at(1e-3, 1), at(1e-2, -1))), "loss")
  assert [x.mean for x in found.ldses] == [1, -1]
  rows = [line.split(" | ")[1:3] for line in found.table().splitlines() if "**yours**" in line]
  assert [[cell.strip() for cell in row] for row in rows] == [
    ["1e-03", "100.0 ± 0.0"], ["1e-02", "-100.0 ± 0.0"]
  ]  # fmt: skip


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(train_ids=np.arange(NUM_TRAIN)), "training examples are not the subsets': 40 of 40 are"),
    (dict(query_ids=np.array(list("abcde"))), "queries are not the retrained models': 5 of 5 are"),
    (
      dict(replicate_values=np.full((1, NUM_QUERIES, NUM_TRAIN), np.nan)),
      "200 of 200, such as that of training example image_0 for query sample_0",
    ),
  ],
)
def test_what_cannot_be_judged_is_refused(given, truth, change, message):
  with pytest.raises(ValueError, match=message):
    truth.evaluate(dataclasses.replace(given[0], **change))


def test_unknown_names_list_what_there_is(truth):
  with pytest.raises(ValueError, match="Unknown truth 'digit'; there are: .*digits_mlp"):
    jaxinf.load_truth("digit")
  with pytest.raises(ValueError, match="Unknown measurement of run.* 'elbo'; there are: loss"):
    truth.leaderboard("elbo")


def test_the_wheel_carries_every_file_of_a_truth(monkeypatch):
  """What setuptools would put into it, as setup.cfg says."""
  monkeypatch.chdir(ROOT)
  setup = Distribution()
  setup.parse_config_files(["setup.cfg"])
  build = setup.get_command_obj("build_py")
  build.ensure_finalized()
  (carried,) = (set(names) for package, _, _, names in build.data_files if package == "jaxinf")
  files = [path for path in (ROOT / "jaxinf" / "truths").rglob("*") if path.is_file()]
  assert files and {path.relative_to(ROOT / "jaxinf").as_posix() for path in files} <= carried


def _within(kept: dict, ours: dict) -> bool:
  """Whether all that was kept is so in our settings, to which fields may have come since."""
  same = lambda a, b: _within(a, b) if isinstance(a, dict) and isinstance(b, dict) else a == b
  return all(name in ours and same(value, ours[name]) for name, value in kept.items())


@pytest.mark.parametrize("name", jaxinf.truths())
def test_a_truth_of_the_package_is_of_the_config_of_its_name(name):
  """Subsets and settings are those of configs/, and each method has its numbers again."""
  found = jaxinf.load_truth(name)
  config, subsets = found.settings["retrain"], found.subsets
  again = jaxinf.random_subsets(
    subsets.train_ids, config["num_subsets"], share=config["share"], seed=found.settings["seed"]
  )
  np.testing.assert_array_equal(subsets.membership, again.membership)
  if name in CONFIGS:
    sections = typed(CONFIGS[name].get_config())
    for section in ("model", "train", "retrain", "curvature"):
      ours = json.loads(json.dumps(as_dict(getattr(sections, section))))
      assert _within(found.settings[section], ours), section
  for measurement in found.retrained:
    for reference in found.references[:2]:
      stored = reference.lds[measurement]
      # Predictions are kept in float32, where two of a hundred may change places.
      assert found.lds(reference, measurement).mean == pytest.approx(stored["mean"], abs=1e-3)
