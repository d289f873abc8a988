"""Rank stability: what repeats is trusted, noise agrees by chance, closed forms between them."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import rank_stability, split_weights, top_overlap


def scores_of(replicate_values, query_replicate_values=None) -> Scores:
  single = lambda x: None if x is None else np.asarray(x, np.float32)
  num_queries, num_train = np.shape(replicate_values)[1:]
  return Scores(
    single(replicate_values), np.arange(num_queries), np.arange(num_train), {},
    query_replicate_values=single(query_replicate_values),
  )  # fmt: skip


def normal(*shape, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def four_errors(values) -> float:
  """Four standard errors of the mean over queries."""
  return 4 * np.std(values, ddof=1) / np.sqrt(len(values))


def assert_same(ours, theirs):
  for field in dataclasses.fields(ours):
    np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_without_noise_all_depths_are_trusted():
  stability = rank_stability(scores_of(np.repeat(normal(1, 3, 121), 5, axis=0)))
  np.testing.assert_array_equal(stability.depths, [1, 2, 3, 5, 10, 20, 50, 60])
  assert (stability.overlap == 1).all()
  assert (stability.correlation == 1).all() and (stability.reliability == 1).all()
  np.testing.assert_array_equal(stability.depth(1.0), [60, 60, 60])
  np.testing.assert_allclose(stability.chance, stability.depths / 121, rtol=1e-15)


def test_pure_noise_agrees_by_chance():
  stability = rank_stability(scores_of(normal(4, 400, 200)))
  for column, chance in enumerate(stability.chance):
    overlap = stability.overlap[:, column]
    assert abs(overlap.mean() - chance) < four_errors(overlap)
  assert abs(stability.correlation.mean()) < four_errors(stability.correlation)
  assert (stability.depth() == 0).all()
  assert (stability.reliability >= 0).all()


def test_gaussian_scores_of_known_reliability():
  """A signal of variance 1 and noise of variance 2 in each group: halves of 2 groups have r = ½."""
  signal = normal(1, 300, 500, seed=1)
  stability = rank_stability(scores_of(signal + np.sqrt(2) * normal(4, 300, 500)))
  r = 1 / (1 + 2 / 2)
  # Spearman's correlation of a bivariate Gaussian is 6/π arcsin(r/2), with a bias below 1/N. The
  # top halves overlap by 2 P(both > 0) = ½ + arcsin(r)/π (Sheppard).
  spearman, sheppard = 6 / np.pi * np.arcsin(r / 2), 0.5 + np.arcsin(r) / np.pi
  correlation, overlap = stability.correlation, stability.overlap[:, -1]
  assert abs(correlation.mean() - spearman) < four_errors(correlation) + 1 / 500
  assert abs(overlap.mean() - sheppard) < four_errors(overlap) + 1 / 500
  # Four groups and four fresh ones: r = 1 / (1 + 2/4) = ⅔. Spearman and Brown's formula is exact
  # for Pearson's correlations, and for ranks 0.002 off here: 0.651 against 0.649.
  fresh = 6 / np.pi * np.arcsin((2 / 3) / 2)
  reliability = stability.reliability
  assert abs(reliability.mean() - fresh) < 0.002 + four_errors(reliability) + 1 / 500


@pytest.mark.parametrize("num_groups, num_query_groups", [(2, 0), (3, 2), (5, 0), (2, 5)])
def test_equals_a_loop_over_all_splits(num_groups, num_query_groups):
  train = normal(num_groups, 2, 23) + normal(1, 2, 23, seed=1)
  query = normal(num_query_groups, 2, 23, seed=2) if num_query_groups else None
  scores = scores_of(train, query)
  stability = rank_stability(scores, num_splits=10**6)
  whole = 0 if query is None else query.mean(axis=0)
  permutations = lambda num: itertools.permutations(range(num))
  for q in range(2):
    overlaps, correlations = [], []
    for order, other in itertools.product(permutations(num_groups), permutations(num_query_groups)):
      halves = []
      for half in (0, 1):
        size, query_size = num_groups // 2, num_query_groups // 2
        h = train[list(order[half * size : (half + 1) * size])].mean(axis=0)
        if query is not None:
          picked = list(other[half * query_size : (half + 1) * query_size])
          h = h + query[picked].mean(axis=0) - whole
        halves.append(h[q])
      tops = lambda k, halves=halves: [set(np.argsort(-h)[:k].tolist()) for h in halves]
      overlaps.append([len(set.intersection(*tops(k))) / k for k in stability.depths.tolist()])
      correlations.append(spearmanr(*halves).statistic)
    # The same integers; sums of up to 720 float64 terms in another order.
    np.testing.assert_allclose(stability.overlap[q], np.mean(overlaps, axis=0), rtol=1e-12)
    assert stability.correlation[q] == pytest.approx(np.mean(correlations), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num_groups, num_query_groups", [(2, 0), (5, 0), (4, 3), (6, 4)])
def test_splits_are_distinct_disjoint_halves(num_groups, num_query_groups):
  # {2 | 2}: 1; of five 5!/(2! 2! 1!)/2 = 15; 3 of four times 6 ordered of three; 10 times 6.
  expected = {(2, 0): 1, (5, 0): 15, (4, 3): 18, (6, 4): 60}[num_groups, num_query_groups]
  for num_splits in (7, 1000):
    weights = split_weights(num_groups, num_query_groups, seed=3, num_splits=num_splits)
    assert len(weights) == min(num_splits, expected)
    swapped = np.concatenate([weights, weights[:, ::-1]])
    assert len(np.unique(swapped, axis=0)) == 2 * len(weights)
    train, query = weights[..., :num_groups], weights[..., num_groups:]
    assert (np.count_nonzero(train, axis=2) == num_groups // 2).all()
    assert not (train[:, 0] * train[:, 1]).any()
    np.testing.assert_allclose(train.sum(axis=2), 1, rtol=1e-15)
    np.testing.assert_allclose(query.sum(axis=2), 0, atol=1e-15)  # deviations from the mean
    assert ((query > 0).sum(axis=2) == num_query_groups // 2).all()
    assert not ((query[:, 0] > 0) & (query[:, 1] > 0)).any()


def test_order_of_examples_does_not_matter():
  train, query = normal(5, 3, 40), normal(4, 3, 40, seed=1)
  order = np.random.default_rng(2).permutation(40)
  ours = rank_stability(scores_of(train, query))
  assert_same(ours, rank_stability(scores_of(train[..., order], query[..., order])))


def test_noise_of_queries_counts_as_that_of_training_examples():
  """Where training replicates agree exactly, replicates of query draws take their place."""
  noisy = normal(4, 3, 60)
  still = np.repeat(noisy.mean(axis=0, keepdims=True), 4, axis=0)
  assert (rank_stability(scores_of(still)).correlation == 1).all()
  assert (rank_stability(scores_of(still, noisy[:1])).correlation == 1).all()  # one group is none
  ours, theirs = (rank_stability(scores_of(*x)) for x in ((still, noisy), (noisy,)))
  for name in ("overlap", "correlation"):
    # Still training replicates leave the splits of the query replicates, each once in either order.
    np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-15)
  assert (ours.correlation < 0.5).all()


def test_both_noises_add():
  """Equal noise of both sides halves as noise of twice the variance on one side does."""
  signal = normal(1, 300, 300, seed=1)
  train_noise, query_noise = normal(4, 300, 300), normal(4, 300, 300, seed=2)
  train = signal + train_noise + query_noise.mean(axis=0)
  query = signal + query_noise + train_noise.mean(axis=0)
  ours = rank_stability(scores_of(train, query)).correlation
  r = 1 / (1 + 1 / 2 + 1 / 2)  # each noise over two groups of variance 1
  # As above: four sampling errors, and a bias below 1/N.
  assert abs(ours.mean() - 6 / np.pi * np.arcsin(r / 2)) < four_errors(ours) + 1 / 300


def test_nothing_but_noise_on_both_sides_agrees_less_than_by_chance():
  """The price of groups of each side alone: halves of scores ⟨q, g⟩ with neither q nor g."""
  queries, examples = normal(4, 200, 300), normal(4, 200, 300, seed=1)
  by_train = queries.mean(axis=0) @ np.swapaxes(examples, 1, 2)
  stability = rank_stability(scores_of(by_train, queries @ examples.mean(axis=0).T))
  # h₁,₂ = ⟨q̄, g₁,₂⟩ ± ⟨δ, ḡ⟩, where |δ|² = |q̄|²: covariance −1 and variance 2 + 1, in |q̄|² σ²/G.
  expected = 6 / np.pi * np.arcsin(-1 / 3 / 2)
  correlation = stability.correlation
  # Off by some 1/300 for the spread of ⟨q̄, δ⟩ in 300 dimensions, and by up to 1/N.
  assert abs(correlation.mean() - expected) < four_errors(correlation) + 1 / 300 + 1 / 200
  assert (stability.depth() == 0).all()


@pytest.mark.parametrize("num_train", [2, 3, 1000])
def test_scores_that_do_not_differ_agree_by_chance(num_train):
  """Such as those of two identical images."""
  scores = scores_of(np.full((4, 1, num_train), 0.1))
  stability = rank_stability(scores)
  assert stability.correlation[0] == 0 and stability.reliability[0] == 0
  # N terms (k / N)² in float64.
  np.testing.assert_allclose(stability.overlap[0], stability.chance, rtol=1e-12)
  np.testing.assert_allclose(top_overlap(scores, 1), [1 / num_train], rtol=1e-12)
  assert stability.depth()[0] == 0


def test_ties_agree_as_the_mean_over_all_their_orders():
  halves = np.array([[3.0, 1, 2, 2, 2, 0], [5.0, 5, 2, 2, 2, 5]])
  stability = rank_stability(scores_of(halves[:, None]))
  orders = list(itertools.permutations(range(6)))
  tops = lambda h, k: [set(sorted(order, key=lambda n: -h[n])[:k]) for order in orders]
  for column, k in enumerate(stability.depths.tolist()):
    first, second = ([[n in top for n in range(6)] for top in tops(h, k)] for h in halves)
    # The orders of both halves are independent, so that shares of each example multiply.
    expected = np.mean(first, axis=0) @ np.mean(second, axis=0) / k
    assert stability.overlap[0, column] == pytest.approx(expected, rel=1e-12)
    assert top_overlap(scores_of(halves[:, None]), k) == pytest.approx(expected, rel=1e-12)
  assert stability.correlation[0] == pytest.approx(spearmanr(*halves).statistic, rel=1e-12)


def test_depth_asks_from_five_on_and_stops_at_the_first_failure():
  stability = rank_stability(scores_of(normal(2, 4, 100)))
  np.testing.assert_array_equal(stability.depths, [1, 2, 3, 5, 10, 20, 50])
  overlap = np.array([
    [0.0, 0.5, 0.0, 0.8, 0.9, 0.8, 0.9],  # a coin flipped at the top changes nothing
    [1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.9],  # agreement at 50 does not mend that at 20
    [1.0, 1.0, 1.0, 0.6, 0.9, 0.9, 0.9],
    [1.0, 1.0, 1.0, 1.0, 0.7, 0.9, 0.9],
  ])  # fmt: skip
  stability = dataclasses.replace(stability, overlap=overlap)
  np.testing.assert_array_equal(stability.depth(), [50, 10, 0, 5])
  np.testing.assert_array_equal(stability.depth(0.6), [50, 50, 50, 50])
  assert "agree on 82 % (worst query 70 %, chance 10 %)" in stability.summary()
  few = rank_stability(scores_of(np.repeat(normal(1, 1, 7), 2, axis=0)))
  np.testing.assert_array_equal(few.depths, [1, 2, 3])
  assert few.depth() == 3  # where there is no 5, ⌊N/2⌋ is asked


def test_top_overlap_is_that_of_rank_stability():
  scores = scores_of(normal(6, 3, 50) + normal(1, 3, 50, seed=1), normal(3, 3, 50, seed=2))
  stability = rank_stability(scores, seed=4, num_splits=5)
  for column, k in enumerate(stability.depths.tolist()):
    overlap = top_overlap(scores, k, seed=4, num_splits=5)
    np.testing.assert_allclose(overlap, stability.overlap[:, column], rtol=1e-15)
  assert (top_overlap(scores, 50) == 1).all()


def test_errors_say_what_to_do():
  one_group = scores_of(normal(1, 2, 10), normal(4, 2, 10))
  for compute in (rank_stability, lambda scores: top_overlap(scores, 3)):
    with pytest.raises(ValueError, match="scores have 1. Compute them with Draws"):
      compute(one_group)
  with pytest.raises(ValueError, match="k must lie in 1…10"):
    top_overlap(scores_of(normal(2, 2, 10)), 11)
  with pytest.raises(ValueError, match="num_splits must be at least 1"):
    rank_stability(scores_of(normal(2, 2, 10)), num_splits=0)
  with pytest.raises(ValueError, match="at least two training examples"):
    rank_stability(scores_of(normal(2, 2, 1)))
