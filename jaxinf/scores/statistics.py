"""The one home of means with standard errors, correlations, and how far these may be off.

NumPy and SciPy only. Dimensions: M subsets, Q queries, B resamples. A linear datamodelling score is
a mean over queries of rank correlations over subsets. Both are samples, and all queries share the
subsets: there are neither M nor Q independent repetitions.
"""

import dataclasses
import functools

import numpy as np
from scipy import special

from jaxinf.core.checks import checked_count, checked_seed


@dataclasses.dataclass(frozen=True)
class Resamples:
  """How often each subset and each query occurs in B bootstrap samples with replacement.

  Attributes:
    subsets: [B, M] counts, rows adding up to M.
    queries: [B, Q] counts, rows adding up to Q.
  """

  subsets: np.ndarray
  queries: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairedTest:
  """Whether two methods differ on the same subsets and queries; see `paired_test`.

  Attributes:
    difference: mean over queries, first method less second.
    std_error: of the difference, over subsets and queries.
    interval: (low, high) of the difference.
    p_value: two-sided.
  """

  difference: float
  std_error: float
  interval: tuple[float, float]
  p_value: float


def mean_and_error(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
  """Means along an axis and their standard errors std(ddof=1) / √n, both without that axis.

  The errors are those of n independent values. They are NaN where n = 1.
  """
  num = values.shape[axis]
  means = values.mean(axis=axis)
  if num < 2:
    return means, np.full_like(means, np.nan)
  return means, values.std(axis=axis, ddof=1) / num**0.5


def jackknife_error(left_out: np.ndarray, axis: int = 0) -> np.ndarray:
  """Standard errors √((n − 1) / n · Σ (v_i − v̄)²) of a statistic of n independent groups.

  v_i is the statistic without group i. The error holds for any smooth statistic of the groups,
  however its other parts depend on each other, because only the groups are taken as independent.

  Args:
    left_out: the v_i along `axis`, n ≥ 2 of them.
  """
  num = left_out.shape[axis]
  return left_out.std(axis=axis, ddof=1) * (num - 1) / num**0.5


def centred(values: np.ndarray, axis: int) -> np.ndarray:
  """Values less their mean; exactly 0 where all are equal, which rounding of the mean is not."""
  spread = np.ptp(values, axis=axis, keepdims=True)
  return np.where(spread == 0, 0, values - values.mean(axis=axis, keepdims=True))


def pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
  """Pearson's correlations of x and y along an axis, which they lose; other axes broadcast.

  Values that are all equal say nothing: their correlation is 0. NaN gives NaN.
  """
  x, y = (centred(np.asarray(values, np.float64), axis) for values in (x, y))
  return _quotient((x * y).sum(axis=axis), (x * x).sum(axis=axis), (y * y).sum(axis=axis))


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
  """Spearman's rank correlations of x and y along an axis, which they lose; other axes broadcast.

  Equal values share the average of their ranks. Values that are all equal order nothing: their
  correlation is 0. NaN gives NaN.
  """
  return pearson(_ranks(x, axis), _ranks(y, axis), axis=axis)


def spearman_matrix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Rank correlations [R, C, Q] over subsets of every x [R, M, Q] with every y [C, M, Q].

  x are for example predictions from the gradients of R measurements, and y are C true measurements;
  or both are the same C. A heatmap shows the mean over queries. Ties and constants count as in
  `spearman`.
  """
  x, y = (centred(_ranks(values, 1), 1) for values in (x, y))
  products = np.einsum("rmq,cmq->rcq", x, y, optimize=True)
  return _quotient(products, (x * x).sum(axis=1)[:, None], (y * y).sum(axis=1)[None])


@functools.lru_cache(maxsize=4, typed=True)  # True is no 1
def resamples(num_subsets: int, num_queries: int, *, seed: int, num_resamples: int) -> Resamples:
  """Bootstrap counts, the same for the same arguments: methods are compared on equal samples."""
  num_resamples = checked_count(num_resamples, "num_resamples", 2)
  rng = np.random.default_rng(checked_seed(seed))
  counts = (
    rng.multinomial(num, np.full(num, 1 / num), size=num_resamples).astype(np.float32)
    for num in (num_subsets, num_queries)
  )
  found = Resamples(*counts)
  found.subsets.flags.writeable = found.queries.flags.writeable = False  # they are kept
  return found


def resampled_spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """[B, Q] float32: `spearman` of the columns of x and y [M, Q] in resamples of their rows.

  A row that comes w times is w equal rows. Its average rank in the resample follows from the counts
  of the rows below it, without sorting again: Σ_j w_j [x_j < x_i] + ½ Σ_j w_j [x_j = x_i] + ½.
  Ranks are exact in float32, and the correlations to its rounding.

  Args:
    x, y: finite numbers.
    counts: [B, M] how often each row comes in a resample.
  """
  counts = np.ascontiguousarray(counts.T, np.float32)  # [M, B]: long rows are read fastest
  found = np.empty((counts.shape[1], x.shape[1]), np.float32)
  for query in range(x.shape[1]):
    a, b = (_resampled_ranks(column, counts) for column in (x[:, query], y[:, query]))
    dot = lambda u, v: np.einsum("mb,mb->b", u, v)
    weighted_a = counts * a
    found[:, query] = _quotient(dot(weighted_a, b), dot(weighted_a, a), dot(counts * b, b))
  return found


def subset_interval(
  per_query: np.ndarray, resampled: np.ndarray, *, level: float = 0.95
) -> tuple[float, float]:
  """Percentile bootstrap interval of a mean over queries: for these queries and other subsets.

  The bootstrap's own bias is taken off: rows that come several times bring rank correlations nearer
  to 0, by about 1 / M of their size.

  Args:
    per_query: [Q] the estimate.
    resampled: [B, Q] the same in resamples of subsets.
    level: probability that the interval holds the truth.
  """
  means = resampled.mean(axis=1, dtype=np.float64)
  mean = float(np.mean(per_query))
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) - means.mean() + mean
  return max(float(low), -1.0), min(float(high), 1.0)


def two_way_error(per_query: np.ndarray, resampled: np.ndarray, query_counts: np.ndarray) -> float:
  """Standard error of a mean over queries, when subsets and queries are both random samples.

  With V the bootstrap variance of the mean over subsets, over queries, or over both at once,

    error² = 2 (V_subsets + V_queries) − V_both,

  and at least the larger of the two. Let s, q and p be the variances of the parts of a correlation
  that belong to subsets, to queries and to their pairs. The true variance is s + q + p. The
  bootstrap gives V_subsets = s + p, V_queries = q + p and V_both = s + q + 3 p, so that V_both is
  up to three times too large by itself. NaN of one query.

  Args:
    per_query: [Q] the estimate.
    resampled: [B, Q] the same in resamples of subsets.
    query_counts: [B, Q] resamples of queries.
  """
  if len(per_query) < 2:
    return float("nan")
  shares = query_counts / query_counts.sum(axis=1, keepdims=True)
  means = resampled.mean(axis=1), shares @ per_query, (shares * resampled).sum(axis=1)
  subsets, queries, both = (float(np.var(x, dtype=np.float64)) for x in means)
  return max(subsets, queries, 2 * (subsets + queries) - both) ** 0.5


def two_way_interval(
  per_query: np.ndarray,
  resampled: np.ndarray,
  samples: Resamples,
  *,
  level: float = 0.95,
) -> tuple[float, float]:
  """Interval over subsets and queries of a mean over queries: other queries, other subsets.

  mean ± t · `two_way_error`, t of Student's distribution with min(M, Q) − 1 degrees of freedom,
  within [−1, 1]; NaN of one query. Arguments as of `subset_interval`.
  """
  mean = float(np.mean(per_query))
  error = two_way_error(per_query, resampled, samples.queries)
  width = t_quantile((1 + level) / 2, _degrees(samples)) * error
  return max(mean - width, -1.0), min(mean + width, 1.0)


def paired_test(
  first: tuple[np.ndarray, np.ndarray],
  second: tuple[np.ndarray, np.ndarray],
  samples: Resamples,
  *,
  level: float = 0.95,
) -> PairedTest:
  """Tests whether two methods predict equally well, from their correlations on the same resamples.

  The null hypothesis: the expected difference of their mean rank correlations is 0, over random
  subsets and random queries of the kind of these. (Not that they are equal on every query, nor that
  their scores are exchangeable.) The statistic is difference / `two_way_error` of the differences
  per query, referred to Student's distribution with min(M, Q) − 1 degrees of freedom, so that the
  interval at 1 − p just touches 0. One test of two methods chosen beforehand: p-values against the
  best of several, or of many pairs, are too small, because the choice is not accounted for.

  Args:
    first: per_query [Q] and resampled [B, Q] of one method; see `subset_interval`.
    second: the same of the other.
    samples: the resamples of both.
    level: of the interval.
  """
  differences = np.asarray(first[0], np.float64) - second[0]
  resampled = np.asarray(first[1], np.float64) - second[1]
  difference = float(differences.mean())
  error = two_way_error(differences, resampled, samples.queries)
  if error == 0:
    p_value = float(difference == 0)
  else:
    p_value = 2 * t_tail(abs(difference) / error, _degrees(samples))
  interval = two_way_interval(differences, resampled, samples, level=level)
  return PairedTest(difference, error, interval, p_value)


def t_quantile(probability: float, degrees: int) -> float:
  """The value that Student's t with so many degrees of freedom stays below with a probability."""
  return float(special.stdtrit(degrees, probability))


def t_tail(value: float, degrees: int) -> float:
  """The probability that Student's t exceeds a value."""
  return float(special.stdtr(degrees, -value))


def _ranks(values: np.ndarray, axis: int) -> np.ndarray:
  """Ranks along an axis from 1; equal values share the average of theirs, and NaN gives NaN."""
  from scipy.stats import rankdata  # takes most of a second, which commands need not pay

  return rankdata(values, axis=axis)


def _degrees(samples: Resamples) -> int:
  return min(samples.subsets.shape[1], samples.queries.shape[1]) - 1


def _resampled_ranks(column: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """[M, B] float32 average ranks of a column [M] in resamples counts [M, B], less their mean."""
  order = np.argsort(column)
  up_to = np.zeros((len(counts) + 1, counts.shape[1]), np.float32)
  np.cumsum(counts[order], axis=0, out=up_to[1:])
  below, through = (np.searchsorted(column[order], column, side) for side in ("left", "right"))
  return (up_to[below] + up_to[through] - up_to[-1]) / 2


def _quotient(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """products / √(first · second), and 0 where one of these is 0; exactly 1 where all are equal."""
  scale = np.sqrt(first * second)
  return np.divide(products, scale, out=np.zeros_like(products), where=scale != 0)
