"""LDS: 1 where scores are what retraining does, and the same under all that must not matter."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from jaxinf.data.subsets import random_subsets
from jaxinf.evaluation.comparison import compare, damping_lds
from jaxinf.evaluation.lds import Retrained, lds, predictions
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

NUM_SUBSETS, NUM_QUERIES, NUM_TRAIN = 24, 5, 40
FAST = dict(num_resamples=50)


def world(*, seed_noise=0.0, num_seeds=2, num_subsets=NUM_SUBSETS, seed=0):
  """Scores, subsets, and models whose measurements are the scores' predictions plus noise."""
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(2, NUM_QUERIES, NUM_TRAIN)).astype(np.float32)
  query_ids = np.array([f"sample_{q}" for q in range(NUM_QUERIES)])
  scores = Scores(values, query_ids, np.arange(NUM_TRAIN) + 7, {"method": "toy"})
  subsets = random_subsets(scores.train_ids, num_subsets, share=0.5, seed=seed)
  changes = predictions(scores, subsets)
  noise = rng.normal(size=(num_subsets, num_seeds, NUM_QUERIES))
  measured = 3 + changes[:, None] + seed_noise * changes.std(axis=0) * noise
  return scores, subsets, Retrained(measured, query_ids, "loss")


def first_of(subsets, num):
  return dataclasses.replace(subsets, membership=subsets.membership[:num])


def test_predictions_are_sums_over_removed_examples():
  scores, subsets, _ = world()
  for m, row in enumerate(predictions(scores, subsets)):
    removed = [n for n in range(NUM_TRAIN) if n not in subsets.positions(m)]
    expected = [sum(float(v) for v in query[removed]) / NUM_TRAIN for query in scores.values]
    np.testing.assert_allclose(row, expected, rtol=1e-12)  # float64, sums in another order


@pytest.mark.parametrize("weight", [1, 0.5, 0])
def test_predictions_of_a_subset_are_those_of_removing_the_others(weight):
  scores, subsets, _ = world()
  found = predictions(scores, subsets, weight)
  for m in (0, 5):
    removed = np.delete(scores.train_ids, subsets.positions(m))
    expected = scores.predicted_change(removed, weight).changes
    np.testing.assert_allclose(found[m], expected, rtol=1e-6)  # of float32 means, or a mean of sums


def test_truth_that_lacks_negative_changes_is_predicted_best_without_them():
  scores, subsets, retrained = world()
  kept = predictions(scores, subsets, 0.25)
  truth = dataclasses.replace(retrained, values=np.stack([kept, kept], axis=1))
  found = {w: lds(scores, subsets, truth, negative_weight=w, **FAST) for w in (1.0, 0.25)}
  assert (found[0.25].per_query == 1).all() and found[1.0].mean < 1
  assert found[0.25].settings == {"method": "toy", "negative_weight": 0.25}
  assert "; negative scores × 0.25" in found[0.25].summary() and "×" not in found[1.0].summary()
  sweep = [dataclasses.replace(scores, settings={"damping": damping}) for damping in (0.1, 1.0)]
  swept = damping_lds(sweep, subsets, truth, default=0.1, negative_weight=0.25, **FAST)
  assert (swept.per_query == 1).all()
  with pytest.raises(ValueError, match="negative_weight must lie in"):
    lds(scores, subsets, truth, negative_weight=2)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_retraining_confirms_have_lds_of_their_sign(sign):
  scores, subsets, retrained = world()
  signed = dataclasses.replace(scores, replicate_values=sign * scores.replicate_values)
  found = lds(signed, subsets, retrained, **FAST)
  assert (found.per_query == sign).all() and found.mean == sign and found.std_error == 0
  np.testing.assert_allclose(found.interval + found.interval_both, sign, atol=1e-6)  # float32
  assert found.summary().startswith(f"LDS {100 * sign:.1f} ± 0.0 % (loss; 5 queries, 24 subsets)")


def test_lds_equals_a_loop_with_scipy():
  scores, subsets, retrained = world(seed_noise=2)
  found = lds(scores, subsets, retrained, **FAST)
  for q, value in enumerate(found.per_query):
    expected = stats.spearmanr(predictions(scores, subsets)[:, q], retrained.values[..., q].mean(1))
    assert value == pytest.approx(expected.statistic, rel=1e-12)
  assert found.mean == found.per_query.mean()
  assert found.std_error == pytest.approx(stats.sem(found.per_query), rel=1e-12)
  assert found.interval[0] < found.mean < found.interval[1]


def test_only_the_order_of_measurements_counts():
  scores, subsets, retrained = world(seed_noise=1, num_seeds=1)
  found = lds(scores, subsets, retrained, **FAST)
  bent = dataclasses.replace(retrained, values=np.exp(retrained.values) * np.arange(1, 6) - 9)
  again = lds(scores, subsets, bent, **FAST)
  np.testing.assert_array_equal(again.per_query, found.per_query)
  np.testing.assert_array_equal(again.resampled, found.resampled)


def test_ids_may_come_in_any_order():
  scores, subsets, retrained = world(seed_noise=1)
  found = lds(scores, subsets, retrained, **FAST)
  rng = np.random.default_rng(1)
  q, n = rng.permutation(NUM_QUERIES), rng.permutation(NUM_TRAIN)
  shuffled = dataclasses.replace(
    scores, replicate_values=scores.replicate_values[:, q][:, :, n],
    query_ids=scores.query_ids[q], train_ids=scores.train_ids[n],
  )  # fmt: skip
  again = lds(shuffled, subsets, retrained, **FAST)
  np.testing.assert_array_equal(again.per_query, found.per_query)
  np.testing.assert_array_equal(again.query_ids, retrained.query_ids)
  other = dataclasses.replace(
    retrained, values=retrained.values[..., q], query_ids=retrained.query_ids[q]
  )
  np.testing.assert_array_equal(lds(scores, subsets, other, **FAST).per_query, found.per_query[q])


def test_subsets_without_a_model_are_left_out():
  scores, subsets, retrained = world(seed_noise=1)
  values = retrained.values.copy()
  values[10:] = np.nan
  found = lds(scores, subsets, dataclasses.replace(retrained, values=values), **FAST)
  fewer = dataclasses.replace(retrained, values=retrained.values[:10])
  expected = lds(scores, first_of(subsets, 10), fewer, **FAST)
  np.testing.assert_array_equal(found.subset_numbers, np.arange(10))
  np.testing.assert_array_equal(found.per_query, expected.per_query)
  np.testing.assert_array_equal(found.resampled, expected.resampled)


def test_a_seed_that_is_missing_here_and_there_orders_nothing():
  """Measurements subset + seed, with an effect of seeds far above that of subsets."""
  scores, subsets, retrained = world(num_seeds=3)
  offsets = 100 * np.arange(3)[:, None]
  values = retrained.values + offsets
  rng = np.random.default_rng(0)
  for m, k in zip(range(20), rng.integers(3, size=20), strict=True):
    values[m, k] = np.nan
  values[20] = np.nan
  found = dataclasses.replace(retrained, values=values)
  assert (lds(scores, subsets, found, **FAST).per_query == 1).all()
  # Least squares in float64 on numbers of some 100; the mean effect of seeds is left in.
  expected = retrained.values[:, 0] + offsets.mean()
  expected[20] = np.nan
  np.testing.assert_allclose(found.means(), expected, atol=1e-10)
  complete = dataclasses.replace(retrained, values=retrained.values + offsets)
  np.testing.assert_allclose(complete.means(), complete.values.mean(axis=1), rtol=1e-14)


def test_exact_retraining_is_one_seed_against_the_others():
  _, _, retrained = world(seed_noise=1, num_seeds=4)
  found = retraining_lds(retrained, **FAST)
  loop = [
    [
      stats.spearmanr(retrained.values[:, k, q], np.delete(retrained.values, k, 1)[..., q].mean(1))
      for q in range(NUM_QUERIES)
    ]
    for k in range(4)
  ]
  expected = np.mean([[pair.statistic for pair in row] for row in loop], axis=0)
  np.testing.assert_allclose(found.per_query, expected, rtol=1e-12)
  assert found.interval[0] < found.mean < found.interval[1]
  _, _, noiseless = world()
  np.testing.assert_array_equal(retraining_lds(noiseless, **FAST).per_query, 1)


def test_exact_retraining_of_some_models_uses_those_with_others():
  _, _, retrained = world(seed_noise=1, num_seeds=2)
  values = retrained.values.copy()
  values[16:, 1] = np.nan
  found = retraining_lds(dataclasses.replace(retrained, values=values), **FAST)
  expected = retraining_lds(dataclasses.replace(retrained, values=values[:16]), **FAST)
  np.testing.assert_array_equal(found.per_query, expected.per_query)
  assert len(found.subset_numbers) == 24 and np.isnan(found.predicted[16:]).all()


def test_noise_ceiling_is_the_lds_of_a_perfect_predictor():
  for seed_noise in (0.5, 2.0):
    perfect, ceilings = [], []
    for seed in range(6):
      scores, subsets, retrained = world(
        seed_noise=seed_noise, num_seeds=3, num_subsets=150, seed=seed
      )
      found = noise_ceiling(retrained, num_resamples=50)
      assert found.interval[0] < found.ceiling < found.interval[1]
      perfect.append(lds(scores, subsets, retrained, num_resamples=2).mean)
      ceilings.append(found.ceiling)
    gap = np.subtract(ceilings, perfect)
    # 0.01 for ranks instead of products, and three standard errors of the repetitions.
    assert abs(gap.mean()) < 0.01 + 3 * stats.sem(gap)
  noiseless = noise_ceiling(world()[2], **FAST)
  assert (noiseless.ceiling, noiseless.between_seeds) == (1, 1)


def noisy(scores, noise):
  values = scores.replicate_values + noise * np.random.default_rng(99).normal(
    size=scores.replicate_values.shape
  )
  return dataclasses.replace(scores, replicate_values=values.astype(np.float32))


def test_methods_are_compared_on_the_same_resamples():
  scores, subsets, retrained = world(seed_noise=0.5, num_subsets=60)
  good, poor = (lds(noisy(scores, x), subsets, retrained, **FAST) for x in (0.1, 2))
  test = good.against(poor)
  assert test.difference == pytest.approx(good.mean - poor.mean, rel=1e-12)
  assert test.interval[0] > 0 and test.p_value < 0.05
  found = {"poor": poor, "good": good, "twin": good, "oracle": retraining_lds(retrained, **FAST)}
  head, *rows = compare(found).splitlines()
  assert head.endswith("p against good")
  assert [row.split()[0] for row in rows] == list(found)
  p_value = "< 0.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"
  assert rows[0].endswith("  " + p_value)
  assert rows[1].endswith("  –") and rows[2].endswith("  1.000")
  assert f"{100 * good.mean:.1f} ± {100 * good.std_error:.1f}" in rows[1]
  assert compare(found, against="poor").splitlines()[2].endswith("  " + p_value)


def test_best_damping_and_default_are_told_apart():
  scores, subsets, retrained = world(seed_noise=0.5)
  sweep = [
    dataclasses.replace(noisy(scores, noise), settings={"damping": damping})
    for damping, noise in ((0.1, 1.0), (0.001, 2.0), (0.01, 0.0))
  ]
  found = damping_lds(sweep, subsets, retrained, default=0.001, **FAST)
  np.testing.assert_array_equal(found.dampings, [0.001, 0.01, 0.1])
  assert found.best_damping == 0.01
  np.testing.assert_array_equal(
    found.best_on_benchmark.per_query, lds(sweep[2], subsets, retrained, **FAST).per_query
  )
  assert found.default.mean == lds(sweep[1], subsets, retrained, **FAST).mean
  rows = found.table().splitlines()[1:]
  assert [row.partition("← ")[2] for row in rows] == ["default", "best on benchmark", ""]
  with pytest.raises(ValueError, match="damping 1e-08; the sweep has: 0.001, 0.01, 0.1"):
    damping_lds(sweep, subsets, retrained, default=1e-8)
  as_sweep = damping_lds(Sweep(sweep), subsets, retrained, default=0.001, **FAST)
  np.testing.assert_array_equal(as_sweep.per_query, found.per_query)


def test_equal_predictions_count_as_0_and_are_said():
  scores, subsets, retrained = world()
  scores.replicate_values[:, 2] = 0.1  # every subset lacks as many examples
  found = lds(scores, subsets, retrained, **FAST)
  assert found.per_query[2] == 0 and (found.resampled[:, 2] == 0).all()
  assert found.summary().endswith("1 queries with equal predictions for all subsets count as 0")


def test_what_does_not_belong_together_is_refused():
  scores, subsets, retrained = world()
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  other = dataclasses.replace(scores, query_ids=np.array([*scores.query_ids[:4], "x"]))
  with refuse("1 of 5 are missing ('sample_4') and 1 are others ('x')"):
    lds(other, subsets, retrained)
  other = dataclasses.replace(scores, train_ids=scores.train_ids.astype(str))
  with refuse("training examples are not the subsets': 40 of 40 are missing (7, 8, 9, …)"):
    lds(other, subsets, retrained)
  with refuse("There are 3 subsets but measurements of 24"):
    lds(scores, first_of(subsets, 3), retrained)
  broken = dataclasses.replace(scores, replicate_values=scores.replicate_values * np.nan)
  with refuse("not finite"):
    lds(broken, subsets, retrained)
  fewer = dataclasses.replace(retrained, values=retrained.values[:5])
  with refuse("LDS of other subsets, resamples"):
    lds(scores, subsets, retrained, **FAST).against(lds(scores, first_of(subsets, 5), fewer))
  with refuse("needs two seeds"):
    retraining_lds(dataclasses.replace(retrained, values=retrained.values[:, :1]))
  with refuse("needs two seeds"):
    noise_ceiling(dataclasses.replace(retrained, values=retrained.values[:, :1]))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda v: v[0], "[M, K, Q]"),
    (lambda v: v * np.inf, "must be finite"),
    (lambda v: v[..., 1:], "must be 4 different ids"),
    (lambda v: np.where(np.arange(NUM_QUERIES) == 2, np.nan, v), "Subset 0 with seed 0 lacks"),
    (lambda v: v[:1], "at least two subsets"),
  ],
)
def test_measurements_that_are_incomplete_are_refused(change, message):
  _, _, retrained = world()
  with pytest.raises(ValueError, match=re.escape(message)):
    dataclasses.replace(retrained, values=change(retrained.values))
