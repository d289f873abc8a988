"""Rank correlations equal SciPy's, resamples the naive loop; intervals cover and tests are fair."""

import numpy as np
import pytest
from scipy import stats

from jaxinf.scores.statistics import (
  jackknife_error,
  mean_and_error,
  paired_test,
  pearson,
  resampled_spearman,
  resamples,
  spearman,
  spearman_matrix,
  subset_interval,
  two_way_error,
  two_way_interval,
)


def columns(num_rows, num_columns, *, seed=0, ties=False):
  """Two correlated tables, with equal values in their columns where asked."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num_rows, num_columns))
  y = x + rng.normal(size=x.shape)
  return (np.round(x), np.round(y)) if ties else (x, y)


def test_mean_and_error_along_an_axis():
  values = np.random.default_rng(0).normal(size=(4, 5))
  for axis in (0, 1, -1):
    means, errors = mean_and_error(values, axis)
    np.testing.assert_array_equal(means, values.mean(axis=axis))
    np.testing.assert_allclose(errors, stats.sem(values, axis=axis), rtol=1e-14)  # a few roundings
  means, errors = mean_and_error(values[:, :1].astype(np.float32))
  assert (means == values[:, 0].astype(np.float32)).all() and np.isnan(errors).all()
  assert errors.dtype == np.float32


def test_the_jackknife_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(0).normal(size=(7, 3))
  left_out = np.stack([np.delete(values, i, axis=0).mean(axis=0) for i in range(7)])
  np.testing.assert_allclose(jackknife_error(left_out), stats.sem(values), rtol=1e-12)
  # Of s = mean²: without each of 0, 0, 3 that is 9/4, 9/4, 0, and 2/3 · Σ (v − 3/2)² = 9/4.
  assert jackknife_error(np.array([2.25, 2.25, 0.0])) == pytest.approx(1.5, rel=1e-15)


def test_pearson_equals_scipy_row_by_row_and_constants_say_nothing():
  x, y = (table.T for table in columns(40, 6))
  expected = [stats.pearsonr(*pair).statistic for pair in zip(x, y, strict=True)]
  np.testing.assert_allclose(pearson(x, y), expected, rtol=1e-12)  # float64, other order of sums
  np.testing.assert_allclose(pearson(x.T, y.T, axis=0), expected, rtol=1e-12)
  np.testing.assert_allclose(pearson(x[:, None], y).diagonal(), expected, rtol=1e-12)
  tenths = np.full(10, 0.1)  # their mean is not 0.1 in float64
  assert pearson(tenths, tenths) == 0 and pearson(tenths, np.arange(10)) == 0
  assert np.isnan(pearson(np.array([1, np.nan, 2]), np.arange(3)))


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_equals_scipy(ties):
  x, y = columns(40, 6, ties=ties)
  expected = [stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
  np.testing.assert_allclose(
    spearman(x, y, axis=0), expected, rtol=1e-12
  )  # float64, other order of sums
  matrix = spearman_matrix(np.stack([x, -x]), np.stack([y, x, np.exp(y)]))
  row = np.stack([expected, np.ones(6), expected])
  np.testing.assert_allclose(matrix, [row, -row], rtol=1e-12)


def test_spearman_in_closed_form():
  x = np.array([[3.0, 1], [1, 2], [2, 3], [9, 9]])
  np.testing.assert_array_equal(spearman(x, np.exp(x), axis=0), [1, 1])
  np.testing.assert_array_equal(spearman(x, -x, axis=0), [-1, -1])
  # 1 − 6 Σ d² / (n (n² − 1)) with Σ d² = 6, of ranks 3 1 2 4 and 1 2 3 4.
  np.testing.assert_allclose(spearman(x[:, :1], x[:, 1:], axis=0), [1 - 36 / 60], rtol=1e-15)
  assert spearman(x, np.zeros((4, 2)), axis=0).tolist() == [0, 0]  # orders nothing


@pytest.mark.parametrize("ties", [False, True])
def test_resamples_equal_a_loop_over_repeated_rows(ties):
  x, y = columns(12, 3, ties=ties)
  x[:, 2] = 1.0
  counts = resamples(12, 3, seed=1, num_resamples=20).subsets
  assert (counts.sum(axis=1) == 12).all() and counts.max() > 1
  counts = np.concatenate([counts, np.eye(12)[:1] * 12])  # one row twelve times orders nothing
  found = resampled_spearman(x, y, counts)
  for row, count in zip(found, counts.astype(int), strict=True):
    rows = np.repeat(np.arange(12), count)
    np.testing.assert_allclose(row, spearman(x[rows], y[rows], axis=0), atol=1e-6)  # float32
  assert (found[-1] == 0).all() and (found[:, 2] == 0).all()


def test_methods_share_their_resamples():
  again = resamples(9, 4, seed=5, num_resamples=3)
  resamples.cache_clear()
  fresh = resamples(9, 4, seed=5, num_resamples=3)
  np.testing.assert_array_equal(again.subsets, fresh.subsets)
  np.testing.assert_array_equal(again.queries, fresh.queries)
  with pytest.raises(ValueError, match="num_resamples must be at least 2"):
    resamples(9, 4, seed=5, num_resamples=1)


def test_without_spread_intervals_are_points():
  x = np.random.default_rng(0).normal(size=(10, 4))
  samples = resamples(10, 4, seed=0, num_resamples=50)
  ones, found = spearman(x, 3 * x, axis=0), resampled_spearman(x, 3 * x, samples.subsets)
  # To the rounding of float32 correlations.
  np.testing.assert_allclose(subset_interval(ones, found), 1, atol=1e-6)
  np.testing.assert_allclose(two_way_interval(ones, found, samples), 1, atol=1e-6)
  same = paired_test((ones, found), (ones, found), samples)
  assert (same.difference, same.std_error, same.p_value) == (0, 0, 1)


def test_two_way_error_has_both_sources_of_noise_once():
  """Means of a table subset effect + query effect + noise of pairs, whose variance is known.

  A mean over subsets of such cells stands for the correlation: it resamples in closed form.
  """
  num_subsets, num_queries, sizes = 30, 20, (0.7, 0.5, 3.0)
  variance = sizes[0] ** 2 / 30 + sizes[1] ** 2 / 20 + sizes[2] ** 2 / 600
  samples = resamples(num_subsets, num_queries, seed=0, num_resamples=400)
  squares = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    shapes = (num_subsets, 1), (1, num_queries), (num_subsets, num_queries)
    cells = sum(size * rng.normal(size=shape) for size, shape in zip(sizes, shapes, strict=True))
    resampled = samples.subsets @ cells / num_subsets
    squares.append(two_way_error(cells.mean(axis=0), resampled, samples.queries) ** 2)
  # The bootstrap lacks a factor (1 − 1/M) or (1 − 1/Q), 5 %; the bound below 0 adds a little.
  assert np.mean(squares) == pytest.approx(variance, rel=0.15)


def benchmarks(num_repeats, *, num_subsets=40, num_queries=25):
  """Correlations of two equally good methods, on fresh subsets and queries each time.

  True changes share a part between queries, and so do the methods' errors; queries differ in how
  well they are predicted. Yields (per_query, resampled) of both, and the resamples.
  """
  samples = resamples(num_subsets, num_queries, seed=0, num_resamples=300)
  for seed in range(num_repeats):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(3, num_subsets, 1))
    own = rng.normal(size=(4, num_subsets, num_queries))
    truth, *errors = 0.5 * shared + own[:3]
    signal = truth * np.exp(0.5 * rng.normal(size=num_queries))
    measured = truth + 0.5 * own[3]
    pair = [signal + 2 * error for error in errors]
    resampled = [resampled_spearman(found, measured, samples.subsets) for found in pair]
    yield (
      list(zip((spearman(found, measured, axis=0) for found in pair), resampled, strict=True)),
      samples,
    )


@pytest.fixture(scope="module")
def repeats():
  return list(benchmarks(300))


def test_intervals_over_both_cover_the_truth(repeats):
  truth = np.mean([pair[m][0].mean() for pair, _ in repeats for m in range(2)])
  intervals = [two_way_interval(*pair[0], samples) for pair, samples in repeats]
  coverage = np.mean([low < truth < high for low, high in intervals])
  # 95 % ± three standard errors of 300 repetitions, 0.038.
  assert 0.91 < coverage < 0.99


def test_p_values_are_uniform_where_methods_are_equally_good(repeats):
  p_values = [paired_test(*pair, samples).p_value for pair, samples in repeats]
  # Shares below a level within three standard errors of 300 repetitions.
  for level in (0.05, 0.2, 0.5):
    share = np.mean(np.array(p_values) < level)
    assert abs(share - level) < 3 * np.sqrt(level * (1 - level) / 300)


def test_intervals_over_subsets_cover_the_truth_of_these_queries():
  rng = np.random.default_rng(0)
  num_subsets, strength = 40, np.exp(0.5 * rng.normal(size=25))
  samples = resamples(num_subsets, 25, seed=0, num_resamples=300)
  intervals, means = [], []
  for _ in range(300):
    common, own = rng.normal(size=(num_subsets, 1)), rng.normal(size=(2, num_subsets, 25))
    measured = 0.5 * common + own[0]
    found = strength * measured + 2 * own[1]
    per_query = spearman(found, measured, axis=0)
    resampled = resampled_spearman(found, measured, samples.subsets)
    intervals.append(subset_interval(per_query, resampled))
    means.append(per_query.mean())
  coverage = np.mean([low < np.mean(means) < high for low, high in intervals])
  assert 0.91 < coverage < 0.99  # as above


def test_interval_and_p_value_say_the_same(repeats):
  for pair, samples in repeats[:20]:
    test = paired_test(*pair, samples)
    low, high = paired_test(*pair, samples, level=1 - test.p_value).interval
    # Where p is the level, the interval ends at 0.
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)
    swapped = paired_test(*pair[::-1], samples)
    assert swapped.p_value == pytest.approx(test.p_value, rel=1e-9)
    assert swapped.difference == -test.difference
