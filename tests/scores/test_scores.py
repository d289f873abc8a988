"""Standard errors of scores: how far these may be off for the noise of both gradients."""

import dataclasses

import numpy as np
import pytest

from jaxinf.scores.scores import Scores


def bilinear_scores(*, noise, num_groups=4, num_query_groups=3, num_repeats=40_000, size=3):
  """Scores [repeats, 1] of one query and one example, from noisy groups of both gradients; truth.

  Each gradient has `size` entries, and a group's are off by N(0, noise²).
  """
  rng = np.random.default_rng(0)
  query, example = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 2.0])
  noisy = lambda v, num: v + noise * rng.normal(size=(num, num_repeats, size))
  queries, examples = noisy(query, num_query_groups), noisy(example, num_groups)
  product = lambda a, b: np.sum(a * b, axis=-1, keepdims=True).astype(np.float32)
  scores = Scores(
    product(examples, queries.mean(axis=0)), np.arange(num_repeats), np.arange(1), {},
    query_group_values=product(queries, examples.mean(axis=0)),
  )  # fmt: skip
  return scores, query, example


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_std_errors_are_as_large_as_the_deviations_from_the_truth(noise):
  scores, query, example = bilinear_scores(noise=noise)
  squares = scores.std_errors[:, 0].astype(np.float64) ** 2
  deviations = (scores.values[:, 0].astype(np.float64) - query @ example) ** 2
  # Var of a product of means: first order |q|² σ²/G + |g|² σ²/A, second d σ⁴ / (G A). Groups see
  # the second-order term on both sides.
  first = noise**2 * (query @ query / 4 + example @ example / 3)
  second = 3 * noise**4 / 12
  ratio = (first + 2 * second) / (first + second)
  assert ratio == pytest.approx(1, abs=0.001 if noise == 0.1 else 0.1)
  within = lambda x: 4 * x.std() / np.sqrt(len(x))  # four sampling errors of the mean over repeats
  assert abs((squares - ratio * deviations).mean()) < within(squares - ratio * deviations)
  assert abs((squares - first - 2 * second).mean()) < within(squares)


def test_values_and_errors_of_groups_in_closed_form():
  # Training groups 1, 3: variance 2, mean 2. Query groups 0, 2, 4: variance 4, mean 2.
  column = lambda *values: np.array(values, np.float32).reshape(-1, 1, 1)
  scores = Scores(column(1, 3), np.arange(1), np.arange(1), {}, column(0, 2, 4))
  assert scores.values.item() == 2
  # One rounding of float32 or two.
  assert scores.std_errors.item() == pytest.approx(np.sqrt(2 / 2 + 4 / 3), rel=3e-7)
  for ungrouped in (None, column(2)):
    alone = dataclasses.replace(scores, query_group_values=ungrouped)
    assert alone.std_errors.item() == 1  # over training draws alone
  one_group = dataclasses.replace(scores, group_values=column(2))
  assert np.isnan(one_group.std_errors).all() and one_group.std_errors.shape == (1, 1)
  assert scores.top(1).std_errors == scores.std_errors
