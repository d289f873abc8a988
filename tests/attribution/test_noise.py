"""The noise of scores: standard errors that are right, draws that stop when there are enough."""

import logging

import numpy as np
import pytest

import jaxinf
from jaxinf.diffusion.noise import UNIFORM, DrawDesign
from jaxinf.scores.stability import top_overlap
from tests import nets

NUM_TRAIN, NUM_QUERIES = 11, 3


@pytest.fixture(scope="module")
def problem():
  task = nets.conv_task()
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  return task, jaxinf.fit_curvature(task, train, draws=20, seed=0), queries, train


def score(problem, **settings):
  defaults = dict(damping=1e-3, seed=5, compression=None)
  return jaxinf.influence(*problem, **(defaults | settings))


@pytest.mark.parametrize("design", [UNIFORM, DrawDesign()], ids=["uniform", "default"])
def test_standard_errors_over_training_draws_are_calibrated(problem, design):
  """400 groups are 80 repetitions of scores from five: their spread is what each says it is."""
  repetitions, groups = 80, 5
  scores = score(
    problem, draws=4 * repetitions * groups, draw_groups=repetitions * groups, design=design,
    query_draws=40, query_groups=1,
  )  # fmt: skip
  truth = scores.values
  split = scores.group_values.reshape(repetitions, groups, NUM_QUERIES, NUM_TRAIN)
  repeated = [
    jaxinf.Scores(part, scores.query_ids, scores.train_ids, {}) for part in split
  ]  # fmt: skip
  errors = np.stack([r.std_errors for r in repeated])
  z = (np.stack([r.values for r in repeated]) - truth) / errors
  # Student's t with 4 degrees has the variance 2, heavy tails, and |t| below 0.74 half of the time.
  # 80 repetitions of 33 scores, which share draws: some 10 % of a share of ½.
  assert abs(np.mean(np.abs(z) < 0.741) - 0.5) < 0.05
  ratio = np.mean(errors**2) / np.mean((np.stack([r.values for r in repeated]) - truth) ** 2)
  # The truth holds each repetition with weight 1/80.
  assert ratio == pytest.approx(80 / 79, rel=0.15)


def test_standard_errors_count_the_draws_of_queries(problem):
  """Over seeds, scores spread as their standard errors say, and not if queries are left out."""
  seeds = range(12)
  runs = [
    score(problem, draws=40, draw_groups=5, query_draws=4, query_groups=2, seed=seed)
    for seed in seeds
  ]
  spread = np.var([r.values for r in runs], axis=0, ddof=1).mean()
  said = np.mean([r.std_errors**2 for r in runs])
  train_alone = np.mean([r.group_values.var(axis=0, ddof=1) / 5 for r in runs])
  # Two groups of queries leave one degree of freedom, shared by all 11 training images: the mean
  # over 3 queries and 12 seeds has a relative error of √(2 / 36) = 0.24.
  assert 0.4 < said / spread < 2
  assert train_alone < 0.4 * spread


def test_more_draws_have_smaller_errors(problem):
  few, many = (score(problem, draws=draws, draw_groups=4).std_errors.mean() for draws in (8, 128))
  assert 0.1 < many / few < 0.5  # a quarter, but for the noise of errors from four groups


def test_auto_draws_stop_when_the_top_is_stable_and_say_so(problem, caplog):
  caplog.set_level(logging.INFO, logger="jaxinf")
  stop = jaxinf.AutoDraws(top_k=3, agreement=0.7, num_groups=4, group_size=4, max_draws=1600)
  scores = score(problem, draws=stop, query_draws=64)
  draws = scores.settings["draws"]
  assert 16 <= draws <= 1600 and draws % 16 == 0
  assert top_overlap(scores, 3).mean() >= 0.7 or draws == 1600
  assert len(scores.group_values) == 4
  assert f"after {draws} draws" in caplog.text
  # The rounds are the draws that as many at once would be, group by group.
  at_once = score(problem, draws=draws, draw_groups=draws // 4, query_draws=64)
  rounds = at_once.group_values.reshape(-1, 4, NUM_QUERIES, NUM_TRAIN).mean(axis=0)
  atol = 1e-5 * np.abs(rounds).max()  # float32 sums in another order
  np.testing.assert_allclose(scores.group_values, rounds, rtol=0, atol=atol)


def test_auto_draws_end_at_their_most_and_say_that_they_fell_short(problem, caplog):
  caplog.set_level(logging.INFO, logger="jaxinf")
  stop = jaxinf.AutoDraws(top_k=5, agreement=1.0, num_groups=2, group_size=1, max_draws=5)
  scores = score(problem, draws=stop, query_draws=2)
  assert scores.settings["draws"] == 4  # a third round of two would be more than 5
  assert "stopped short of 100%" in caplog.text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"agreement": 0.0}, "agreement must lie in"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"num_groups": 1}, "num_groups must be at least 2"),
    ({"max_draws": 0}, "max_draws must be at least 1"),
  ],
)
def test_impossible_stopping_rules_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.AutoDraws(**change)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"draws": "many"}, 'draws must be a number, "auto" or an AutoDraws'),
    ({"draws": 8, "query_groups": 3}, "query_groups must divide query_draws"),
    ({"draws": 8, "query_blocks": 0}, "query_blocks must be at least 1"),
    ({"draws": 8, "compression": "projection"}, "cannot be restored batch by batch"),
    ({"draws": 8, "precision": "float8"}, "Unknown precision"),
  ],
)
def test_impossible_settings_are_refused(problem, settings, message):
  with pytest.raises(ValueError, match=message):
    score(problem, **settings)
