"""A whole proof in seconds: what is trained, measured, scored and compared is what it says."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

import jaxinf
from jaxinf import benchmark
from jaxinf.attribution.kernels import QUERY
from jaxinf.attribution.methods import METHODS
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
from jaxinf.runs.cleaning import clean
from jaxinf.runs.config import settings
from jaxinf.runs.run import kind_of_config, load_model
from jaxinf.runs.sampling import load_samples, regenerated
from jaxinf.runs.status import found_in
from tests.running import run_of


def copied(run, tmp_path, changes):
  """The same workdir again, under other settings."""
  shutil.copytree(run.workdir, tmp_path / "work")
  return run_of(tmp_path / "work", changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  changes = {"counterfactual.metrics": ("mse",)}
  run = run_of(tmp_path_factory.mktemp("proof") / "work", changes)
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


def evaluated(run, name: str, model_name: str, data: np.ndarray) -> np.ndarray:
  """[Q] `evaluate` of one retrained model, a replicate at a time, on the stage's own draws."""
  model, draws = load_model(run), Draws(8, 2)
  numbers = example_numbers(artifacts.read(run.folder("sample")).arrays["ids"])
  keys = fold_in_each(stream(run.config.seed, "measure"), draws.numbers(numbers))
  values = [
    MEASUREMENTS[name].evaluate(
      model.apply_fn, models.load_params(run, model_name), model.process, data,
      jax.vmap(partial(draw_keys, draws=4, first=4 * group))(keys), draws=draws,
      reference=model.params,
    )
    for group in (0, 1)
  ]  # fmt: skip
  return np.mean(values, axis=0)


def test_measurements_are_those_of_the_models(finished):
  samples = load_samples(finished)
  for name in ("loss", "elbo"):
    expected = evaluated(finished, name, "subset-0001-seed-0", samples.data)
    found = measures.retrained(finished, name)
    # Float32 sums of eight draws.
    np.testing.assert_allclose(found.values[1, 0], expected, rtol=1e-5)


def test_distances_along_trajectories_are_measured_and_never_differentiated(finished, tmp_path):
  run = copied(finished, tmp_path, {"measure.measurements": ("trajectory_distance",)})
  benchmark.measure(run)
  found = measures.retrained(run, "trajectory_distance").values
  assert found.shape == (4, 2, 3) and (found > 0).all()
  paths = load_samples(run, "trajectories").data
  expected = evaluated(run, "trajectory_distance", "subset-0001-seed-0", paths)
  # Squares of differences of float32 outputs that are alike.
  np.testing.assert_allclose(found[1, 0], expected, rtol=1e-3)
  refused = {"score.measurements": ("trajectory_distance",)}
  with pytest.raises(ValueError, match="no influence function"):
    benchmark.evaluate(copied(finished, tmp_path / "scored", refused))


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
      plain, discounted = entry["readouts"].values()
      assert plain["default"] == entry["default"]
      values = sweep[default].values
      predicted = np.where(subsets.membership, 0, 1) @ np.where(values < 0, 0.5 * values, values).T
      expected = [stats.spearmanr(*x).statistic for x in zip(predicted.T, truth.T, strict=True)]
      np.testing.assert_allclose(discounted["default"]["mean"], np.mean(expected), atol=1e-6)


def test_tables_of_before_are_shown_where_their_scores_are_gone_and_made_anew_otherwise(
  finished, tmp_path, capsys
):
  run = copied(finished, tmp_path, {})
  artifact = artifacts.read(run.folder("evaluate"))
  before = {k: v for k, v in artifact.manifest["key"].items() if k != "readouts"}
  notes = json.loads(json.dumps(artifact.notes))
  for table in notes["tables"].values():
    for entry in table["entries"]:
      del entry["readouts"]
  place = run.folder("evaluate")
  artifacts.write(place, before, artifact.arrays, notes=notes, cost={})
  shutil.move(run.folder("score") / "pixel", tmp_path / "pixel")
  capsys.readouterr()
  benchmark.evaluate(run)
  assert artifacts.read(place).manifest["key"] == before
  assert "negative" not in capsys.readouterr().out
  shutil.move(tmp_path / "pixel", run.folder("score") / "pixel")
  benchmark.evaluate(run)
  assert artifacts.read(place).notes == artifact.notes
  shown = capsys.readouterr().out
  assert "as they are" in shown and "negative × 0.5" in shown


def test_replay_predicts_the_same_training_with_other_weights(finished, tmp_path):
  """Of images outside a subset, 0.98 instead of 1: so little that changes are almost linear."""
  fields = {"retrain.outside_weight": 0.98, "retrain.num_seeds": 1, "retrain.same_batches": True}
  run = copied(finished, tmp_path, fields | {"retrain.models_at_once": 5})
  benchmark.retrain(run)
  names = ["full-seed-0", *(f"subset-{m:04d}-seed-0" for m in range(4))]
  params, model = [models.load_params(run, name) for name in names], load_model(run)
  for ours, theirs in zip(*map(jax.tree.leaves, (params[0], model.params)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)  # vmapped with others
  samples = artifacts.read(run.folder("sample")).arrays
  draws = Draws(4, 1, seed=run.config.seed)
  keys = fold_in_each(stream(draws.seed, QUERY), draws.numbers(example_numbers(samples["ids"])))
  keys = jax.vmap(partial(draw_keys, draws=4))(keys)
  measured = np.stack([
    MEASUREMENTS["loss"].evaluate(
      model.apply_fn, each, model.process, samples["images"], keys, draws=draws
    )
    for each in params
  ])  # fmt: skip
  (scores,) = scoring.scored(run, scoring.Row("replay", "loss"))
  assert scores.settings["distance"] == 0
  outside = np.where(models.subsets_of(run).membership, 0, 0.02)
  predicted = outside @ scores.values.T / len(run.dataset)
  change = measured[1:] - measured[0]
  # What is left is of second order, a sixth at 0.95 and less here, and float32's rounding.
  np.testing.assert_allclose(predicted, change, rtol=0, atol=0.1 * np.abs(change).max())
  with pytest.raises(ValueError, match="leave out retrain.same_batches"):
    benchmark.counterfactual(run)


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


def test_tables_are_json_for_programs(finished, capsys):
  """Tables and arrays as they are kept; what is not known is null, not NaN."""
  run = dataclasses.replace(finished, as_json=True)
  benchmark.evaluate(run)
  kept = artifacts.read(finished.folder("evaluate")).notes
  assert json.loads(capsys.readouterr().out) == {"tables": kept["tables"]}
  benchmark.counterfactual(run)
  found = json.loads(capsys.readouterr().out)
  arrays = artifacts.read(finished.folder("counterfactual")).arrays
  assert found["methods"] == ["influence", "pixel", "random"]
  np.testing.assert_array_equal(found["change"], arrays["change"])
  np.testing.assert_array_equal(np.array(found["predicted"], float), arrays["predicted"])


def test_a_finished_proof_is_told_as_finished_and_leaves_only_checkpoints_to_clean(finished):
  found = {str(f.folder.relative_to(finished.workdir)): f for f in found_in(finished.workdir)}
  asked = found_in(finished.workdir, finished.config)
  assert {f.state for f in asked} == {f.state for f in found.values()} == {"finished"}
  names = {"train", "sample", "evaluate", "counterfactual", "score/pixel", "measure/loss"}
  assert names | {f"retrain/{name}" for name in model_folders(finished)} <= set(found)
  _, *removed = clean(workdir=finished.workdir, config=None, dry_run=True).splitlines()
  assert [line.split(" (")[0].strip() for line in removed] == ["train/checkpoints"]
  other = dataclasses.replace(
    finished.config, measure=dataclasses.replace(finished.config.measure, draws=16)
  )
  stale = {f.folder.name: f.why for f in found_in(finished.workdir, other) if f.state == "stale"}
  assert stale["loss"] == ("measure.draws: 8 → 16",)


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
  scores = scoring.at_default(finished, scoring.row_of("influence", "loss"))
  removed = scores.train_ids[scores.top(6).positions[1]]
  predicted = artifact.arrays["predicted"]
  # Float32.
  np.testing.assert_allclose(
    predicted[0, 1, 1], scores.predicted_change(removed).changes[1], rtol=1e-6
  )
  assert np.isnan(predicted[1:]).all()
  np.testing.assert_array_equal(artifact.arrays["change"][1, 1, 1, 0], (without - full)[0, 1])
  config = models.model_key(finished, spec)
  assert config["steps"] == finished.config.train.steps  # as many as the full model's


def test_retrained_models_make_the_samples_anew_of_the_same_noise(finished):
  images = artifacts.read(finished.folder("sample")).arrays["images"]
  own = regenerated(finished, load_model(finished).params, np.array([2, 0]))
  np.testing.assert_allclose(own, images[[2, 0]], atol=1e-5)  # in another batch
  kept = artifacts.read(models.folder(finished, "counterfactual/samples")).arrays
  made = list(zip(kept["models"].tolist(), kept["numbers"].tolist(), strict=True))
  assert len(set(made)) == len(made) and made.count(("full-seed-0", 1)) == 1
  # Without the top quarter by pixels of sample 1, against all images.
  specs = removal._specs(finished)
  without = models.load_params(finished, specs[1, 1, 1, 0].name, "counterfactual/models")
  full = models.load_params(finished, "full-seed-0")
  one, other = (regenerated(finished, params, np.array([1])) for params in (without, full))
  found = artifacts.read(finished.folder("counterfactual")).arrays["mse"]
  assert found.shape == (3, 2, 2, 1) and (found > 0).all()
  np.testing.assert_allclose(found[1, 1, 1, 0], np.square(one - other).mean(), rtol=1e-4)


def test_metrics_leave_the_keys_of_what_was_kept_before_them(finished):
  before = dataclasses.replace(finished.config.counterfactual, metrics=())
  assert "metrics" not in settings(before)
  assert settings(finished.config.counterfactual)["metrics"] == ["mse"]


def test_tables_of_metrics_say_what_random_removal_does():
  values = np.array([[[0.5, 0.7]], [[0.8, 0.7]]])[..., None]  # two methods, one share
  text = removal.resemblance_text(values, ["influence", "random"], [0.1], "ssim")
  assert "ssim of a sample" in text and "(2 samples)" in text
  assert "0.6 ± 0.1 (-20.0%)" in text and "0.75 ± 0.05 (+0.0%)" in text


def test_passes_over_parts_of_the_samples_change_nothing(finished, tmp_path):
  run = copied(finished, tmp_path, {"score.passes": 2})
  shutil.rmtree(run.folder("score"))
  row = scoring.Row("influence", "loss")
  for ours, theirs in zip(scoring.scored(run, row), scoring.scored(finished, row), strict=True):
    np.testing.assert_array_equal(ours.query_ids, theirs.query_ids)
    # The same int8 rows, in other batches.
    atol = 1e-5 * np.abs(theirs.values).max()
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4, atol=atol)


def test_solves_take_the_solver_of_the_config_by_the_method_of_their_name(tmp_path, monkeypatch):
  run = run_of(tmp_path / "run", {"curvature.solver.step_pairs": 7})
  fitted = []
  monkeypatch.setattr(scoring, "perform", lambda run, stage: fitted.append(run))
  monkeypatch.setattr(scoring, "load_curvature", lambda run, model: None)
  for name in ("exact", "astra"):
    scoring._curvature(run, None, METHODS[name].kind)
  exact, astra = (kind_of_config(run.config.curvature).solver for run in fitted)
  assert exact == run.config.curvature.solver and exact.step_pairs == 7
  assert astra == dataclasses.replace(exact, method="stochastic")
  assert len({run.folder("curvature") for run in fitted}) == 2


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
  with pytest.raises(ValueError, match="same_batches trains with the seed of the attributed"):
    benchmark.retrain(copied(finished, tmp_path / "d", {"retrain.same_batches": True}))
  with pytest.raises(ValueError, match=r"set sample\.keep_trajectory=True"):
    changes = {"measure.measurements": ("trajectory",), "sample.keep_trajectory": False}
    benchmark.retrain(run_of(tmp_path / "c", changes))
