"""A cheap check that scores carry signal, without retraining.

Is the mean score of a query's k most supporting training examples above that of k random others?
Asked of the scores that chose the k, the answer is always yes, even for pure noise (the winner's
curse). So the draws are split: one half of the replicates chooses, the other half answers.

What is alike in both halves looks like signal to this check, as the rounding of compressed query
gradients does. Where the settings of the scores hold their rank correlation with uncompressed ones,
the check says it too.
"""

import dataclasses

import numpy as np

from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import mean_and_error, t_quantile, t_tail


@dataclasses.dataclass(frozen=True)
class SupportCheck:
  """How far held-out draws put the chosen examples above random ones; see `support_check`.

  Attributes:
    k: examples chosen, and random examples they are compared with.
    replicate_differences: d [G, Q] float64, in units of the scores.
    compression_spearman: Spearman's rank correlation of the scores with those of uncompressed
      queries, mean over queries; None where it is not known, or nothing is compressed.
  """

  k: int
  replicate_differences: np.ndarray
  compression_spearman: float | None = None

  @property
  def differences(self) -> np.ndarray:
    """[Q] mean of d over replicates; 0 in expectation where scores are noise."""
    return self.replicate_differences.mean(axis=0)

  @property
  def std_errors(self) -> np.ndarray:
    """[Q] standard errors over replicates of draws, std(d, ddof=1) / √G.

    With few replicates they are rough: z then has the tails of Student's t with G − 1 degrees.
    """
    return mean_and_error(self.replicate_differences, axis=0)[1]

  @property
  def z(self) -> np.ndarray:
    """[Q] difference / standard error (±inf or NaN where all replicates agree exactly)."""
    with np.errstate(divide="ignore", invalid="ignore"):
      return self.differences / self.std_errors

  @property
  def mean_difference(self) -> float:
    """The mean of the differences over queries."""
    return float(self.differences.mean())

  @property
  def mean_std_error(self) -> float:
    """Standard error of the mean difference over queries, std(ddof=1) / √Q; NaN for one query.

    Queries share the gradients of the training examples, so it is rough too; see `repeats`.
    """
    return float(mean_and_error(self.differences)[1])

  @property
  def num_clear(self) -> int:
    """Queries whose difference exceeds two of its standard errors."""
    return int((self.z > 2).sum())

  @property
  def chance_of_clear(self) -> float:
    """The probability that a query is clear by chance: that of t > 2, with G − 1 degrees."""
    return t_tail(2, len(self.replicate_differences) - 1)

  @property
  def repeats(self) -> bool:
    """Whether the mean difference over replicates and queries is clearly above 0.

    It must pass Student's t test at 97.5 % over replicates, as queries share their draws, and over
    queries, as replicates share the queries; over replicates alone where there is one query.
    """
    means = [self.replicate_differences.mean(axis=axis) for axis in (0, 1)]
    return all(_is_positive(values) for values in means if len(values) > 1)

  def compression_note(self) -> str:
    """What compression does to the order, in a sentence; empty where it is not known or harmless.

    Harmless is a rank correlation of 0.99 or more with the scores of uncompressed queries, which
    compression/check.py gives the reason for.
    """
    if self.compression_spearman is None or self.compression_spearman >= 0.99:
      return ""
    return (
      "Compression of the queries changes the order of the scores: their rank correlation with "
      f"those of uncompressed queries is {self.compression_spearman:.2f}. This check cannot see "
      "it, because rounding is the same in both halves of the draws; choose a finer compression."
    )

  def summary(self) -> str:
    """Whether the scores are more than noise, and what compression does to them, in words."""
    verdict = "more than noise" if self.repeats else "not clearly more than noise"
    error = "" if np.isnan(self.mean_std_error) else f" ± {self.mean_std_error:.3g}"
    text = (
      f"The scores are {verdict}: the {self.k} training examples that one half of the draws puts "
      f"highest score {self.mean_difference:.3g}{error} above random ones in the other half, "
      f"clearly so for {self.num_clear} of {len(self.differences)} queries."
    )
    return f"{text} {self.compression_note()}".rstrip()


def support_check(scores: Scores, *, k: int = 10, seed: int = 0) -> SupportCheck | None:
  """Compares each query's k most supporting examples with k random others, on held-out draws.

  The replicates of draws form two folds, the even and the odd ones. The mean score over one fold
  chooses a query's k highest training examples, T, and R are k random ones of the others. For each
  replicate g of the other fold, which had no say in the choice,

    d_g = mean_{n∈T} scores_g[n] − mean_{n∈R} scores_g[n].

  Every replicate is held out once, so there are G differences. Their mean over g is the difference,
  std(d_g, ddof=1) / √G its standard error. That error is over training draws alone: the query's
  gradient, the curvature and R (fixed within a fold) are the same for all replicates of a fold. For
  pure noise the two folds' differences are correlated at order 1/N, which it leaves out.

  A positive difference says that the ranking repeats under fresh draws. It does not say that
  removing the chosen examples changes the query: that takes retraining.

  Args:
    scores: of Q queries and N training examples in G replicates of draws.
    k: 1 to N / 2.
    seed: of the random examples.

  Returns:
    The check, or None where G < 2: one replicate of draws leaves none to hold out.

  Raises:
    ValueError: k is out of range.
  """
  replicates = scores.replicate_values
  num_replicates, num_queries, num_train = replicates.shape
  if not 1 <= k <= num_train // 2:
    raise ValueError(
      f"k must lie in 1…{num_train // 2}, so that {num_train} training examples hold k chosen and "
      f"k other ones; got {k}."
    )
  if num_replicates < 2:
    return None
  rng = np.random.default_rng(seed)
  differences = np.empty((num_replicates, num_queries))
  for fold in (0, 1):
    order = np.argsort(-replicates[1 - fold :: 2].mean(axis=0), axis=1, kind="stable")
    others = rng.permuted(order[:, k:], axis=1)[:, :k]
    held_out = replicates[fold::2]
    differences[fold::2] = _mean_at(held_out, order[:, :k]) - _mean_at(held_out, others)
  check = scores.settings.get("check") or {}
  return SupportCheck(k, differences, check.get("spearman"))


def _is_positive(values: np.ndarray) -> bool:
  """Whether the mean of values [n] passes a t test against 0 at 97.5 %, one-sided."""
  mean, error = mean_and_error(values)
  return bool(mean > t_quantile(0.975, len(values) - 1) * error)


def _mean_at(replicates: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """[G, Q] means of replicates [G, Q, N] at positions [Q, k]."""
  picked = np.take_along_axis(replicates, positions[None], axis=2)
  return picked.mean(axis=2, dtype=np.float64)
