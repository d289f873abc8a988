"""Whole runs in seconds: stages on one and two devices, reuse, refusal, and what is written."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from jaxinf import artifacts, runs, stages
from jaxinf.config import typed

# Of the largest number: training and sampling amplify float32 rounding, and where that moves a
# number across the middle between two int8 steps, it moves by 1/127 of its block.
TOLERANCE = {"train": 1e-3, "sample": 1e-3, "curvature": 1e-3, "attribute": 5e-3}


def tiny_config() -> ConfigDict:
  """A multilayer perceptron on 24 digits, with a schedule of 20 timesteps."""
  config = digits.get_config()
  config.data.num_examples = 24
  config.model = ConfigDict({"name": "mlp", "hidden": (8,), "time_features": 4})
  config.diffusion.num_steps = 20
  config.train.steps = 20
  config.train.warmup_steps = 2
  config.train.batch_size = 10
  config.train.checkpoint_every = 10
  config.train.log_every = 5
  config.sample.num_samples = 3
  config.sample.keep_trajectory = True
  config.curvature.draws = 3
  config.curvature.skip = ()
  config.attribute.draws = 4
  config.attribute.draw_groups = 2
  config.attribute.damping = 1e-4
  config.report.num_queries = 2
  config.report.top_k = 3
  return config


def run_of(workdir, config=None, devices=None) -> runs.Run:
  return runs.Run(typed(tiny_config() if config is None else config), workdir, devices)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run on one device."""
  run = run_of(tmp_path_factory.mktemp("run") / "work", devices=jax.devices()[:1])
  stages.STAGES["all"](run)
  return run


def test_two_devices_give_the_same_results_in_every_stage(finished, tmp_path):
  both = run_of(tmp_path, devices=jax.devices()[:2])
  stages.STAGES["all"](both)
  for stage in ("train", "sample", "attribute"):
    ours, theirs = (artifacts.read(run.folder(stage)).arrays for run in (finished, both))
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
      if expected.dtype.kind == "f":
        atol = TOLERANCE[stage] * np.abs(expected).max()
        np.testing.assert_allclose(theirs[name], expected, rtol=0, atol=atol)
      else:
        np.testing.assert_array_equal(theirs[name], expected)
  # Eigenvectors have free signs: compare what the curvature does to a vector.
  task = runs.load_task(finished)
  vector = jax.tree.map(np.ones_like, task.params)
  results = [
    jax.tree.leaves(runs.load_curvature(run, task).multiply(vector, 1e-4))
    for run in (finished, both)
  ]
  for expected, actual in zip(*results, strict=True):
    atol = TOLERANCE["curvature"] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_the_artefacts_hold_what_they_say(finished):
  sample = artifacts.read(finished.folder("sample"))
  assert sample.arrays["images"].shape == (3, 8, 8, 1)
  assert sample.arrays["trajectories"].shape == (3, 21, 8, 8, 1)
  np.testing.assert_array_equal(sample.arrays["trajectories"][:, -1], sample.arrays["images"])
  scores = runs.load_scores(finished)
  assert scores.values.shape == scores.std_errors.shape == (3, 24)
  assert np.isfinite(scores.group_values).all() and scores.group_values.shape[0] == 2
  np.testing.assert_array_equal(scores.train_ids, finished.dataset.ids)
  steps = [json.loads(s)["step"] for s in (finished.folder("train") / "metrics.jsonl").open()]
  assert steps == [5, 10, 15, 20]
  assert (finished.folder("report") / "index.html").stat().st_size > 1000
  for stage in runs.ORDER:
    cost = artifacts.read(finished.folder(stage)).manifest["cost"]
    assert cost["seconds"] >= 0 and cost["peak_host_mib"] > 0


def test_finished_stages_are_reused(finished):
  before = {s: (finished.folder(s) / "manifest.json").stat().st_mtime_ns for s in runs.ORDER}
  stages.STAGES["all"](finished)
  after = {s: (finished.folder(s) / "manifest.json").stat().st_mtime_ns for s in runs.ORDER}
  assert before == after


def test_the_pace_of_a_stage_may_change(finished):
  config = tiny_config()
  config.curvature.batch_size = 7
  config.attribute.batch_size = 7
  stages.attribute(run_of(finished.workdir, config))


@pytest.mark.parametrize(
  ("section", "field", "value", "stage"),
  [
    ("train", "steps", 21, "train"),
    ("curvature", "draws", 4, "curvature"),
    ("attribute", "damping", 1e-3, "attribute"),
    ("data", "num_examples", 23, "train"),
  ],
)
def test_a_changed_config_refuses_the_stale_artefact_with_the_difference(
  finished, section, field, value, stage
):
  config = tiny_config()
  old = config[section][field]
  config[section][field] = value
  with pytest.raises(artifacts.StaleArtifact) as caught:
    stages.STAGES["all"](run_of(finished.workdir, config))
  assert str(finished.folder(stage)) in str(caught.value)
  expected = "data.content" if section == "data" else f"{section}.{field}: {old} → {value}"
  assert expected in str(caught.value)


def test_a_stage_whose_inputs_are_missing_names_the_stage_to_run(tmp_path):
  with pytest.raises(ValueError, match="run the stage train"):
    stages.sample(run_of(tmp_path))


def test_an_unfinished_training_resumes_from_its_checkpoint(finished, tmp_path):
  """A run killed after its first checkpoint ends with the same parameters, bit for bit."""
  run = run_of(tmp_path, devices=jax.devices()[:1])
  original = artifacts.Checkpoints.save

  class Killed(BaseException):
    pass

  def save_then_die(self, step, state):
    original(self, step, state)
    raise Killed

  artifacts.Checkpoints.save = save_then_die
  try:
    with pytest.raises(Killed):
      stages.train(run)
  finally:
    artifacts.Checkpoints.save = original
  assert not (run.folder("train") / "manifest.json").exists()
  resumed = stages.train(run)
  for name, expected in artifacts.read(finished.folder("train")).arrays.items():
    np.testing.assert_array_equal(resumed.arrays[name], expected)


@pytest.mark.parametrize(
  ("section", "value", "message"),
  [
    ("diffusion", {"schedule": "cosine"}, "there are: linear, scaled_linear"),
    ("sample", {"sampler": "euler"}, "there are: ddpm, ddim"),
    ("model", {"name": "resnet"}, "the models are mlp, unet"),
    ("data", {"name": "imagenet"}, "digits"),
  ],
)
def test_unknown_names_list_the_valid_ones(finished, tmp_path, section, value, message):
  config = tiny_config()
  config[section].update(value)
  workdir = tmp_path if section != "sample" else finished.workdir.parent / "sampler"
  if section == "sample":
    (workdir).mkdir()
    (workdir / "train").symlink_to(finished.folder("train"))
  with pytest.raises(ValueError, match=message):
    stages.sample(run_of(workdir, config)) if section == "sample" else stages.train(
      run_of(workdir, config)
    )
