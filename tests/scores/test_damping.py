"""Damping from draws alone: fidelity is the correlation it says, and its best λ is the true one."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from jaxinf.scores.damping import recommend_damping
from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import rank_stability

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
EIGENVALUES = 1 / np.arange(1, 31) ** 2.0  # Λ: gradients are N(0, Λ) before noise


def scores_of(group_values, damping) -> Scores:
  num_queries, num_train = group_values.shape[1:]
  ids = np.arange(num_queries), np.arange(num_train)
  return Scores(np.asarray(group_values, np.float32), *ids, {"damping": damping})


def toy_sweep(*, train_noise, query_noise=0.0, num_queries=20, num_train=300, seed=0):
  """Scores Σ_i q_i g_ni / (Λ_i + λ) in 4 + 4 groups of draws, and the noise-free ones [L, Q, N].

  Every entry of a group's gradients is off by N(0, noise²).
  """
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=(*shape, len(EIGENVALUES)))
  queries, examples = (np.sqrt(EIGENVALUES) * normal(num) for num in (num_queries, num_train))
  noisy_queries = queries + query_noise * normal(4, num_queries)
  noisy_examples = examples + train_noise * normal(4, num_train)
  sweep, truths = [], []
  for damping in DAMPINGS:
    product = lambda q, g, damping=damping: (q / (EIGENVALUES + damping)) @ np.swapaxes(g, -1, -2)
    by_train = product(noisy_queries.mean(axis=0), noisy_examples).astype(np.float32)
    by_query = product(noisy_queries, noisy_examples.mean(axis=0)).astype(np.float32)
    sweep.append(
      dataclasses.replace(
        scores_of(by_train, damping),
        settings={"damping": damping, "draws": 8},
        query_group_values=by_query if query_noise else None,
      )
    )
    truths.append(product(queries, examples))
  return sweep, np.array(truths)


def correlations(a, b) -> np.ndarray:
  """Pearson's, over the last axis."""
  a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
  return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def true_fidelity(sweep, truths) -> np.ndarray:
  """[L, Q] correlation of the scores at each damping with the noise-free ones at the smallest."""
  noisy = np.array([scores.values for scores in sweep], np.float64)
  return correlations(noisy, truths[0])


@pytest.mark.parametrize(
  "noise, bias",
  [
    # Of order noise² / N: σ₀ is a square root of an estimate.
    (dict(train_noise=0.15), 0.002),
    # Reliabilities multiply exactly only where all directions are equally noisy.
    (dict(train_noise=0.1, query_noise=0.03), 0.01),
    (dict(train_noise=0.05, query_noise=0.1), 0.035),
  ],
)
def test_fidelity_is_the_correlation_with_noise_free_scores(noise, bias):
  differences = []
  for seed in range(25):
    sweep, truths = toy_sweep(**noise, num_train=500, seed=seed)
    fidelity = recommend_damping(sweep, num_splits=1).fidelity
    differences.append((fidelity - true_fidelity(sweep, truths)).mean(axis=1))
  sampling = 4 * np.std(differences, axis=0, ddof=1) / np.sqrt(25)
  assert sampling.max() < 0.03  # the repetitions say something
  assert (np.abs(np.mean(differences, axis=0)) < sampling + bias).all()


@pytest.mark.parametrize("num_groups", [2, 5])
def test_fidelity_equals_a_loop_over_halves_of_the_draws(num_groups):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(2, 1, 3, 40)) + 0.7 * rng.normal(size=(2, num_groups, 3, 40))
  values[1] += values[0]
  sweep = [scores_of(groups, damping) for groups, damping in zip(values, (0.1, 0.2), strict=True)]
  values = values.astype(np.float32).astype(np.float64)
  half = num_groups // 2
  for q, fidelity in enumerate(recommend_damping(sweep).fidelity.T):
    covariances = []  # of half 1 at λ and half 2 at λ₀, over all ordered splits
    for order in itertools.permutations(range(num_groups)):
      first, second = list(order[:half]), list(order[half : 2 * half])
      reference = values[0, second, q].mean(axis=0)
      covariances.append(
        [np.cov(v[first, q].mean(axis=0), reference, ddof=0)[0, 1] for v in values]
      )
    covariance = np.mean(covariances, axis=0)
    expected = covariance / values[:, :, q].mean(axis=1).std(axis=1) / np.sqrt(covariance[0])
    assert (expected < 1).all()  # the level is known
    # float64 on both sides, sums in another order.
    np.testing.assert_allclose(fidelity, expected, rtol=1e-10)


def test_without_noise_fidelity_is_the_bias_of_damping_alone():
  sweep, truths = toy_sweep(train_noise=0.0)
  found = recommend_damping(sweep[::-1])  # in any order
  np.testing.assert_array_equal(found.dampings, DAMPINGS)
  # Scores are rounded to float32: correlations change by its square, and by sums' rounding.
  np.testing.assert_allclose(found.fidelity, correlations(truths, truths[0]), atol=1e-6)
  np.testing.assert_allclose(found.agreement, 1, atol=1e-3)  # but near ties may swap their ranks
  assert found.recommended == DAMPINGS[0]
  assert found.settings == {"draws": 8}


@pytest.mark.parametrize("noise", [dict(train_noise=0.01), dict(train_noise=0.3)])
def test_the_recommended_damping_is_the_truly_best(noise):
  """Little noise: the smallest. Much: in between, though agreement alone would take the largest."""
  fidelities, recommended = [], []
  for seed in range(10):
    sweep, truths = toy_sweep(**noise, seed=seed)
    found = recommend_damping(sweep)
    assert (np.diff(found.agreement.mean(axis=1)) > 0).all()
    fidelities.append(true_fidelity(sweep, truths).mean(axis=1))
    recommended.append(DAMPINGS.index(found.recommended))
  mean = np.mean(fidelities, axis=0)
  if noise["train_noise"] == 0.01:
    assert mean.argmax() == 0 and recommended == [0] * 10
  else:
    # The true optimum is flat from 0.01 to 0.1, and one step further loses a fifth.
    assert mean[1:3].min() > 0.95 * mean.max() and mean[3] < 0.8 * mean.max()
    assert set(recommended) <= {1, 2}


def test_noise_of_queries_counts_where_their_draws_are_grouped():
  sweep, truths = toy_sweep(train_noise=0.01, query_noise=0.3)
  ungrouped = [dataclasses.replace(scores, query_group_values=None) for scores in sweep]
  truth = dict(zip(DAMPINGS, true_fidelity(sweep, truths).mean(axis=1), strict=True))
  assert truth[DAMPINGS[0]] < 0.8 * max(truth.values())
  assert truth[recommend_damping(sweep).recommended] > 0.95 * max(truth.values())
  # Without groups the noisy query gradients pass for the queries themselves.
  assert recommend_damping(ungrouped).recommended == DAMPINGS[0]


def test_agreement_is_that_of_rank_stability():
  sweep, _ = toy_sweep(train_noise=0.1, query_noise=0.1, num_queries=3, num_train=50)
  agreement = recommend_damping(sweep, seed=2, num_splits=4).agreement
  for row, scores in zip(agreement, sweep, strict=True):
    np.testing.assert_array_equal(row, rank_stability(scores, seed=2, num_splits=4).correlation)


def test_where_noise_hides_the_scores_at_the_smallest_damping_only_ratios_remain():
  # Over n, a and b are uncorrelated with variance 1. λ₀ in two groups a ± 2b: T(λ₀) = 1 − 4 and
  # std(s) = 1. λ = 2a, still: T = 2, std 2. Ratios −3 and 1, and the largest magnitude is 3.
  a, b = np.array([1, 1, -1, -1.0]), np.array([1, -1, 1, -1.0])
  values = np.array([[a + 2 * b, a - 2 * b], [2 * a, 2 * a]])[:, :, None]
  found = recommend_damping([scores_of(values[0], 0.1), scores_of(values[1], 0.2)])
  np.testing.assert_allclose(found.fidelity, [[-1], [1 / 3]], rtol=1e-12)
  assert found.recommended == 0.2  # one query has no standard error: the best
  constant = [scores_of(np.ones((2, 1, 4)), damping) for damping in (0.1, 0.2)]
  assert (recommend_damping(constant).fidelity == 0).all()


def test_recommends_the_least_damping_within_one_standard_error():
  sweep = [scores_of(np.random.default_rng(0).normal(size=(2, 4, 9)), x) for x in (1, 2, 3)]
  # Paired differences from the best, the last: 0.1 ± 0.058 and 0.05 ± 0.065.
  fidelity = np.array([[0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.4, 0.6, 0.4, 0.6]])
  found = dataclasses.replace(recommend_damping(sweep), fidelity=fidelity)
  assert found.recommended == 2
  marked = [line for line in found.table().splitlines() if "recommended" in line]
  assert len(marked) == 1 and marked[0].split()[0] == "2"
  assert "0.450 ± 0.029" in marked[0]  # std 0.0577 / √4


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(settings={"damping": 0.1}), "two dampings, each once"),
    (dict(settings={}), 'need settings["damping"]'),
    (dict(query_ids=np.arange(1, 3)), "at 0.2 have other query ids than those at 0.1"),
    (dict(train_ids=np.arange(9)[::-1]), "other training ids"),
    (dict(group_values=np.zeros((3, 2, 9))), "other groups of draws"),
    (dict(query_group_values=np.zeros((3, 2, 9))), "other groups of draws"),
    (dict(settings={"damping": 0.2, "seed": 1}), "other settings"),
  ],
)
def test_scores_that_are_no_sweep_are_refused(change, message):
  scores = scores_of(np.random.default_rng(0).normal(size=(2, 2, 9)), 0.1)
  other = dataclasses.replace(scores, **({"settings": {"damping": 0.2}} | change))
  with pytest.raises(ValueError, match=re.escape(message)):
    recommend_damping([scores, other])


def test_a_sweep_needs_two_dampings_in_two_groups_of_draws():
  sweep = [scores_of(np.zeros((1, 2, 9)), damping) for damping in (0.1, 0.2)]
  with pytest.raises(ValueError, match="draw_groups ≥ 2"):
    recommend_damping(sweep)
  with pytest.raises(ValueError, match="at least two dampings"):
    recommend_damping(sweep[:1])
