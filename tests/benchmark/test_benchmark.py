"""A whole proof in seconds: what is trained, measured, scored and compared is what it says."""

import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

import jaxinf
from jaxinf import benchmark
from jaxinf.benchmark import counterfactuals as removal
from jaxinf.benchmark import measuring as measures
from jaxinf.benchmark import retraining as models
from jaxinf.benchmark import scoring
from jaxinf.benchmark.truths import read_scores
from jaxinf.core.draws import Draws
from jaxinf.core.random import draw_keys, example_numbers, fold_in_each, stream
from jaxinf.diffusion.measurements import MEASUREMENTS
from jaxinf.engine import artifacts
from jaxinf.networks import training
from jaxinf.runs.run import load_model
from tests.running import run_of


def copied(run, tmp_path, changes):
  """The same workdir again, under other settings."""
  shutil.copytree(run.workdir, tmp_path / "work")
  return run_of(tmp_path / "work", changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  run = run_of(tmp_path_factory.mktemp("proof") / "work")
  benchmark.benchmark(run)
  benchmark.counterfactual(run)
  return run


def model_folders(run):
  return sorted(path.parent.name for path in run.folder("retrain").glob("*/manifest.json"))


def test_every_subset_is_trained_with_every_seed_and_so_are_all_images(finished):
  names = [f"full-seed-{k}" for k in (0, 1)]
  names += [f"subset-{j:04d}-seed-{k}" for j in range(4) for k in (0, 1)]
  assert model_folders(finished) == names
  assert not list((finished.folder("retrain") / "unfinished").glob("*"))  # checkpoints are gone


def test_a_subset_model_is_what_training_on_the_subset_gives(finished):
  subsets = models.subsets_of(finished)
  config = dataclasses.replace(finished.config.train, steps=10, warmup_steps=1)
  state = training.fit(
    finished.model, finished.process, finished.train.take(subsets.positions(2)), config,
    seed=finished.config.seed + 1 + 1, devices=finished.devices,
  )  # fmt: skip
  params = models.load_params(finished, "subset-0002-seed-1")
  # The same float32 sums in the order of a vmapped and of a single product, through Adam.
  for ours, theirs in zip(*map(jax.tree.leaves, (params, state.ema_params)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)


def test_measurements_are_those_of_the_models(finished):
  """Against `evaluate` of one model and sample at a time, on the same draws."""
  samples = artifacts.read(finished.folder("sample")).arrays
  model, params = load_model(finished), models.load_params(finished, "subset-0001-seed-0")
  draws = Draws(8, 2)
  numbers = example_numbers(samples["ids"])
  keys = fold_in_each(stream(finished.config.seed, "measure"), draws.numbers(numbers))
  for name in ("loss", "elbo"):
    expected = np.mean(
      [
        MEASUREMENTS[name].evaluate(
          model.apply_fn, params, model.process, samples["images"],
          jax.vmap(partial(draw_keys, draws=4, first=4 * group))(keys), draws=draws,
        )
        for group in (0, 1)
      ],
      axis=0,
    )  # fmt: skip
    found = measures.retrained(finished, name)
    # Float32 sums of eight draws.
    np.testing.assert_allclose(found.values[1, 0], expected, rtol=1e-5)


def test_more_subsets_extend_what_is_there(finished, tmp_path):
  run = copied(finished, tmp_path, {"retrain.num_subsets": 5})
  before = {name: (run.folder("retrain") / name).stat().st_mtime for name in model_folders(run)}
  shutil.rmtree(run.folder("retrain") / "subset-0000-seed-0")  # measured: needed no more
  benchmark.retrain(run)
  assert set(model_folders(run)) == set(before) - {"subset-0000-seed-0"} | {
    "subset-0004-seed-0", "subset-0004-seed-1"
  }  # fmt: skip
  benchmark.measure(run)
  old, new = (measures.retrained(r, "loss").values for r in (finished, run))
  np.testing.assert_array_equal(new[:4], old)
  assert np.isfinite(new[4]).all()


def test_shards_share_the_models_between_them(finished, tmp_path):
  run = run_of(tmp_path / "work")
  shutil.copytree(finished.folder("train"), run.folder("train"))
  shutil.copytree(finished.folder("sample"), run.folder("sample"))
  trained = []
  for i in range(3):
    before = set(model_folders(run))
    benchmark.retrain(dataclasses.replace(run, shard=(i, 3)))
    trained.append(set(model_folders(run)) - before)
  assert all(trained) and set.union(*trained) == set(model_folders(finished))
  assert sum(map(len, trained)) == 10
  for name in model_folders(run):
    ours, theirs = (models.load_params(r, name) for r in (run, finished))
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
      np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)  # vmapped with others: see above


def test_a_group_that_dies_while_it_is_saved_loses_nothing(finished, tmp_path, monkeypatch, caplog):
  """The second of its models cannot be written; the next start goes on from the checkpoint."""
  run = run_of(tmp_path / "work", {"train.checkpoint_every": 4, "retrain.num_seeds": 1})
  for stage in ("train", "sample"):
    shutil.copytree(finished.folder(stage), run.folder(stage))
  write, written = artifacts.write, []

  def write_once(folder, *args, **kwargs):
    if folder.name.startswith("subset"):
      if written:
        raise OSError("the disk is full")
      written.append(folder.name)
    return write(folder, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(artifacts, "write", write_once)
    with pytest.raises(OSError, match="full"):
      benchmark.retrain(run)
  assert list((run.folder("retrain") / "unfinished").iterdir())
  with caplog.at_level("INFO", "jaxinf"):
    benchmark.retrain(run)
  assert "resuming a group of 4 models at step 8" in caplog.text
  assert not (run.folder("retrain") / "unfinished").exists()
  ours, theirs = (models.load_params(r, "subset-0003-seed-0") for r in (run, finished))
  for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)


def test_other_settings_are_refused_with_the_difference(finished, tmp_path):
  run = copied(finished, tmp_path, {"retrain.steps": 12})
  with pytest.raises(artifacts.StaleArtifact, match=r"steps"):
    benchmark.retrain(run)


def test_the_table_holds_the_rank_correlations(finished):
  subsets = models.subsets_of(finished)
  artifact = artifacts.read(finished.folder("evaluate"))
  rows = scoring.rows_of(finished)
  assert [row.name for row in rows] == ["influence, loss", "influence, elbo", "pixel", "random"]
  for target in ("loss", "elbo"):
    truth = measures.retrained(finished, target).values.mean(axis=1)
    table = artifact.notes["tables"][target]
    assert table["num_models"] == 8 and table["oracle"]["mean"] <= 1
    for row, entry in zip(rows, table["entries"], strict=True):
      sweep = scoring.scored(finished, row)
      assert [s.settings.get("damping") for s in sweep] == entry.get("dampings", [None])
      means = []
      for scores in sweep:
        predicted = np.where(subsets.membership, 0, 1) @ scores.values.T
        correlations = [
          stats.spearmanr(*pair).statistic for pair in zip(predicted.T, truth.T, strict=True)
        ]
        means.append(np.mean(correlations))
      default = entry.get("dampings", [None]).index(entry["default"]["damping"])
      np.testing.assert_allclose(entry["default"]["mean"], means[default], atol=1e-6)
      if "best" in entry:
        np.testing.assert_allclose(entry["best"]["mean"], max(means), atol=1e-6)


def test_a_truth_judges_as_the_proof_it_was_made_of(finished, capsys):
  """Its model, samples and methods are the run's, and so are scores that were kept elsewhere."""
  benchmark.truth(finished)
  truth = jaxinf.load_truth(finished.folder("truth"))
  board = capsys.readouterr().out
  assert truth.name == finished.workdir.name and truth.leaderboard("elbo") in board
  assert truth.dataset().fingerprint() == finished.dataset.fingerprint()
  model, images = load_model(finished), truth.samples.data
  for ours, theirs in zip(*(jax.tree.leaves(x.params) for x in (truth.model, model)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  of = lambda m: m.apply_fn(m.params, images, np.full(len(images), 7, np.int32))
  np.testing.assert_array_equal(of(truth.model), of(model))
  rows = {row.name: row for row in scoring.rows_of(finished)}
  tables = artifacts.read(finished.folder("evaluate")).notes["tables"]
  assert [one.name for one in truth.references if one.default] == [
    "influence, loss", "pixel", "random"
  ]  # fmt: skip
  for target, table in tables.items():
    entries = {entry["name"]: entry for entry in table["entries"]}
    assert truth.notes["limits"][target]["oracle"]["mean"] == table["oracle"]["mean"]
    for one in truth.references:
      entry = entries[one.name]
      at = "default" if one.default else "best"
      if one.default or target in one.best_for:
        assert one.lds[target]["mean"] == pytest.approx(entry[at]["mean"], abs=1e-12)
      assert one.cost["core_seconds"] >= 0 and one.cost["devices"] == ["cpu"]
    # The scores of a proof, at all dampings, and those of a file.
    folder = finished.folder("score") / artifacts.file_name("influence, loss")
    for place in (folder, finished.workdir / "scores.npz"):
      sweep = scoring.scored(finished, rows["influence, loss"])
      sweep[0].save(finished.workdir / "scores.npz")
      found = truth.evaluate(read_scores(place), target)
      means = entries["influence, loss"]["sweep"][: len(found.ldses)]
      np.testing.assert_allclose([x.mean for x in found.ldses], means, atol=1e-12)


def test_a_truth_needs_influence_and_its_own_images(finished, tmp_path):
  with pytest.raises(ValueError, match=r"against influence: add it to score\.methods"):
    benchmark.truth(copied(finished, tmp_path, {"score.methods": ("pixel",)}))
  benchmark.truth(finished)
  truth = jaxinf.load_truth(finished.folder("truth"))
  other = dict(truth.settings["data"], num_examples=12)
  notes = dict(truth.notes, settings=dict(truth.settings, data=other))
  with pytest.raises(ValueError, match="These are not the training images of work"):
    dataclasses.replace(truth, notes=notes).dataset()
  with pytest.raises(ValueError, match="holds no scores. Give the folder"):
    read_scores(finished.folder("sample"))


def test_counterfactual_models_lack_the_top_images(finished):
  artifact = artifacts.read(finished.folder("counterfactual"))
  assert artifact.arrays["change"].shape == (3, 2, 2, 1)
  (row, *_) = (r for r in scoring.rows_of(finished) if r.name == "pixel")
  top = scoring.scored(finished, row)[0].top(6).positions[1]  # 25 % of 24 images
  spec = removal._without(finished, top, 0)
  assert len(spec.member.examples) == 18 and not set(spec.member.examples) & set(top)
  without = measures.of_models(finished, "loss", [spec.name], "counterfactual/measure")
  full = measures.of_models(finished, "loss", ["full-seed-0"])
  assert artifact.notes["methods"] == ["influence", "pixel", "random"]
  np.testing.assert_array_equal(artifact.arrays["change"][1, 1, 1, 0], (without - full)[0, 1])
  config = models.model_key(finished, spec)
  assert config["steps"] == finished.config.train.steps  # as many as the full model's


def test_passes_over_parts_of_the_samples_change_nothing(finished, tmp_path):
  run = copied(finished, tmp_path, {"score.passes": 2})
  shutil.rmtree(run.folder("score"))
  row = scoring.Row("influence", "loss")
  for ours, theirs in zip(scoring.scored(run, row), scoring.scored(finished, row), strict=True):
    np.testing.assert_array_equal(ours.query_ids, theirs.query_ids)
    # The same int8 rows, in other batches.
    atol = 1e-5 * np.abs(theirs.values).max()
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4, atol=atol)


def test_bad_settings_are_refused(finished, tmp_path):
  with pytest.raises(ValueError, match="run the stage retrain first"):
    run = run_of(tmp_path / "work")
    for stage in ("train", "sample"):
      shutil.copytree(finished.folder(stage), run.folder(stage))
    benchmark.measure(run)
  with pytest.raises(ValueError, match="measured by loss yet: run the stage measure"):
    benchmark.evaluate(run)
  with pytest.raises(ValueError, match="Shards need the scores first"):
    benchmark.counterfactual(dataclasses.replace(run, shard=(0, 2)))
  with pytest.raises(ValueError, match="Unknown method 'shapley'"):
    benchmark.evaluate(copied(finished, tmp_path / "a", {"score.methods": ("shapley",)}))
  with pytest.raises(ValueError, match="outside_weight"):
    benchmark.retrain(copied(finished, tmp_path / "b", {"retrain.outside_weight": 1.0}))
  with pytest.raises(ValueError, match=r"set sample\.keep_trajectory=True"):
    changes = {"measure.measurements": ("trajectory",), "sample.keep_trajectory": False}
    benchmark.retrain(run_of(tmp_path / "c", changes))
