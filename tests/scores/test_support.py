"""The support check finds what repeats under fresh draws, and calls noise noise."""

import dataclasses
import math

import numpy as np
import pytest

from jaxinf.scores.scores import Scores
from jaxinf.scores.support import support_check


def scores_of(replicate_values) -> Scores:
  replicate_values = np.asarray(replicate_values, np.float32)
  _, num_queries, num_train = replicate_values.shape
  return Scores(replicate_values, np.arange(num_queries), np.arange(num_train), settings={})


def noise(num_groups=6, num_queries=1500, num_train=400) -> np.ndarray:
  return np.random.default_rng(7).normal(size=(num_groups, num_queries, num_train))


def test_closed_form_where_all_but_the_chosen_score_alike():
  # The first two examples score 5, 6, 10 in the three groups, all others 1.
  values = np.ones((3, 1, 8))
  values[:, 0, :2] = np.array([5, 6, 10])[:, None]
  check = support_check(scores_of(values), k=2)
  np.testing.assert_array_equal(check.replicate_differences[:, 0], [4, 5, 9])
  assert check.differences[0] == 6
  # Variance of 4, 5, 9: (4 + 1 + 9) / 2 = 7.
  assert check.std_errors[0] == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
  assert check.z[0] == pytest.approx(6 / math.sqrt(7 / 3), rel=1e-12)
  assert math.isnan(check.mean_std_error)  # one query has no spread over queries
  # t = 3.93 does not reach the 4.30 of Student's t with 2 degrees.
  assert not check.repeats


@pytest.mark.parametrize("num_groups", [2, 3, 5])
def test_equals_a_loop_where_the_others_leave_no_choice(num_groups):
  k = 4
  values = noise(num_groups, num_queries=3, num_train=2 * k).astype(np.float32)
  check = support_check(scores_of(values), k=k)
  for q in range(3):
    for g in range(num_groups):
      other_fold = [h for h in range(num_groups) if h % 2 != g % 2]
      selection = np.mean([values[h, q] for h in other_fold], axis=0)
      chosen = set(np.argsort(selection)[-k:].tolist())
      mean = lambda ids, g=g, q=q: sum(float(values[g, q, n]) for n in ids) / k
      expected = mean(chosen) - mean(set(range(2 * k)) - chosen)
      # Both in float64, up to the order of four summands.
      assert check.replicate_differences[g, q] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_noise_has_no_difference_and_calibrated_z():
  check = support_check(scores_of(noise()), k=5)
  spread = check.differences.std(ddof=1) / math.sqrt(len(check.differences))
  assert abs(check.mean_difference) < 4 * spread
  assert check.mean_std_error == pytest.approx(spread, rel=1e-12)
  # E|t| of Student's t with 5 degrees is 0.949. Its mean over 1500 queries has the standard error
  # 0.023, and folds correlated at order 1/N widen z by some 2 %: 10 % is four of the former.
  assert np.abs(check.z).mean() == pytest.approx(0.949, rel=0.1)


def test_choosing_and_scoring_by_the_same_draws_finds_signal_in_noise():
  """Why the draws are split: without that, noise looks like tens of standard errors."""
  values = noise().mean(axis=0)
  order = np.argsort(-values, axis=1)
  at = lambda positions: np.take_along_axis(values, positions, axis=1).mean(axis=1)
  naive = at(order[:, :5]) - at(order[:, 200:205])
  assert naive.mean() > 40 * naive.std(ddof=1) / math.sqrt(len(naive))
  # The mean of six groups has σ = 1/√6, and the best 5 of 400 lie beyond 2σ.
  assert naive.mean() > 2 / math.sqrt(6)


def test_planted_signal_is_found_at_its_size():
  values = noise(num_queries=300)
  values[:, :, :5] += 8  # in standard deviations of one group: the choice cannot miss
  check = support_check(scores_of(values), k=5)
  assert abs(check.mean_difference - 8) < 4 * check.mean_std_error
  assert check.num_clear > 0.99 * 300
  assert check.repeats


def test_noise_rarely_passes_for_a_repeating_ranking_even_where_queries_are_alike():
  """Alike queries have alike scores, so that their spread says nothing about the noise."""
  rng = np.random.default_rng(5)
  passed = 0
  for _ in range(200):
    alike = rng.normal(size=(4, 1, 400)) + 0.1 * rng.normal(size=(4, 8, 400))
    passed += support_check(scores_of(alike), k=5).repeats
  # 2.5 % are meant to, and little more at N = 400: 5 or 6 of 200, and 16 are four σ above that.
  assert passed <= 16
  clear = support_check(scores_of(noise()), k=5)
  share = clear.num_clear / len(clear.z)
  # σ of a share of 5 % among 1500 queries is 0.6 %.
  assert share == pytest.approx(clear.chance_of_clear, abs=4 * 0.006)


def test_the_same_seed_gives_the_same_check_and_another_seed_other_random_images():
  scores = scores_of(noise(4, 3, 50))
  first, again, other = (support_check(scores, k=5, seed=seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first.replicate_differences, again.replicate_differences)
  assert not np.array_equal(first.replicate_differences, other.replicate_differences)


def test_one_group_of_draws_allows_no_check():
  assert support_check(scores_of(noise(1, 2, 30)), k=3) is None


@pytest.mark.parametrize("k", [0, 16])
def test_k_out_of_range_is_named(k):
  with pytest.raises(ValueError, match=f"1…15, .* 30 training examples .* got {k}"):
    support_check(scores_of(noise(2, 2, 30)), k=k)


@pytest.mark.parametrize("correlation, is_said", [(0.62, True), (0.995, False), (None, False)])
def test_rounding_is_alike_in_both_halves_and_is_said_where_it_is_known(correlation, is_said):
  """Scores whose order is half rounding's: the draws agree on both parts alike."""
  signal, rounding = noise(2, 300)
  both = np.broadcast_to(signal + 2 * rounding, (6, 300, 400)) + 0.5 * noise(num_queries=300)
  scores = dataclasses.replace(scores_of(both), settings={"check": {"spearman": correlation}})
  check = support_check(scores, k=5)
  exact = support_check(scores_of(signal + 0.5 * noise(num_queries=300)), k=5)
  assert check.repeats and check.mean_difference > 1.5 * exact.mean_difference
  assert check.compression_spearman == correlation and exact.compression_spearman is None
  assert ("uncompressed queries is 0.62" in check.summary()) == is_said
  assert bool(check.compression_note()) == is_said
  assert exact.summary().startswith("The scores are more than noise: the 5 training examples")


def test_a_summary_does_not_call_noise_a_signal():
  check = support_check(scores_of(noise(num_queries=1)), k=5)
  assert check.summary().startswith("The scores are not clearly more than noise")
  assert "±" not in check.summary()  # one query has no spread over queries
