"""The noise of scores: standard errors that are right, draws that stop when there are enough."""

import logging

import numpy as np
import pytest

import jaxinf
from jaxinf import Draws
from jaxinf.scores.stability import top_overlap
from tests.twins import INDEPENDENT, assert_close


def score(problem, draws: Draws, query_draws: Draws | None = None):
  return jaxinf.influence(
    **problem, damping=1e-3, draws=draws, query_draws=query_draws, compression=None
  )


@pytest.mark.parametrize("design", [INDEPENDENT, {}], ids=["independent", "default"])
def test_standard_errors_over_training_draws_are_calibrated(problem, design):
  """400 replicates are 80 repetitions of scores from five: their spread is what each says it is."""
  repetitions, replicates = 80, 5
  num = repetitions * replicates
  scores = score(problem, Draws(4 * num, num, **design, seed=5), Draws(40, 1, **design, seed=5))
  truth = scores.values
  split = scores.replicate_values.reshape(repetitions, replicates, *truth.shape)
  repeated = [jaxinf.Scores(part, scores.query_ids, scores.train_ids, {}) for part in split]
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
  runs = [score(problem, Draws(40, 5, seed=seed), Draws(4, 2, seed=seed)) for seed in range(12)]
  spread = np.var([r.values for r in runs], axis=0, ddof=1).mean()
  said = np.mean([r.std_errors**2 for r in runs])
  train_alone = np.mean([r.replicate_values.var(axis=0, ddof=1) / 5 for r in runs])
  # Two replicates of queries leave one degree of freedom, shared by all 11 training images: the
  # mean over 3 queries and 12 seeds has a relative error of √(2 / 36) = 0.24.
  assert 0.4 < said / spread < 2
  assert train_alone < 0.4 * spread


def test_more_draws_have_smaller_errors(problem):
  few, many = (score(problem, Draws(num, 4, seed=5)).std_errors.mean() for num in (8, 128))
  assert 0.1 < many / few < 0.5  # a quarter, but for the noise of errors from four replicates


def test_rounds_stop_when_the_top_is_stable_and_say_so(problem, caplog):
  caplog.set_level(logging.INFO, logger="jaxinf")
  draws = Draws.until_stable(top_k=3, agreement=0.7, replicates=4, size=4, most=1600, seed=5)
  scores = score(problem, draws, Draws(64, seed=5))
  num = scores.settings["draws"]
  assert 16 <= num <= 1600 and num % 16 == 0
  assert top_overlap(scores, 3).mean() >= 0.7 or num == 1600
  assert len(scores.replicate_values) == 4
  assert f"after {num} draws" in caplog.text
  # The rounds are the draws that as many at once would be, replicate by replicate.
  at_once = score(problem, Draws(num, num // 4, seed=5), Draws(64, seed=5))
  rounds = at_once.replicate_values.reshape(-1, 4, *scores.values.shape).mean(axis=0)
  assert_close(scores.replicate_values, rounds, 1e-5)  # float32 sums in another order


def test_rounds_end_at_the_most_and_say_that_they_fell_short(problem, caplog):
  caplog.set_level(logging.INFO, logger="jaxinf")
  draws = Draws.until_stable(top_k=5, agreement=1.0, replicates=2, size=1, most=5, seed=5)
  scores = score(problem, draws, Draws(2, seed=5))
  assert scores.settings["draws"] == 4  # a third round of two would be more than 5
  assert "stopped short of 100%" in caplog.text
