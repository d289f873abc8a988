"""Damping from draws alone: fidelity is the correlation it says, and its best λ is the true one.

Standard errors hold where all queries share their draws, and noise is refused.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxinf.core.damping import RelativeDamping
from jaxinf.scores.damping import TooFewDraws, fidelity, recommend_damping, weigh_dampings
from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import rank_stability
from jaxinf.scores.sweep import Sweep

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
EIGENVALUES = 1 / np.arange(1, 31) ** 2.0  # Λ: gradients are N(0, Λ) before noise


def scores_of(replicate_values, damping) -> Scores:
  num_queries, num_train = replicate_values.shape[1:]
  ids = np.arange(num_queries), np.arange(num_train)
  return Scores(np.asarray(replicate_values, np.float32), *ids, {"damping": damping})


def toy_sweep(*, train_noise, query_noise=0.0, num_queries=20, num_train=300, seed=0):
  """Scores Σ_i q_i g_ni / (Λ_i + λ) in 4 + 4 replicates of draws, and the noise-free ones [L, Q,
  N].

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
        query_replicate_values=by_query if query_noise else None,
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
    differences.append((fidelity(sweep) - true_fidelity(sweep, truths)).mean(axis=1))
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
  for q, found in enumerate(fidelity(sweep).T):
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
    np.testing.assert_allclose(found, expected, rtol=1e-10)


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
  ungrouped = [dataclasses.replace(scores, query_replicate_values=None) for scores in sweep]
  truth = dict(zip(DAMPINGS, true_fidelity(sweep, truths).mean(axis=1), strict=True))
  assert truth[DAMPINGS[0]] < 0.8 * max(truth.values())
  assert truth[recommend_damping(sweep).recommended] > 0.95 * max(truth.values())
  # Without groups the noisy query gradients pass for the queries themselves.
  assert recommend_damping(ungrouped).recommended == DAMPINGS[0]


def test_agreement_is_that_of_rank_stability():
  sweep, _ = toy_sweep(train_noise=0.1, query_noise=0.1, num_queries=3, num_train=50)
  agreement = recommend_damping(sweep, seed=2, num_splits=4).agreement
  for row, scores in zip(agreement, sweep, strict=True):
    stability = rank_stability(scores, seed=2, num_splits=4)
    np.testing.assert_allclose(row, stability.correlation, rtol=1e-12)  # sums in another order


def test_where_noise_hides_the_scores_at_the_smallest_damping_only_ratios_remain():
  # Over n, a, b and c are uncorrelated with variance 1. λ₀ in three groups a + 2b, a − b + √3 c and
  # a − b − √3 c, whose noises have the products −2: T(λ₀) = 1 − 2 and std(s) = 1. λ = 2a, still:
  # T = 2, std 2. Ratios −1 and 1, and the largest magnitude is 1.
  signs = np.array(list(itertools.product((1.0, -1.0), repeat=3))).T
  a, b, c = np.tile(signs, 30)
  noisy = [a + 2 * b, a - b + 3**0.5 * c, a - b - 3**0.5 * c]
  values = np.array([noisy, [2 * a] * 3])[:, :, None]
  found = recommend_damping([scores_of(values[0], 0.1), scores_of(values[1], 0.2)])
  np.testing.assert_allclose(found.fidelity, [[-1], [1]], rtol=1e-6)  # √3 in float32
  assert found.recommended == 0.2


def test_of_a_relative_sweep_the_recommended_damping_is_relative():
  """Else it would be taken for a λ where scores are made with it."""
  sweep, _ = toy_sweep(train_noise=0.01, num_queries=3, num_train=50)
  kind = {"damping_kind": "relative"}
  relative = [dataclasses.replace(s, settings={**s.settings, **kind}) for s in sweep]
  found = recommend_damping(relative)
  assert found.recommended == RelativeDamping(recommend_damping(sweep).recommended)
  assert found.table().lstrip().startswith("relative ρ")


def test_scores_that_do_not_vary_recommend_nothing():
  constant = [scores_of(np.full((3, 1, 4), 0.1), damping) for damping in (0.1, 0.2)]
  with pytest.raises(TooFewDraws, match="Rank correlation of halves: 0.000 ± 0.000 at 0.1, "):
    recommend_damping(constant)


def test_recommends_the_least_damping_within_one_standard_error_whose_scores_repeat():
  found = weigh_dampings(toy_sweep(train_noise=0.1, num_queries=4, num_train=50)[0])
  found = dataclasses.replace(
    found,
    fidelity=np.array([[0.4, 0.4], [0.4, 0.5], [0.5, 0.5], [0.4, 0.4], [0.2, 0.2]]),
    fidelity_errors=np.full(5, 0.3),
    loss_errors=np.array([0.09, 0.06, 0.0, 0.2, 0.2]),
    repeats=np.full(5, True),
  )
  assert found.recommended == DAMPINGS[1]
  marked = [line for line in found.table().splitlines() if "recommended" in line]
  assert len(marked) == 1 and marked[0].split()[0] == "0.01"
  assert "0.450 ± 0.300" in marked[0]
  noisy = dataclasses.replace(found, repeats=np.array([False, False, False, True, True]))
  with pytest.raises(TooFewDraws):  # what repeats is clearly less faithful than the best
    print(dataclasses.replace(noisy, loss_errors=np.zeros(5)).recommended)
  assert noisy.recommended == DAMPINGS[3]
  noise = dataclasses.replace(found, repeats=np.full(5, False))
  assert "recommended" not in noise.table()


def noise_sweep(rng, *, num_groups=5, num_query_groups=2, num_directions=30, signal=0.0):
  """Scores ⟨q, g⟩ of 6 queries and 20 examples; queries share nine tenths of their noise.

  With a signal, true gradients of that size are added on both sides, the same in every call.
  """
  normal = np.random.default_rng(0).normal
  truth = normal(size=(6, num_directions)), normal(size=(20, num_directions))
  own = rng.normal(size=(num_query_groups, 6, num_directions))
  common = rng.normal(size=(num_query_groups, 1, num_directions))
  queries = 0.9**0.5 * common + 0.1**0.5 * own + signal * truth[0]
  examples = rng.normal(size=(num_groups, 20, num_directions)) + signal * truth[1]
  by_train = queries.mean(axis=0) @ np.swapaxes(examples, 1, 2)
  by_query = (queries @ examples.mean(axis=0).T).astype(np.float32)
  scores = dataclasses.replace(
    scores_of(by_train, 0.1), query_replicate_values=by_query if num_query_groups > 1 else None
  )
  return [scores, dataclasses.replace(scores, settings={"damping": 0.2})]


@pytest.mark.parametrize(
  "options",
  [dict(num_groups=n, num_query_groups=a) for n in (3, 5) for a in (1, 2)],
)
def test_noise_with_shared_draws_is_refused(options):
  """Its agreement over all queries moves as that of one query, and the spread hides it."""
  rng = np.random.default_rng(1)
  recommended = 0
  for _ in range(40):
    try:
      recommend_damping(noise_sweep(rng, **options))
      recommended += 1
    except TooFewDraws as error:
      assert str(error).startswith("Too few draws to recommend a damping")
  assert recommended <= 6  # 5 % of 40 are meant to, and 6 has a chance of 1.4 % then


@pytest.mark.parametrize(
  "options, low, high",
  [
    # Noise alone: the jackknife counts products of two groups' noises twice, variance × 2, and
    # what it tells of is the statistic of 4 groups, which has more variance than that of 5.
    (dict(num_query_groups=1), 1.0, 2.6),
    (dict(num_query_groups=2), 1.0, 2.6),
    (dict(num_query_groups=1, signal=1.0), 0.7, 1.4),
    # The squared difference of two replicates of query draws, which agreement lacks, has its
    # chance.
    (dict(num_query_groups=2, signal=1.0), 0.4, 1.4),
  ],
)
def test_errors_of_agreement_hold_where_queries_share_their_draws(options, low, high):
  rng = np.random.default_rng(2)
  means, errors, naive = [], [], []
  for _ in range(40):
    found = weigh_dampings(noise_sweep(rng, **options))
    means.append(found.agreement[0].mean())
    errors.append(found.agreement_errors[0])
    naive.append(found.agreement[0].std(ddof=1) / 6**0.5)
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  # A standard deviation of 40 numbers is off by a ninth.
  assert low < rms(errors) / np.std(means) < high
  assert rms(naive) < 0.7 * np.std(means)  # queries are not independent


def test_a_sweep_needs_two_dampings_in_three_groups_of_draws():
  sweep, _ = toy_sweep(train_noise=0.01, num_queries=2, num_train=20)
  fewer = [
    dataclasses.replace(scores, replicate_values=scores.replicate_values[:2]) for scores in sweep
  ]
  found = weigh_dampings(fewer)
  assert (found.agreement > 0.9).all() and np.isnan(found.fidelity_errors).all()
  with pytest.raises(TooFewDraws, match="from 3 replicates of training draws on"):
    recommend_damping(fewer)
  alone = [
    dataclasses.replace(scores, replicate_values=scores.replicate_values[:1]) for scores in sweep
  ]
  with pytest.raises(
    ValueError, match="at least 2 replicates of training draws; the scores have 1"
  ):
    weigh_dampings(alone)
  with pytest.raises(ValueError, match="at least two dampings"):
    recommend_damping(Sweep(sweep[:1]))
  with pytest.raises(ValueError, match="each damping once"):
    recommend_damping([sweep[0], sweep[0]])
