"""Runs on every diffusion process that a config can describe, from training to a proof."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxinf.benchmark import measuring, retraining
from jaxinf.core.random import draw_keys, example_numbers, fold_in_each, stream
from jaxinf.diffusion.loss_weights import MinSNR
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.noise import predict
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.times import LogitNormal
from jaxinf.engine import artifacts
from jaxinf.runs import serving
from jaxinf.runs.perform import perform
from jaxinf.runs.process import process_of
from jaxinf.runs.run import load_scores
from jaxinf.runs.sections import DiffusionConfig
from tests.report.parsed import Page
from tests.running import run_of

SCHEDULE = Schedule.linear(20, 1e-4, 0.02)
# What the section `diffusion` says besides its defaults, and the process that is meant.
MEANT = {
  "epsilon": ({"weight": "min_snr"}, Process.epsilon(SCHEDULE, MinSNR())),
  "sample": ({}, Process.sample(SCHEDULE)),
  "v": ({"zero_terminal_snr": True}, Process.v(SCHEDULE.with_zero_terminal_snr())),
  "flow": ({"time": "logit_normal", "shift": 3.0}, Process.flow(LogitNormal(), shift=3.0)),
  "edm": ({"sigma_data": 0.7}, Process.edm(0.7)),
}
# Rows and queries in float32, with the same draws in the store as in the attribution.
QUICK = {
  "sample.num_steps": 4,
  "attribute.compression": None,
  "index.compression": None,
  "report.num_queries": 1,
}


def changes_of(prediction: str) -> dict:
  fields = {"prediction": prediction, **MEANT[prediction][0]}
  return QUICK | {f"diffusion.{name}": value for name, value in fields.items()}


# All other runs are of epsilon, and sample differs from v in coefficients alone.
@pytest.fixture(
  scope="module", params=[name for name in MEANT if name not in ("epsilon", "sample")]
)
def finished(request, tmp_path_factory):
  """The name of a process, and a run on it whose samples are answered from a store too."""
  run = run_of(tmp_path_factory.mktemp(request.param) / "work", changes_of(request.param))
  perform(run, "all")
  perform(run, "index")
  return request.param, run


@pytest.mark.parametrize("name", MEANT)
def test_a_config_means_its_process(name, tmp_path):
  assert run_of(tmp_path, changes_of(name)).process == MEANT[name][1]


def test_the_store_answers_what_attribution_says(finished, tmp_path):
  """Two ways to the same scores: all at once, and from rows that were kept."""
  _, run = finished
  samples, scores = artifacts.read(run.folder("sample")).arrays, load_scores(run)
  np.savez(tmp_path / "samples.npz", images=samples["images"], ids=samples["ids"])
  asked = dataclasses.replace(run, images=tmp_path / "samples.npz")
  found, expected = serving.query(asked).arrays, scores.top(run.config.query.top_k)
  # Float32 rounding of gradients that turn into the eigenbasis.
  atol = 1e-4 * np.abs(scores.values).max()
  np.testing.assert_allclose(found["values"], expected.values, rtol=0, atol=atol)


def test_the_page_is_about_the_process(finished):
  name, run = finished
  page = Page((run.folder("report") / "index.html").read_text(encoding="utf-8"))
  assert f"diffusion.prediction {name}" in page.text
  assert len(page.images) == 1 + 3 * run.config.report.top_k


def test_a_proof_of_a_continuous_process_measures_its_own_loss(tmp_path):
  changes = changes_of("flow") | {
    "measure.measurements": ("loss", "loss_at_time(0.5)"),
    "score.measurements": ("loss",),
    "retrain.num_subsets": 3,
    "retrain.steps": 6,
    "train.steps": 6,
  }
  run = run_of(tmp_path, changes)
  perform(run, "benchmark")
  tables = artifacts.read(run.folder("evaluate")).notes["tables"]
  assert list(tables) == ["loss", "loss_at_time(0.5)"]
  for table in tables.values():
    assert np.isfinite([entry["default"]["mean"] for entry in table["entries"]]).all()
  # By hand, of one model: the mean over all draws of the squared error of ε − x_0.
  samples, process = artifacts.read(run.folder("sample")).arrays, run.process
  draws = run.draws(8, 2, run.config.measure.design)
  numbers = draws.numbers(example_numbers(samples["ids"]))
  keys = fold_in_each(stream(run.config.seed, "measure"), numbers)
  params = retraining.load_params(run, "subset-0001-seed-0")
  for name in tables:
    errors = []
    for first in (0, 4):  # of each replicate
      own = jax.vmap(lambda key: draw_keys(key, 4, first=first))(keys)  # noqa: B023
      pairs = measurement_named(name).pairs(process, samples["images"], own, draws=draws)
      assert name == "loss" or (pairs.t == 0.5).all()
      output = predict(run.apply_fn, params, pairs)
      errors.append(np.square(output - pairs.target).reshape(3, 4, -1).mean(axis=(1, 2)))
    found = measuring.retrained(run, name).values[1, 0]
    np.testing.assert_allclose(found, np.mean(errors, axis=0), rtol=1e-5)  # float32 sums


# --- what makes no sense ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("stage", "prediction", "field", "value", "message"),
  [
    ("benchmark", "flow", "measure.measurements", ("loss", "elbo"), "elbo needs discrete"),
    ("benchmark", "edm", "score.measurements", ("elbo",), "elbo needs discrete timesteps"),
    ("retrain", "flow", "measure.measurements", ("trajectory",), "trajectory needs discrete"),
    ("all", "flow", "attribute.measurement", "elbo", "elbo needs discrete timesteps"),
    ("all", "v", "attribute.measurement", "loss_at_time(0.5)", "of continuous processes"),
    ("all", "flow", "attribute.measurement", "loss_at_time(2)", r"must lie in \[0, 1\]"),
    ("all", "sample", "attribute.measurement", "loss_at_timestep(20)", r"must lie in \[0, 20\)"),
    ("query", "edm", "query.measurement", "elbo", "elbo needs discrete timesteps"),
    ("counterfactual", "flow", "counterfactual.measurement", "elbo", "elbo needs discrete"),
  ],
)
def test_measurements_that_the_process_lacks_are_refused_before_anything_begins(
  tmp_path, stage, prediction, field, value, message
):
  run = run_of(tmp_path, changes_of(prediction) | {field: value})
  with pytest.raises(ValueError, match=message):
    perform(run, stage)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"prediction": "epsilon", "zero_terminal_snr": True}, "Take Process.v or Process.sample"),
    ({"prediction": "v", "shift": 2.0}, "diffusion.shift is read where .* is flow; it is v"),
    ({"prediction": "epsilon", "time": "logit_normal"}, "diffusion.time is read where .* is flow"),
    ({"prediction": "edm", "weight": "p2"}, "diffusion.weight is read where .* flow; it is edm"),
    ({"prediction": "flow", "sigma_data": 0.6}, "diffusion.sigma_data is read where .* is edm"),
    ({"prediction": "flow", "time": "beta"}, "Unknown diffusion.time 'beta'; there are: "),
    ({"prediction": "v", "weight": "snr"}, "'snr'; there are: min_snr, p2, table"),
    ({"prediction": "v", "weight_gamma": 3.0}, "weight_gamma is read where diffusion.weight is mi"),
    ({"prediction": "flow", "time_std": 2.0}, "time_std is read where diffusion.time is logit_n"),
    ({"prediction": "v", "raw": True}, "diffusion.raw is read where .* is edm; it is v"),
    ({"table": (0.1, 0.2)}, "diffusion.table is read where diffusion.schedule is betas or alpha"),
    ({"schedule": "betas"}, "needs diffusion.table with 1000 numbers, .*; it has 0"),
    ({"weight": "table", "weight_table": (1.0,)}, "diffusion.weight_table with 1000 numbers"),
  ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    process_of(DiffusionConfig(**fields))


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (
      {"schedule": "betas", "table": (0.1, 0.2)},
      Process.epsilon(Schedule.from_betas([0.1, 0.2])),
    ),
    (
      {"prediction": "v", "schedule": "alpha_bars", "table": (0.5, 0.0)},
      Process.v(Schedule.from_alpha_bars([0.5, 0.0])),
    ),
    (
      {"prediction": "v", "weight": "min_snr", "weight_gamma": 3.0, "beta_end": 0.5},
      Process.v(Schedule.linear(2, 1e-4, 0.5), MinSNR(3.0)),
    ),
    (
      {"prediction": "sample", "weight": "table", "weight_table": (1.0, 3.0)},
      Process.sample(Schedule.linear(2, 1e-4, 0.02), [1.0, 3.0]),
    ),
    (
      {"prediction": "flow", "time": "logit_normal", "time_mean": 0.5},
      Process.flow(LogitNormal(0.5, 1.0)),
    ),
    (
      {"prediction": "edm", "raw": True, "time_mean": -0.4, "time_std": 1.0},
      Process.edm(0.5, -0.4, 1.0, raw=True),
    ),
  ],
)
def test_every_process_can_be_said_in_a_config(fields, expected):
  assert process_of(DiffusionConfig(num_steps=2, **fields)) == expected
