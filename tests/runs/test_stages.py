"""Whole runs in seconds: stages on one and two devices, reuse, refusal, and what is written."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxinf.attribution.self_influence import self_influence
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.engine import artifacts
from jaxinf.engine.checkpoints import PartialOutputs
from jaxinf.runs import serving, studies
from jaxinf.runs.perform import perform
from jaxinf.runs.run import load_curvature, load_model, load_scores, own_settings
from jaxinf.runs.sampling import load_samples
from jaxinf.runs.stage import MAIN_LINE
from tests.running import run_of
from tests.twins import Killed

# Of the largest number: training and sampling amplify float32 rounding.
TOLERANCE = {"train": 1e-3, "sample": 1e-3, "curvature": 1e-3, "attribute": 1e-3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run on one device."""
  run = run_of(tmp_path_factory.mktemp("run") / "work")
  perform(run, "all")
  return run


def test_two_devices_give_the_same_results_in_every_stage(finished, tmp_path):
  both = run_of(tmp_path, num_devices=2)
  perform(both, "all")
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
  model = load_model(finished)
  vector = jax.tree.map(np.ones_like, model.params)
  results = [
    jax.tree.leaves(load_curvature(run, model).multiply(vector, 1e-4)) for run in (finished, both)
  ]
  for expected, actual in zip(*results, strict=True):
    atol = TOLERANCE["curvature"] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_eight_devices_give_the_same_scores_and_the_same_store(finished, tmp_path):
  """In a process of its own, where there are eight; every stage goes over all of them."""
  for stage in ("train", "sample", "curvature"):
    shutil.copytree(finished.folder(stage), tmp_path / stage)
  program = (
    "import pathlib, sys; from jaxinf.runs.perform import perform; "
    "from tests.running import run_of; run = run_of(pathlib.Path(sys.argv[1]), num_devices=8); "
    "assert len(run.devices) == 8; "
    "perform(run, 'attribute'); perform(run, 'index')"
  )
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
  subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
  ours = load_scores(run_of(tmp_path))
  theirs = load_scores(finished)
  # The model is the same here: rounding may move a number by one int16 step.
  atol = 1e-4 * np.abs(theirs.replicate_values).max()
  np.testing.assert_allclose(ours.replicate_values, theirs.replicate_values, rtol=0, atol=atol)
  samples = artifacts.read(finished.folder("sample")).arrays["images"]
  answer = serving.load_store(run_of(tmp_path)).query(
    Examples(samples, theirs.query_ids), damping=1e-4, draws=Draws(4)
  )
  # Rows are int8 there, and larger beside centred scores than beside others.
  atol = 5e-2 * np.abs(theirs.values).max()
  np.testing.assert_allclose(answer.values, theirs.values, rtol=0, atol=atol)


def test_the_artefacts_hold_what_they_say(finished):
  sample = artifacts.read(finished.folder("sample"))
  assert sample.arrays["images"].shape == (3, 8, 8, 1)
  trajectories = load_samples(finished, "trajectories").data
  assert trajectories.shape == (3, 21, 8, 8, 1)
  np.testing.assert_array_equal(trajectories[:, -1], sample.arrays["images"])
  scores = load_scores(finished)
  assert scores.values.shape == scores.std_errors.shape == (3, 24)
  assert np.isfinite(scores.replicate_values).all() and scores.replicate_values.shape[0] == 2
  np.testing.assert_array_equal(scores.train_ids, finished.dataset.ids)
  steps = [json.loads(s)["step"] for s in (finished.folder("train") / "metrics.jsonl").open()]
  assert steps == [5, 10, 15, 20]
  assert (finished.folder("report") / "index.html").stat().st_size > 1000
  for stage in MAIN_LINE:
    cost = artifacts.read(finished.folder(stage)).manifest["cost"]
    assert cost["seconds"] >= 0 and cost["peak_host_mib"] > 0


def test_self_influence_is_kept_and_its_largest_are_shown(finished, capsys):
  """The stage says what the library says, and says it again when the result is there."""
  config = finished.config.self_influence
  shown = []
  for _ in range(2):
    artifact = perform(finished, "self-influence")
    shown.append(capsys.readouterr().out)
  expected = self_influence(
    load_curvature(finished, load_model(finished)),
    train=finished.train,
    damping=config.damping,
    draws=finished.draws(config.draws, config.replicates, config.design),
  )
  # Batches of another size: float32 rounding.
  atol = 1e-4 * np.abs(expected.values).max()
  np.testing.assert_allclose(artifact.arrays["values"], expected.values, rtol=0, atol=atol)
  np.testing.assert_array_equal(artifact.arrays["ids"], finished.dataset.ids)
  assert shown[0] == shown[1] and "±" in shown[0]
  rows = [line.split()[0] for line in shown[0].splitlines()[1:]]
  assert len(rows) == 10 and rows[0] == expected.top(1).ids[0]


def test_a_mask_counts_by_what_its_file_holds(finished, tmp_path):
  path = tmp_path / "left.npy"
  np.save(path, np.eye(8))
  run = run_of(finished.workdir, {"attribute.measurement": f"masked_loss({path})"})
  before = own_settings(run, "attribute")["measurement"]
  np.save(path, np.ones((8, 8)))
  after = own_settings(run, "attribute")["measurement"]
  assert before != after and before.startswith("masked_loss(")


def test_a_distance_that_has_no_gradient_is_refused_before_anything_begins(finished):
  run = run_of(finished.workdir, {"attribute.measurement": "trajectory_distance"})
  with pytest.raises(ValueError, match="trajectory_distance has no influence function"):
    perform(run, "all")


def test_trajectories_that_a_copy_left_out_are_generated_again(finished, tmp_path):
  for stage in ("train", "sample"):
    shutil.copytree(
      finished.folder(stage), tmp_path / stage, ignore=shutil.ignore_patterns("trajectories")
    )
  run = run_of(tmp_path)
  for samples in (load_samples(run, "trajectories"), load_samples(run, "trajectories")):
    expected = load_samples(finished, "trajectories").data
    np.testing.assert_array_equal(samples.data, expected)
  assert not (run.folder("sample") / "sums").exists()
  shutil.rmtree(run.folder("sample") / "trajectories")
  artifact = artifacts.read(run.folder("sample"))
  arrays = {**artifact.arrays, "images": -artifact.arrays["images"]}  # as if generated elsewhere
  artifacts.write(run.folder("sample"), artifact.manifest["key"], arrays, notes={}, cost={})
  with pytest.raises(ValueError, match="cannot be generated again here"):
    load_samples(run, "trajectories")


def test_finished_stages_are_reused(finished):
  before = {s: (finished.folder(s) / "manifest.json").stat().st_mtime_ns for s in MAIN_LINE}
  perform(finished, "all")
  after = {s: (finished.folder(s) / "manifest.json").stat().st_mtime_ns for s in MAIN_LINE}
  assert before == after


def test_the_pace_of_a_stage_may_change(finished):
  pace = {"curvature.batch_size": 7, "attribute.batch_size": 7}
  perform(run_of(finished.workdir, pace), "attribute")


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
  old = getattr(getattr(finished.config, section), field)
  with pytest.raises(artifacts.StaleArtifact) as caught:
    perform(run_of(finished.workdir, {f"{section}.{field}": value}), "all")
  assert str(finished.folder(stage)) in str(caught.value)
  expected = "data.content" if section == "data" else f"{section}.{field}: {old} → {value}"
  assert expected in str(caught.value)


def test_a_stage_whose_inputs_are_missing_names_the_stage_to_run(tmp_path):
  with pytest.raises(ValueError, match="run the stage train"):
    perform(run_of(tmp_path), "sample")


def test_an_unfinished_training_resumes_from_its_checkpoint(finished, tmp_path, monkeypatch):
  """A run killed after its first checkpoint ends with the same parameters, bit for bit."""
  run = run_of(tmp_path)
  original = artifacts.Checkpoints.save

  def save_then_die(self, step, state):
    original(self, step, state)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(artifacts.Checkpoints, "save", save_then_die)
    with pytest.raises(Killed):
      perform(run, "train")
  assert not (run.folder("train") / "manifest.json").exists()
  resumed = perform(run, "train")
  for name, expected in artifacts.read(finished.folder("train")).arrays.items():
    np.testing.assert_array_equal(resumed.arrays[name], expected)


def test_a_sweep_recommends_a_damping_and_the_report_says_so(finished, tmp_path):
  for stage in ("train", "sample", "curvature"):
    shutil.copytree(finished.folder(stage), tmp_path / stage)
  many = {"attribute.draws": 40, "attribute.replicates": 5}  # enough to tell signal from noise
  run = run_of(tmp_path, {**many, "attribute.sweep": (1e-2, 1.0)})
  alone = run_of(tmp_path, many, folders={"attribute": tmp_path / "alone"})
  attributed = perform(run, "attribute")
  assert attributed.notes["recommended_damping"] in (1e-4, 1e-2, 1.0)
  assert "fidelity" in attributed.notes["sweep"]
  scores = load_scores(run)
  assert scores.settings["damping"] == 1e-4
  perform(alone, "attribute")
  expected = load_scores(alone).replicate_values
  # The same products with more rows, which may sum in another order.
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(scores.replicate_values, expected, rtol=0, atol=atol)
  perform(run, "report")
  page = (run.folder("report") / "index.html").read_text()
  assert "is recommended" in page and "How far down the order" in page


def test_a_relative_sweep_is_scored_recommended_and_shown_by_its_rho(finished, tmp_path):
  for stage in ("train", "sample", "curvature"):
    shutil.copytree(finished.folder(stage), tmp_path / stage)
  many = {"attribute.draws": 40, "attribute.replicates": 5}  # enough to tell signal from noise
  relative = {"attribute.damping": 1e-2, "attribute.damping_kind": "relative"}
  run = run_of(tmp_path, {**many, **relative, "attribute.sweep": (1.0,)})
  notes = perform(run, "attribute").notes
  assert load_scores(run).settings["damping_kind"] == "relative"
  perform(run, "report")
  page = (run.folder("report") / "index.html").read_text()
  assert "Damping ρ" in page and f"ρ = {notes['recommended_damping']:g} is recommended" in page


def test_sampling_that_was_stopped_goes_on_after_its_last_batch(finished, tmp_path, monkeypatch):
  shutil.copytree(finished.folder("train"), tmp_path / "train")
  run = run_of(tmp_path, {"sample.batch_size": 1})
  save, saved = PartialOutputs.save, []

  def save_then_die(self, outputs):
    save(self, outputs)
    saved.extend(outputs)
    if len(saved) == 2:
      raise Killed

  monkeypatch.setattr(PartialOutputs, "save", save_then_die)
  with pytest.raises(Killed):
    perform(run, "sample")
  resumed = perform(run, "sample")
  assert len(saved) == 3 and not (run.folder("sample") / "sums").exists()
  for name, expected in artifacts.read(finished.folder("sample")).arrays.items():
    if expected.dtype.kind == "f":
      # A batch of one sums in another order than one of three; twenty steps amplify that.
      np.testing.assert_allclose(resumed.arrays[name], expected, rtol=0, atol=TOLERANCE["sample"])


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("diffusion.schedule", "quadratic", "there are: linear, scaled_linear"),
    ("diffusion.prediction", "noise", "there are: epsilon, sample, v, flow, edm"),
    ("diffusion.weight", "snr", "there are: "),
    ("sample.sampler", "heun", "there are: ddpm, ddim"),
    ("model.name", "resnet", "the models are mlp, unet"),
    ("data.name", "imagenet", "digits"),
  ],
)
def test_unknown_names_list_the_valid_ones(finished, tmp_path, field, value, message):
  stage = "sample" if field.startswith("sample") else "train"
  run = run_of(
    tmp_path,
    {field: value},
    folders={"train": finished.folder("train")} if stage == "sample" else {},
  )
  with pytest.raises(ValueError, match=message):
    perform(run, stage)


def test_a_curvature_study_leaves_its_numbers_a_page_and_a_figure(finished, capsys):
  """It is no stage of `all`; its table goes to the screen too."""
  artifact = perform(finished, "curvature-study")
  num = len(artifact.notes["names"])
  assert artifact.arrays["errors"].shape == artifact.arrays["correlations"].shape == (num, 1, 2)
  assert (artifact.arrays["residuals"] < 1e-2).all()
  folder = finished.folder("curvature-study")
  assert {path.name for path in folder.iterdir()} >= {"index.html", "curvature-study.png"}
  assert not (folder / "sums").exists()
  assert "EK-FAC" in capsys.readouterr().out


def test_a_compress_study_leaves_its_numbers_a_page_and_a_figure(finished, capsys):
  """Beside the compressions that always take part, one svd, truncation and projection."""
  artifact = perform(finished, "compress-study")
  names = artifact.notes["names"]
  assert list(names[:4]) == ["int16", "int8", "int4", "bfloat16"] and len(names) == 7
  for name in ("errors", "pearson", "spearman"):
    assert artifact.arrays[name].shape == (7, 2)
  # int16 keeps 5 digits of a block's largest number, so nearly the scores.
  assert (artifact.arrays["pearson"][0] > 0.999).all()
  folder = finished.folder("compress-study")
  assert {path.name for path in folder.iterdir()} >= {"index.html", "compression-study.png"}
  assert "truncation, 50 %" in capsys.readouterr().out


@pytest.mark.parametrize("study", ["curvature-study", "compress-study"])
def test_more_queries_than_samples_are_refused_by_a_study(finished, tmp_path, study):
  for stage in ("train", "sample", "curvature"):
    shutil.copytree(finished.folder(stage), tmp_path / stage)
  run = run_of(tmp_path, {f"{study.replace('-', '_')}.num_queries": 4})
  with pytest.raises(ValueError, match=r"num_queries must lie in 1…3"):
    perform(run, study)


def test_the_memory_of_a_curvature_is_told_without_a_model(tmp_path):
  table = studies.curvature_memory(run_of(tmp_path, {"curvature.partitions": 2}))
  assert "most of 2 partitions" in table
  assert not list(tmp_path.iterdir())
