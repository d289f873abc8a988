"""Studies of a tiny proof: their numbers are those of naive twins on what its stages left."""

import dataclasses
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from jaxinf.attribution.methods import method_named
from jaxinf.benchmark import counterfactuals as removal
from jaxinf.benchmark import measuring as measures
from jaxinf.benchmark import retraining as models
from jaxinf.benchmark import scoring
from jaxinf.benchmark.figures import EVERY, STUDIES, observations, rounded, study, sweeps
from jaxinf.benchmark.figures.common import plain_name, truth_of
from jaxinf.engine import artifacts
from jaxinf.report.method_figures import GROUPS
from jaxinf.runs.config import typed
from jaxinf.runs.perform import perform
from jaxinf.runs.run import Run
from jaxinf.runs.stage import STAGES
from tests.running import run_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"
HALF = [name for name in STUDIES if name.endswith("-half")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run with every study drawn, the down-weighted models' measurements being made up."""
  changes = {
    "measure.measurements": ("loss", "elbo", "trajectory"),
    "score.methods": ("influence", "dtrak", "pixel"),
    "score.measurements": ("loss",),
    "study.approximations": ("influence", "identity"),
    "study.draws": (2,),
    "study.methods": ("dtrak",),
    "study.timesteps": (19,),
    "study.change_timesteps": (19,),
  }
  run = run_of(tmp_path_factory.mktemp("studies"), changes)
  for stage in STAGES["benchmark"].steps:
    perform(run, stage)
  rng = np.random.default_rng(0)
  change, notes = rng.normal(size=(2, 2, 3, 2)), {"measurement": "loss"}
  artifacts.write(
    run.folder("counterfactual"), removal.counterfactual_key(run), {"change": change},
    notes=notes | {"methods": ["influence", "random"], "shares": [0.02, 0.1]}, cost={},
  )  # fmt: skip
  half = down_weighted(run)
  specs = [spec.name for spec in models.subset_specs(half)]
  ids = artifacts.read(run.folder("sample")).arrays["ids"]
  for name in ("loss_at_timestep(19)", "loss"):
    values = rng.normal(size=(len(specs), len(ids))).astype(np.float32)
    arrays = {"models": np.array(specs), "values": values, "std_errors": values, "query_ids": ids}
    place = models.folder(half, "measure") / artifacts.file_name(name)
    artifacts.write(place, measures.key_of_measurement(half, name), arrays, notes={}, cost={})
  for name in STUDIES:
    study(run, name)
  return run


def down_weighted(run):
  section = dataclasses.replace(run.config.retrain, outside_weight=0.5)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, retrain=section))


def arrays_of(run, name):
  return artifacts.read(run.folder("study") / name).arrays


def predicted(run, row, damping):
  """[M, Q] by the sum over the images that a subset lacks."""
  (scores,) = [s for s in scoring.scored(run, row) if s.settings["damping"] == damping]
  return (1 - models.subsets_of(run).membership) @ scores.values.T / len(run.dataset)


def means_of(run, name):
  """[M, Q] true measurements, means over seeds."""
  return measures.retrained(run, name).values.mean(axis=1)


def lds_of(x, y):
  return np.mean([stats.spearmanr(*pair).statistic for pair in zip(x.T, y.T, strict=True)])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_leaves_a_figure_with_its_numbers_on_a_page(finished, name):
  place = finished.folder("study") / name
  artifact = artifacts.read(place)
  assert artifact.manifest["key"]["study"] == name and artifact.arrays
  shown, page = artifact.notes["shown"], (place / "index.html").read_text()
  assert Image.open(io.BytesIO((place / "figure.png").read_bytes())).width == 1100
  assert shown["title"] in page and "data:image/png;base64," in page and "http" not in page
  assert all(len(row) == len(shown["header"]) for row in shown["rows"]) and shown["rows"]


def test_bars_are_the_table_of_evaluate_with_stand_ins_apart(finished):
  artifact = artifacts.read(finished.folder("study") / "lds")
  groups = artifact.notes["groups"]
  own, other, none, oracle = GROUPS
  assert groups["true measurement: elbo"] == {
    "influence (m. loss)": other, "dtrak": other, "pixel": none, "exact retraining": oracle
  }  # fmt: skip
  assert groups["true measurement: loss"]["influence"] == own
  table = artifacts.read(finished.folder("evaluate")).notes["tables"]["elbo"]
  for entry in table["entries"]:
    default, best = artifact.arrays[f"elbo/{entry['name']}"]
    assert default[0] == entry["default"]["mean"]
    assert best[0] == entry.get("best", entry["default"])["mean"]
  assert not any(name.startswith("trajectory") for name in artifact.arrays)
  assert all(name.startswith("trajectory/") for name in arrays_of(finished, "trajectory"))


@pytest.mark.parametrize("name", ["digits_mlp", "digits_unet"])
def test_bars_of_the_committed_results_are_their_tables(name, tmp_path):
  """What was kept of a proof that took hours is read by today's code, and nothing is made anew."""
  config = typed(importlib.import_module(f"jaxinf.configs.{name}").get_config())
  kept = {path.name: path for path in (RESULTS / name).iterdir()}
  study(Run(config, tmp_path, folders=kept), "lds")
  found = artifacts.read(tmp_path / "study" / "lds").arrays
  for target, table in artifacts.read(kept["evaluate"]).notes["tables"].items():
    for entry in table["entries"]:
      if target != "trajectory":
        default, best = found[f"{target}/{entry['name']}"]
        assert default[0] == entry["default"]["mean"]
        assert best[0] == entry.get("best", entry["default"])["mean"]


def test_counterfactual_means_are_over_seeds_then_samples(finished):
  change = artifacts.read(finished.folder("counterfactual")).arrays["change"]
  arrays = arrays_of(finished, "counterfactual")
  np.testing.assert_allclose(arrays["means"], change.mean(axis=(2, 3)), rtol=1e-12)
  errors = stats.sem(change.mean(axis=3), axis=2)
  np.testing.assert_allclose(arrays["errors"], errors, rtol=1e-12)


def test_sweeps_are_lds_at_every_damping(finished):
  for name in ("influence", "identity"):
    dampings, means, _ = arrays_of(finished, "hessian")[name]
    for damping, mean in zip(dampings, means, strict=True):
      x = predicted(finished, scoring.Row(name, "loss"), damping)
      np.testing.assert_allclose(mean, lds_of(x, means_of(finished, "loss")), atol=1e-6)
  dampings, means, _ = arrays_of(finished, "damping")["dtrak/2/elbo"]
  other = sweeps.with_draws(finished, 2)
  x = predicted(other, scoring.Row("dtrak", None), dampings[0])
  np.testing.assert_allclose(means[0], lds_of(x, means_of(finished, "elbo")), atol=1e-6)
  assert scoring.scored(other, scoring.Row("dtrak", None))[0].settings["query_draws"] == 2


@pytest.mark.parametrize("name", ["timesteps", *HALF])
def test_a_heatmap_has_true_losses_in_rows_and_gradients_in_columns(finished, name):
  artifact = artifacts.read(finished.folder("study") / name)
  true, gradients = artifact.notes["true"], artifact.notes["gradients"]
  assert gradients == [*true, "square_norm"]
  run = down_weighted(finished) if name in HALF else finished
  for i, target in enumerate(true):
    for j, gradient in enumerate(gradients):
      x = predicted(finished, scoring.Row("influence", gradient), 1e-8)
      expected = lds_of(x, means_of(run, target))
      np.testing.assert_allclose(artifact.arrays["lds"][i, j], expected, atol=1e-6)
    expected = [lds_of(means_of(run, t), means_of(run, target)) for t in true]
    np.testing.assert_allclose(artifact.arrays["between_true"][i], expected, atol=1e-6)


def test_actual_changes_are_from_the_models_of_all_images_with_the_same_seeds(finished):
  arrays, target = arrays_of(finished, "changes"), "loss_at_timestep(19)"
  full = measures.of_models(finished, target, ["full-seed-0", "full-seed-1"])
  subset = [measures.of_models(finished, target, [f"subset-{j:04d}-seed-{k}" for k in (0, 1)])
            for j in range(4)]  # fmt: skip
  expected = [(values - full).mean(axis=0) for values in subset]
  # Differences of float32 numbers near 1.
  np.testing.assert_allclose(arrays[f"{target}/actual"], expected, atol=1e-6)
  x = predicted(finished, scoring.Row("influence", target), 1e-8)
  np.testing.assert_allclose(arrays[f"{target}/predicted"], x, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_weights_are_those_of_the_error_of_the_noise(prediction, tmp_path):
  """√ᾱ x_0 = x_t − √(1 − ᾱ) ε: an error e of ε is one of √((1 − ᾱ) / ᾱ) e of x_0."""
  run = run_of(tmp_path, {"diffusion.prediction": prediction})
  ratios = 1 / run.process.schedule.exact_alpha_bars
  expected = {"epsilon": 1 + 0 * ratios, "sample": ratios - 1, "v": ratios}[prediction]
  found = observations.weights(run)
  np.testing.assert_allclose(found.arrays["training loss"], expected, rtol=1e-9)


def test_weights_need_errors_of_the_noise_at_every_timestep(tmp_path):
  ending = {"diffusion.prediction": "v", "diffusion.zero_terminal_snr": True}
  for fields, message in (
    (ending, "noise alone"),
    ({"diffusion.prediction": "flow"}, "continuous"),
  ):
    with pytest.raises(ValueError, match=message):
      observations.weights(run_of(tmp_path, fields))


def test_slopes_are_within_samples():
  """Samples that differ in level hide nothing: y = 3 x + c_q of every sample q."""
  rng = np.random.default_rng(0)
  x, levels = rng.normal(size=(5, 4)), 100 * rng.normal(size=4)
  assert observations._slope_within_samples(x, 3 * x + levels) == pytest.approx(3)
  assert observations._slope_within_samples(np.ones((5, 4)), x) == 0  # nothing is predicted


def test_a_seed_that_lacks_a_model_is_left_out_of_changes(finished):
  full = measures.of_models(finished, "loss", ["full-seed-0", "full-seed-1"])
  values = np.stack([full + 1, full + 2])  # [M, K, Q]
  values[1, 0] = np.nan
  changes = observations._actual_changes(finished, "loss", values)
  np.testing.assert_allclose(changes, np.array([[1, 1, 1], [2, 2, 2]]), rtol=1e-6)
  values[1] = np.nan
  with pytest.raises(ValueError, match="models of all images .* run retrain and measure"):
    observations._actual_changes(finished, "loss", values)


def test_down_weighting_is_predicted_to_do_a_share_of_what_removal_does(finished):
  row, truth = scoring.Row("influence", "loss"), truth_of(finished, ["loss"])
  truth = dataclasses.replace(truth, outside_weight=0.2)
  found = truth.predicted(scoring.at_default(finished, row))
  np.testing.assert_allclose(found, 0.8 * predicted(finished, row, 1e-8), rtol=1e-5)
  assert "all 24 training images, with weight 0.2 outside 4 random subsets of 12;" in truth.made()
  assert truth_of(down_weighted(finished), ["loss"]).outside_weight == 0.5


def test_correlations_are_over_samples_between_models_of_one_seed(finished):
  pearson = arrays_of(finished, "correlation")["elbo/pearson"]
  names = ["full-seed-0", *(f"subset-{j:04d}-seed-0" for j in range(4))]
  values = measures.of_models(finished, "elbo", names)
  for i, j in ((0, 1), (2, 4)):
    expected = stats.pearsonr(values[i].astype(float), values[j].astype(float)).statistic
    np.testing.assert_allclose(pearson[i, j], expected, rtol=1e-9)


def test_correlations_need_the_model_of_all_images(finished, monkeypatch):
  unmeasured = lambda run, name, models: np.full((len(models), 3), np.nan, np.float32)
  monkeypatch.setattr(observations, "of_models", unmeasured)
  with pytest.raises(ValueError, match="models of all images .* run retrain and measure"):
    study(finished, "correlation")


def test_what_stages_left_under_other_settings_is_refused_with_the_difference(finished):
  config = finished.config
  for names, section, change in (
    (("lds", "trajectory"), "evaluate", {"num_resamples": 51}),
    (("counterfactual",), "counterfactual", {"num_queries": 1}),
  ):
    settings = dataclasses.replace(getattr(config, section), **change)
    run = dataclasses.replace(finished, config=dataclasses.replace(config, **{section: settings}))
    for name in names:
      with pytest.raises(artifacts.StaleArtifact, match=next(iter(change))):
        study(run, name)


def test_what_a_study_lacks_is_said_with_the_stage_to_run(finished, tmp_path):
  bare = dataclasses.replace(
    finished, workdir=tmp_path,
    folders={name: finished.folder(name) for name in ("train", "sample", "curvature")},
  )  # fmt: skip
  with pytest.raises(ValueError, match="run the stage retrain --config.retrain.outside_weight=0.5"):
    study(bare, "timesteps-half")
  with pytest.raises(ValueError, match="run the stage retrain first"):
    study(bare, "correlation")
  stages_before = ("train", "sample", "retrain", "measure")
  unfinished = dataclasses.replace(
    bare, folders={name: finished.folder(name) for name in stages_before}
  )
  for name, stage in (("lds", "evaluate"), ("counterfactual", "counterfactual")):
    with pytest.raises(ValueError, match=f"run the stage {stage} first"):
      study(unfinished, name)
  with pytest.raises(ValueError, match="holds no study yet"):
    study(bare, EVERY)
  with pytest.raises(ValueError, match="Unknown study 'lsd'; there are: lds, .*weights"):
    study(finished, "lsd")


def test_one_page_collects_the_studies_that_are_there(finished, tmp_path):
  run = dataclasses.replace(finished, workdir=tmp_path)
  for name in ("weights", "lds"):
    (tmp_path / "study").mkdir(exist_ok=True)
    (tmp_path / "study" / name).symlink_to(finished.folder("study") / name)
  study(run, EVERY)
  page = (tmp_path / "study/index.html").read_text()
  assert page.index('id="lds"') < page.index('id="weights"') and page.count("<img") == 2


def test_timesteps_are_named_as_in_the_paper(finished):
  assert plain_name("loss_at_timestep(0)") == "ℓ_1" and plain_name("square_norm") == "square norm"
  assert (
    truth_of(finished, ["loss"])
    .made()
    .startswith("8 models retrained on 4 random subsets of 12 of 24 training images; 3 samples.")
  )


# --- half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_rounding_changes_nothing_where_numbers_are_exact(precision):
  """Orthogonal features of powers of two: every product, sum and inverse is a power of two."""
  train, queries = 2.0 * np.eye(4, 3, dtype=np.float32), np.array([[1, 0, 4]], np.float32)
  (found,) = rounded.rounded_fisher_scores(train, queries, [1.0], precision)
  inverse = np.linalg.inv(train.T @ train / 4 + np.eye(3))
  np.testing.assert_allclose(found, queries @ inverse @ train.T, rtol=1e-6)
  wide = np.concatenate([train, np.zeros((4, 5), np.float32)], axis=1)  # k > N: the dual
  (dual,) = rounded.rounded_fisher_scores(wide, np.pad(queries, ((0, 0), (0, 5))), [1.0], precision)
  np.testing.assert_allclose(dual, found, rtol=5e-3)  # its W has another scale, which rounds


def test_float16_loses_small_dampings_and_overflows():
  rng = np.random.default_rng(0)
  train = rng.normal(size=(40, 3)).astype(np.float32)
  queries = rng.normal(size=(2, 3)).astype(np.float32)
  # The Gram matrix's diagonal is about 40, where float16 has steps of 1/32: 40 λ vanishes in it.
  tiny, none, large = rounded.rounded_fisher_scores(train, queries, [1e-5, 1e-9, 1.0], "float16")
  np.testing.assert_array_equal(tiny, none)
  assert not np.allclose(tiny, large, rtol=0.1)
  with np.errstate(all="raise"):
    (found,) = rounded.rounded_fisher_scores(100 * train, queries, [1e-5], "float16")
  assert not np.isfinite(found).any()  # 40 · 100² is beyond 65504


def test_features_have_the_draws_and_the_projection_of_the_method(finished, monkeypatch):
  """Rounded to float32, which is not at all, the scores are those of the method itself."""
  monkeypatch.setitem(rounded.HALVES, "dtrak", ("float32",))
  found = scoring.scored(finished, rounded.RoundedRow("dtrak", None, "float32"))
  expected = scoring.scored(finished, scoring.Row("dtrak", None))
  assert found[-1].settings["damping"] == expected[-1].settings["damping"] == 1e-2
  # An inverse in float32 against an eigendecomposition in float64, well damped.
  scale = np.abs(expected[-1].values).max()
  np.testing.assert_allclose(found[-1].values, expected[-1].values, atol=1e-3 * scale)


def test_influence_in_half_precision_takes_the_passes_of_the_run(finished, tmp_path):
  """As `influence` does."""
  section = dataclasses.replace(finished.config.score, passes=0)
  run = dataclasses.replace(
    finished, config=dataclasses.replace(finished.config, score=section),
    folders={"score": tmp_path},
  )  # fmt: skip
  with pytest.raises(ValueError, match="passes must be at least 1; got 0"):
    scoring.scored(run, rounded.RoundedRow("influence", "loss", "bfloat16"))


def test_a_precision_that_a_method_lacks_is_refused():
  row = rounded.RoundedRow("influence", "loss", "float16")
  assert row.name == "influence, loss in float16"
  with pytest.raises(ValueError, match="no influence in float16"):
    row.scores(None, None)
  kind = rounded.RoundedRow("trak", "loss", "float16").kind
  assert kind.default_damping == method_named("trak").default_damping
