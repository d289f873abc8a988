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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import query_groups, split_halves, split_weights
from jaxinf.scores.statistics import jackknife_error, spearman
from jaxinf.scores.sweep import Sweep, shared_settings


class TooFewDraws(ValueError):
  """The scores of a sweep do not repeat under fresh draws, so that none can be recommended."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
  """What L dampings are worth for Q queries; see `recommend_damping`.

  Attributes:
    dampings: [L] λ in ascending order, in squared gradients of the pixel-mean loss.
    agreement: [L, Q] Spearman's rank correlation between halves of the draws, mean over splits.
    fidelity: [L, Q] in [−1, 1], the correlation of the scores at λ, noise included, with the
      noise-free ones at the smallest damping; comparable between the dampings of a query.
    agreement_errors: [L] standard errors of the mean over queries, under fresh draws.
    fidelity_errors: [L] the same.
    loss_errors: [L] the same, of the best mean fidelity less that at λ.
    repeats: [L] bool, whether the mean agreement is clearly above 0; somewhere it is.
    settings: of the scores, without their damping.
  """

  dampings: np.ndarray
  agreement: np.ndarray
  fidelity: np.ndarray
  agreement_errors: np.ndarray
  fidelity_errors: np.ndarray
  loss_errors: np.ndarray
  repeats: np.ndarray
  settings: Mapping[str, Any]

  @property
  def recommended(self) -> float:
    """The least damping that repeats and has a mean fidelity within one error of the best."""
    return float(self.dampings[self._place])

  @property
  def _place(self) -> int:
    means = self.fidelity.mean(axis=1)
    return int(np.argmax(self.repeats & (means.max() - means <= self.loss_errors)))

  def table(self) -> str:
    """Mean over queries ± standard error over draws of both numbers, a row a damping."""
    agreement = zip(self.agreement.mean(axis=1), self.agreement_errors, strict=True)
    fidelity = zip(self.fidelity.mean(axis=1), self.fidelity_errors, strict=True)
    lines = [f"{'damping':>10}{'agreement':>18}{'fidelity':>18}"]
    for place, row in enumerate(zip(self.dampings, agreement, fidelity, strict=True)):
      damping, *pairs = row
      cells = "".join(f"{'{:.3f} ± {:.3f}'.format(*pair):>18}" for pair in pairs)
      mark = "  ← recommended" if place == self._place else ""
      lines.append(f"{damping:>10.3g}{cells}{mark}")
    return "\n".join(lines)


def recommend_damping(
  sweep: Sequence[Scores], *, seed: int = 0, num_splits: int = 20
) -> Recommendation:
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

  Standard errors are those of the jackknife: everything is computed again without each group of
  training draws and without each group of query draws, and both variances add. Queries share the
  draws of training examples, and often their own, so that their spread says little: scores that are
  noise alone agree by chance in all queries alike. The jackknife takes only groups as independent.
  It errs on the safe side for noise alone (simulated: 1.1 to 1.8 times the true error) and by a
  third or so below it where two groups of query draws carry most of the noise.

  A damping is recommended only if its mean agreement is above 0 by Student's test at 5 %, one-sided
  with G − 1 degrees of freedom: if its scores repeat.

  Args:
    sweep: scores in the same G ≥ 3 groups of the same draws, at two dampings or more.
    seed: of the splits, where there are more than num_splits.
    num_splits: to average over; all distinct ones where there are fewer.

  Raises:
    TooFewDraws: no scores repeat that are as faithful as the best within one standard error, or
      they are in two groups of training draws, which have no jackknife. (It is a ValueError.)
    ValueError: fewer than two dampings, one training example, or scores that are no `Sweep`.
  """
  sweep = Sweep(sweep).ascending()
  num_groups, _, num_train = sweep[0].group_values.shape
  if len(sweep) < 2:
    raise ValueError(f"To choose from, a sweep needs at least two dampings; got {sweep.dampings}.")
  if num_train < 2:
    raise ValueError("Correlations need at least two training examples; the scores are of one.")
  if num_groups < 3:
    raise TooFewDraws(
      "Too few draws to recommend a damping: how well scores repeat can be told from 3 groups of "
      f"training draws on, and these have {num_groups}. Score with Draws(…, replicates=5)."
    )
  options = dict(seed=seed, num_splits=num_splits)
  agreement, fidelity = _agreement(sweep, **options), _fidelity(sweep)
  best = fidelity.mean(axis=1).argmax()
  variances = np.zeros((3, len(sweep)))
  for side in (_without_train_groups, _without_query_groups):
    left_out = []
    for fewer in zip(*map(side, sweep), strict=True):
      again = _fidelity(fewer).mean(axis=1)
      left_out.append((_agreement(fewer, **options).mean(axis=1), again, again[best] - again))
    if left_out:
      variances += np.square(jackknife_error(np.array(left_out)))
  agreement_errors, fidelity_errors, loss_errors = np.sqrt(variances)
  repeats = agreement.mean(axis=1) > stats.t.ppf(0.95, num_groups - 1) * agreement_errors
  found = Recommendation(
    dampings=sweep.dampings,
    agreement=agreement,
    fidelity=fidelity,
    agreement_errors=agreement_errors,
    fidelity_errors=fidelity_errors,
    loss_errors=loss_errors,
    repeats=repeats,
    settings=shared_settings(sweep[0]),
  )
  if not repeats[found._place]:
    rows = zip(sweep.dampings, agreement.mean(axis=1), agreement_errors, strict=True)
    said = ", ".join(f"{mean:.3f} ± {error:.3f} at {damping:g}" for damping, mean, error in rows)
    raise TooFewDraws(
      "Too few draws to recommend a damping: halves of the draws agree on the order of the "
      "training examples no better than noise alone may. Score with more draws, of queries and "
      f"training examples, or with larger dampings. Rank correlation of halves: {said}."
    )
  return found


def _agreement(sweep: Sequence[Scores], *, seed: int, num_splits: int) -> np.ndarray:
  """[L, Q] Spearman's rank correlation between halves of the draws, mean over splits."""
  weights = split_weights(sweep[0], seed=seed, num_splits=num_splits)
  halves = lambda scores, query: np.stack(list(split_halves(scores, query, weights)), axis=1)
  queries = range(len(sweep[0].query_ids))
  return np.array([[spearman(*halves(s, query)).mean() for query in queries] for s in sweep])


def _fidelity(sweep: Sequence[Scores]) -> np.ndarray:
  """[L, Q] fidelity of scores in ascending order of damping; see `recommend_damping`."""
  queries = range(len(sweep[0].query_ids))
  covariance = np.array([[_noise_free_covariance(s, sweep[0], q) for q in queries] for s in sweep])
  std = np.array([s.group_values.mean(axis=0, dtype=np.float64).std(axis=1) for s in sweep])
  ratio = _quotient(covariance, std)
  factor = np.maximum(np.sqrt(np.maximum(covariance[0], 0)), np.abs(ratio).max(axis=0))
  return _quotient(ratio, np.broadcast_to(factor, ratio.shape))


def _without_train_groups(scores: Scores) -> Iterator[Scores]:
  """The scores without each of the G groups of training draws."""
  for rest, change in _rests(scores.group_values):
    others = scores.query_group_values
    moved = None if others is None else others + change
    yield dataclasses.replace(scores, group_values=rest, query_group_values=moved)


def _without_query_groups(scores: Scores) -> Iterator[Scores]:
  """The scores without each of the A groups of query draws; none where A < 2."""
  for rest, change in _rests(query_groups(scores)):
    moved = scores.group_values + change
    yield dataclasses.replace(scores, group_values=moved, query_group_values=rest)


def _rests(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields groups without each of them, and how that moves their mean.

  Groups of the other side have means over all draws of this one: to first order they move alike.
  """
  for left_out, group in enumerate(groups):
    rest = np.delete(groups, left_out, axis=0)
    mean = rest.mean(axis=0, dtype=np.float64)
    yield rest, ((mean - group) / len(groups)).astype(np.float32)


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
