"""Which damping to score with, from a sweep's own draws: no model is retrained.

Damping biases scores, and draws make them noisy. Scores at a larger λ repeat better under fresh
draws, because they tend to plain products of gradients. Agreement between halves of the draws would
therefore always choose the largest λ. What counts is how well the noisy scores at λ correlate with
the noise-free scores at the least damping:

  fidelity(λ) = corr over n of s_λ and E s_λ₀,  λ₀ the smallest damping of the sweep.

Replicates of draws are independent, and so the covariance over n between different replicates, one
at λ and one at λ₀, has that of the noise-free scores as its mean.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.core.damping import Damping, damping_of
from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import num_replicates, replicates_of, split_halves, split_weights
from jaxinf.scores.statistics import centred, jackknife_error, spearman, t_quantile
from jaxinf.scores.sweep import Sweep, shared_settings


class TooFewDraws(ValueError):
  """The scores of a sweep do not repeat under fresh draws, so that none can be recommended."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
  """What L dampings are worth for Q queries; see `weigh_dampings`.

  Attributes:
    dampings: [L] λ in ascending order, in squared gradients of the pixel-mean loss; or ρ.
    agreement: [L, Q] Spearman's rank correlation between halves of the draws, mean over splits.
    fidelity: [L, Q] in [−1, 1], the correlation of the scores at λ, noise included, with the
      noise-free ones at the smallest damping; comparable between the dampings of a query.
    agreement_errors: [L] standard errors of the mean over queries, under fresh draws; NaN where
      there are two replicates of training draws only.
    fidelity_errors: [L] the same.
    loss_errors: [L] the same, of the best mean fidelity less that at λ.
    repeats: [L] bool, whether the mean agreement is clearly above 0.
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
  def candidates(self) -> np.ndarray:
    """[L] bool: dampings that repeat and whose mean fidelity is within one error of the best."""
    means = self.fidelity.mean(axis=1)
    return self.repeats & (means.max() - means <= self.loss_errors)

  @property
  def recommended(self) -> Damping:
    """The least of the candidates, of the sweep's kind; TooFewDraws where there are none."""
    if not self.candidates.any():
      rows = zip(self.dampings, self.agreement.mean(axis=1), self.agreement_errors, strict=True)
      said = ", ".join(f"{mean:.3f} ± {error:.3f} at {damping:g}" for damping, mean, error in rows)
      cause = (
        "how well scores repeat can be told from 3 replicates of training draws on (replicates=5)"
        if np.isnan(self.agreement_errors).any()
        else "halves of the draws agree on the order of the training examples no better than noise "
        "alone may. Score with more draws, of queries and training examples, or larger dampings"
      )
      raise TooFewDraws(
        f"Too few draws to recommend a damping: {cause}. Rank correlation of halves: {said}."
      )
    return damping_of({**self.settings, "damping": float(self.dampings[self.candidates.argmax()])})

  def table(self) -> str:
    """Mean over queries ± standard error over draws of both numbers, a row a damping."""
    agreement = zip(self.agreement.mean(axis=1), self.agreement_errors, strict=True)
    fidelity = zip(self.fidelity.mean(axis=1), self.fidelity_errors, strict=True)
    head = "relative ρ" if "damping_kind" in self.settings else "damping"
    lines = [f"{head:>10}{'agreement':>18}{'fidelity':>18}"]
    for place, row in enumerate(zip(self.dampings, agreement, fidelity, strict=True)):
      damping, *pairs = row
      cells = "".join(f"{'{:.3f} ± {:.3f}'.format(*pair):>18}" for pair in pairs)
      mark = "  ← recommended" if place in np.flatnonzero(self.candidates)[:1] else ""
      lines.append(f"{damping:>10.3g}{cells}{mark}")
    return "\n".join(lines)


def recommend_damping(
  sweep: Sequence[Scores], *, seed: int = 0, num_splits: int = 20
) -> Recommendation:
  """Finds the damping at which scores are most faithful, from their draws alone.

  As `weigh_dampings`, but where the scores do not repeat it refuses.

  Raises:
    TooFewDraws: no scores repeat that are as faithful as the best, to one standard error, or there
      are two replicates of training draws only, which have no errors. (It is a ValueError.)
    ValueError: as of `weigh_dampings`.
  """
  found = weigh_dampings(sweep, seed=seed, num_splits=num_splits)
  assert found.recommended  # it raises where there is none
  return found


def weigh_dampings(
  sweep: Sequence[Scores], *, seed: int = 0, num_splits: int = 20
) -> Recommendation:
  """Weighs the bias of damping against the noise of draws, at every damping of a sweep.

  Two numbers a damping and query: the agreement between rankings of two halves of the draws, as of
  `rank_stability`, and the `fidelity`.

  What it cannot know: errors of the curvature approximation, which are the same in every draw and
  which damping may hide, and whether the noise-free scores at λ₀ are the ones to aim at. Only
  retraining tells (the linear datamodelling score, LDS). The noise of query gradients counts only
  where the scores have replicates of query draws.

  Standard errors are those of the jackknife: everything is computed again without each replicate of
  training draws and without each replicate of query draws, and both variances add. Queries share
  the draws of training examples, and often their own, so that their spread says little: scores that
  are noise alone agree by chance in all queries alike. The jackknife takes only replicates as
  independent. In simulations of noise alone it says 1.3 to 2.5 times the true error. Where two
  replicates of query draws carry most of the noise beside a signal, it may say half of it, because
  two replicates tell little of their own spread: take more replicates of query draws.

  A damping is recommended only if its mean agreement is above 0 by Student's test at 5 %, one-sided
  with G − 1 degrees of freedom: if its scores repeat.

  Args:
    sweep: scores in the same G replicates of the same draws, at two dampings or more; G ≥ 3 for
      errors.
    seed: of the splits, where there are more than num_splits.
    num_splits: to average over; all distinct ones where there are fewer.

  Raises:
    ValueError: fewer than two dampings or replicates of training draws, one training example, or
      scores that are no `Sweep`.
  """
  sweep = Sweep(sweep).ascending()
  replicates = num_replicates(sweep[0])
  if len(sweep) < 2:
    raise ValueError(f"To choose from, a sweep needs at least two dampings; got {sweep.dampings}.")
  if len(sweep[0].train_ids) < 2:
    raise ValueError("Correlations need at least two training examples; the scores are of one.")
  halves = functools.partial(split_weights, seed=seed, num_splits=num_splits)
  products = _Products.of(sweep)
  agreement, faithful = _agreement(sweep, halves(*replicates)), products.fidelity(replicates[0])
  best = faithful.mean(axis=1).argmax()
  # Without one of two replicates there are no halves.
  variances = np.full((3, len(sweep)), np.nan if replicates[0] == 2 else 0.0)
  for side in _left_out(*replicates) if replicates[0] > 2 else ():
    left_out = []
    for matrix, fewer in side:
      again = products.of_replicates(matrix).fidelity(fewer[0]).mean(axis=1)
      agreed = _agreement(sweep, halves(*fewer) @ matrix).mean(axis=1)
      left_out.append((agreed, again, again[best] - again))
    variances += np.square(jackknife_error(np.array(left_out)))
  agreement_errors, fidelity_errors, loss_errors = np.sqrt(variances)
  repeats = agreement.mean(axis=1) > t_quantile(0.95, replicates[0] - 1) * agreement_errors
  return Recommendation(
    dampings=sweep.dampings,
    agreement=agreement,
    fidelity=faithful,
    agreement_errors=agreement_errors,
    fidelity_errors=fidelity_errors,
    loss_errors=loss_errors,
    repeats=repeats,
    settings=shared_settings(sweep[0]),
  )


def fidelity(sweep: Sequence[Scores]) -> np.ndarray:
  """[L, Q] how well noisy scores at λ correlate with noise-free ones at λ₀, the least damping.

  For each query, with T(λ) an estimate of the covariance over n of the noise-free scores at λ with
  those at λ₀, and s_λ the scores from all draws,

    fidelity(λ) = T(λ) / (std(s_λ) σ₀),  σ₀² = T(λ₀).

  T is the covariance between different replicates of training draws, C_train: that of halves of the
  draws in the mean over all splits. Replicates of query draws give C_query likewise. Each is free
  of one noise only, and with C that of the scores from all draws, T = C · (C_train / C) (C_query /
  C): the reliabilities multiply. That is exact where noise is in one proportion to the signal in
  all directions. (C_train + C_query − C, equal to first order, lacks the product of both noises,
  and falls below 0 where these are large.)

  σ₀, the noise-free standard deviation at λ₀, is a factor common to all dampings of a query. Where
  noise leaves its square negative, or so small that a correlation would pass 1, the factor is
  unknown and the largest |T(λ)| / std(s_λ) takes its place: the dampings of the query still
  compare, but the level means nothing. Noise that hides the scores at λ₀ altogether favours larger
  dampings a little: below an agreement of some 0.1 there, begin the sweep higher.

  Args:
    sweep: scores in the same G ≥ 2 replicates of the same draws.

  Returns:
    Numbers in [−1, 1], dampings in ascending order.
  """
  sweep = Sweep(sweep).ascending()
  return _Products.of(sweep).fidelity(num_replicates(sweep[0])[0])


def _agreement(sweep: Sweep, weights: np.ndarray) -> np.ndarray:
  """[L, Q] Spearman's rank correlation between halves of the draws, mean over splits."""
  found = np.zeros((len(sweep), len(sweep[0].query_ids)))
  for place in np.ndindex(found.shape):
    halves = list(split_halves(replicates_of(sweep[place[0]], place[1]), weights))
    found[place] = spearman(*np.stack(halves, axis=1)).mean()
  return found


@dataclasses.dataclass(frozen=True)
class _Products:
  """Covariances over training examples of the scores of H replicates, of training draws first.

  Attributes:
    reference: [L, Q, H, H] of replicates at λ with replicates at λ₀, the smallest damping.
    own: [L, Q, H, H] of replicates at λ with each other.
  """

  reference: np.ndarray
  own: np.ndarray

  @classmethod
  def of(cls, sweep: Sweep) -> "_Products":
    num_queries, num_train = sweep[0].replicate_values.shape[1:]
    size = sum(num_replicates(sweep[0]))
    found = np.zeros((2, len(sweep), num_queries, size, size))
    for query in range(num_queries):
      replicates = [centred(replicates_of(scores, query), axis=1) for scores in sweep]
      for place, own in enumerate(replicates):
        found[:, place, query] = own @ replicates[0].T / num_train, own @ own.T / num_train
    return cls(*found)

  def of_replicates(self, matrix: np.ndarray) -> "_Products":
    """Those of other replicates, matrix [H', H] of these."""
    return _Products(matrix @ self.reference @ matrix.T, matrix @ self.own @ matrix.T)

  def fidelity(self, num_train: int) -> np.ndarray:
    """[L, Q] the `fidelity` of scores whose first `num_train` replicates are of training draws."""
    first = slice(num_train)
    std = np.sqrt(np.maximum(self.own[..., first, first].mean(axis=(-2, -1)), 0))
    covariance = _noise_free_covariance(self.reference, num_train)
    ratio = _quotient(covariance, std)
    factor = np.maximum(np.sqrt(np.maximum(covariance[0], 0)), np.abs(ratio).max(axis=0))
    return _quotient(ratio, np.broadcast_to(factor, ratio.shape))


def _noise_free_covariance(products: np.ndarray, num_train: int) -> np.ndarray:
  """T […] of covariances [..., H, H] between replicates; see `fidelity`."""
  of_train = products[..., :num_train, :num_train]
  of_queries = products[..., num_train:, num_train:]
  train = _between(of_train)
  if not of_queries.size:
    return train
  all_draws, other = of_train.mean(axis=(-2, -1)), _between(of_queries)
  low, high = np.minimum(train, other), np.abs(np.maximum(train, other))
  # Below 0 where either is.
  return low * np.divide(high, all_draws, out=np.ones_like(high), where=all_draws > 0)


def _between(products: np.ndarray) -> np.ndarray:
  """[…] the mean of [..., G, G] over all pairs of replicates g ≠ g', as over all splits."""
  num = products.shape[-1]
  return (products.sum(axis=(-2, -1)) - np.trace(products, axis1=-2, axis2=-1)) / (num * (num - 1))


def _left_out(num_train: int, num_query: int) -> Iterator[list[tuple[np.ndarray, tuple[int, int]]]]:
  """Yields, for either side's draws, what is left of all replicates without each one of that side.

  That is a matrix [H', G + A] which makes the scores of the H' replicates left from those of all,
  and their numbers (G', A'). Replicates of the other side have means over all draws of this one,
  from which the replicate left out is taken, to first order. Where one replicate of query draws is
  left, it counts as none, because there is no other to compare it with.
  """
  replicates = np.eye(num_train + num_query)
  for begin, end in ((0, num_train), (num_train, len(replicates))):
    side = []
    for left_out in range(begin, end):
      rest = [replicate for replicate in range(begin, end) if replicate != left_out]
      matrix = replicates + replicates[rest].mean(axis=0) - replicates[begin:end].mean(axis=0)
      matrix[begin:end] = replicates[begin:end]
      fewer = (num_train - 1, num_query) if begin == 0 else (num_train, num_query - 1)
      dropped = list(range(num_train, len(replicates))) if fewer[1] == 1 else [left_out]
      side.append((np.delete(matrix, dropped, axis=0), (fewer[0], fewer[1] if fewer[1] > 1 else 0)))
    if side:
      yield side


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, and 0 where b = 0: a query whose scores do not vary tells nothing."""
  return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
