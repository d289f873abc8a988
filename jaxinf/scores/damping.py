"""Which damping to score with, from a sweep's own draws: no model is retrained.

Damping is bias, draws are noise. Scores at a larger λ repeat better under fresh draws, as they tend
to plain products of gradients, so that agreement between halves of the draws alone would always
choose the largest. What counts is how well the noisy scores at λ correlate with what the least
damping would give without noise:

  fidelity(λ) = corr over n of s_λ and E s_λ₀,  λ₀ the smallest damping of the sweep.

Groups of draws are independent, and so the covariance over n between different groups, one at λ and
one at λ₀, has that of the noise-free scores as its mean.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import (
  half_ranks,
  query_groups,
  rank_correlation,
  split_halves,
  split_weights,
)


@dataclasses.dataclass(frozen=True)
class DampingSweep:
  """What L dampings are worth for Q queries; see `recommend_damping`.

  Attributes:
    dampings: [L] λ in ascending order, in squared gradients of the pixel-mean loss.
    agreement: [L, Q] Spearman's rank correlation between halves of the draws, mean over splits.
    fidelity: [L, Q] in [−1, 1], the correlation of the scores at λ, noise included, with the
      noise-free ones at the smallest damping; comparable between the dampings of a query.
    settings: of the scores, without their damping.
  """

  dampings: np.ndarray
  agreement: np.ndarray
  fidelity: np.ndarray
  settings: Mapping[str, Any]

  @property
  def recommended(self) -> float:
    """The least damping whose mean fidelity over queries is within one standard error of the best.

    The standard error is that of the paired difference over queries, std(ddof=1) / √Q, and 0 where
    there is one query. Queries share the draws of training examples, so that it is rough.
    """
    best = self.fidelity[self.fidelity.mean(axis=1).argmax()]
    loss, error = _mean_and_error(best - self.fidelity)
    return float(self.dampings[np.argmax(loss <= error)])

  def table(self) -> str:
    """Mean ± standard error over queries of both numbers as aligned text, a row a damping."""
    columns = zip(*_mean_and_error(self.agreement), *_mean_and_error(self.fidelity), strict=True)
    lines = [f"{'damping':>10}{'agreement':>18}{'fidelity':>18}"]
    for damping, (*agreement, fidelity, error) in zip(self.dampings, columns, strict=True):
      cells = ("{:.3f} ± {:.3f}".format(*pair) for pair in (agreement, (fidelity, error)))
      mark = "  ← recommended" if damping == self.recommended else ""
      lines.append(f"{damping:>10.3g}" + "".join(f"{cell:>18}" for cell in cells) + mark)
    return "\n".join(lines)


def recommend_damping(
  sweep: Sequence[Scores], *, seed: int = 0, num_splits: int = 20
) -> DampingSweep:
  """Weighs the bias of damping against the noise of draws, at every damping of a sweep.

  For each query, with T(λ) an estimate of the covariance over n of the noise-free scores at λ with
  those at λ₀, and s_λ the scores from all draws,

    fidelity(λ) = T(λ) / (std(s_λ) σ₀),  σ₀² = T(λ₀).

  T is the covariance between different groups of training draws, C_train: that of halves of the
  draws in the mean over all splits. Groups of query draws give C_query likewise. Each is free of
  one noise only, and with C that of the scores from all draws, T = C · (C_train / C) (C_query / C):
  the reliabilities multiply. That is exact where noise is in one proportion to the signal in all
  directions. (C_train + C_query − C, equal to first order, lacks the product of both noises, and
  falls below 0 where these are large.)

  σ₀, the noise-free standard deviation at λ₀, is a factor common to all dampings of a query. Where
  noise leaves its square negative, or so small that a correlation would pass 1, the factor is
  unknown and the largest |T(λ)| / std(s_λ) takes its place: the dampings of the query still
  compare, but the level means nothing. Noise that hides the scores at λ₀ altogether favours larger
  dampings a little: below an agreement of some 0.1 there, begin the sweep higher.

  What it cannot know: errors of the curvature approximation, which are the same in every draw and
  which damping may hide, and whether the noise-free scores at λ₀ are the ones to aim at. Only
  retraining tells (the linear datamodelling score, LDS). The noise of query gradients counts only
  where the scores have groups of query draws.

  Args:
    sweep: of `jaxinf.influence(damping=[…])`: scores in the same groups of the same draws that
      differ in settings["damping"].
    seed: of the splits, where there are more than num_splits, and of the order of equal scores.
    num_splits: to average over; all distinct ones where there are fewer.

  Raises:
    ValueError: fewer than two dampings or groups of draws, or scores that differ in more.
  """
  sweep = _checked_sweep(sweep)
  weights = split_weights(sweep[0], seed=seed, num_splits=num_splits)
  num_queries, num_train = sweep[0].group_values.shape[1:]
  if num_train < 2:
    raise ValueError("Correlations need at least two training examples; the scores are of one.")
  ties = np.random.default_rng(seed).permutation(num_train)
  agreement, covariance, std = np.zeros((3, len(sweep), num_queries))
  for query in range(num_queries):
    for row, scores in enumerate(sweep):
      pairs = split_halves(scores, query, weights)
      agreement[row, query] = np.mean([rank_correlation(half_ranks(pair, ties)) for pair in pairs])
      covariance[row, query] = _noise_free_covariance(scores, sweep[0], query)
      std[row, query] = scores.group_values[:, query].mean(axis=0, dtype=np.float64).std()
  ratio = _quotient(covariance, std)
  factor = np.maximum(np.sqrt(np.maximum(covariance[0], 0)), np.abs(ratio).max(axis=0))
  return DampingSweep(
    dampings=np.array([scores.settings["damping"] for scores in sweep]),
    agreement=agreement,
    fidelity=_quotient(ratio, np.broadcast_to(factor, ratio.shape)),
    settings=_shared_settings(sweep[0]),
  )


def _checked_sweep(sweep: Sequence[Scores]) -> list[Scores]:
  """The scores in ascending order of damping; ValueError unless they differ in nothing else."""
  if not all("damping" in scores.settings for scores in sweep):
    raise ValueError('Scores of a sweep need settings["damping"]; pass what influence returns.')
  sweep = sorted(sweep, key=lambda scores: scores.settings["damping"])
  if len({scores.settings["damping"] for scores in sweep}) < max(2, len(sweep)):
    raise ValueError(
      f"A sweep needs at least two dampings, each once; got "
      f"{[scores.settings['damping'] for scores in sweep]}. Give influence several dampings."
    )
  for scores in sweep[1:]:
    same = {
      "query ids": np.array_equal(scores.query_ids, sweep[0].query_ids),
      "training ids": np.array_equal(scores.train_ids, sweep[0].train_ids),
      "groups of draws": _shapes(scores) == _shapes(sweep[0]),
      "settings": _shared_settings(scores) == _shared_settings(sweep[0]),
    }
    if not all(same.values()):
      raise ValueError(
        f"Scores of a sweep may differ in damping only; those at {scores.settings['damping']:g} "
        f"have other {', '.join(name for name, alike in same.items() if not alike)} than those at "
        f"{sweep[0].settings['damping']:g}. Score all dampings in one call of influence."
      )
  return sweep


def _shapes(scores: Scores) -> list[tuple[int, ...] | None]:
  both = scores.group_values, scores.query_group_values
  return [None if groups is None else groups.shape for groups in both]


def _shared_settings(scores: Scores) -> dict[str, Any]:
  own = ("damping", "check")
  return {name: value for name, value in scores.settings.items() if name not in own}


def _noise_free_covariance(scores: Scores, reference: Scores, query: int) -> float:
  """T(λ) of one query, from scores at λ and the reference at λ₀; see `recommend_damping`."""
  pair = scores, reference
  all_draws, train = _covariances(*(member.group_values[:, query] for member in pair))
  if not len(query_groups(scores)):
    return train
  _, other = _covariances(*(query_groups(member)[:, query] for member in pair))
  if all_draws <= 0:
    return min(train, other)
  return min(train, other) * abs(max(train, other)) / all_draws  # below 0 where either is


def _covariances(groups: np.ndarray, others: np.ndarray) -> tuple[float, float]:
  """Covariances over n of two sets of groups [G, N]: of their means, and of different groups.

  The latter is the mean over all pairs g ≠ g' of cov(groups_g, others_g'), as over all splits.
  """
  num_groups, num_train = groups.shape
  groups = groups - groups.mean(axis=1, keepdims=True, dtype=np.float64)
  means = float(groups.mean(axis=0) @ others.mean(axis=0, dtype=np.float64)) / num_train
  same = float(np.vdot(groups, others)) / (num_groups * num_train)
  return means, (num_groups * means - same) / (num_groups - 1)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, and 0 where b = 0: a query whose scores do not vary tells nothing."""
  return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means [L] over queries of values [L, Q], and their standard errors; 0 for one query."""
  num_queries = values.shape[1]
  spread = values.std(axis=1, ddof=1) if num_queries > 1 else np.zeros(len(values))
  return values.mean(axis=1), spread / np.sqrt(num_queries)
