"""How far down its list the order of a query's training examples can be trusted.

Split halves, without assumptions on the noise: the replicates of draws form two disjoint halves,
and each half ranks the examples. h_i, the scores of half i, is the mean over its ⌊G/2⌋ replicates
of training draws; where there are replicates of query draws,

  h_i = mean of training replicates in half i + (mean of query replicates in half i − mean of all
  query
        replicates),

to first order the scores from that half of the query draws and that half of the training draws.
All is averaged over splits. It is conservative, for two reasons: the scores themselves have twice
the draws of a half, and h_i lacks the product of both noises, so that with much noise on both sides
halves agree too little (nothing but noise: a correlation of −⅓ instead of 0). Without replicates of
query draws (None or A = 1) the noise of query gradients is not counted.

Equal scores are no agreement, because nothing orders them. Their ranks are averages, so that scores
that are all equal have the correlation 0. Which of them enter a list of the top k is a draw, made
anew in each half, and the overlap is its mean over all such draws: by chance.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from jaxinf.core.checks import checked_count, checked_seed
from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import spearman

Halving = tuple[tuple[int, ...], tuple[int, ...]]  # replicates in the first half, in the second


@dataclasses.dataclass(frozen=True)
class RankStability:
  """Agreement between rankings of two halves of the draws; see `rank_stability`.

  Attributes:
    depths: [K] k = 1, 2, 3, 5, 10, 20, 50, … and last ⌊N/2⌋.
    overlap: [Q, K] |top-k(h₁) ∩ top-k(h₂)| / k, mean over splits.
    chance: [K] k / N, the overlap to expect of pure noise.
    correlation: [Q] Spearman's rank correlation of h₁ and h₂ over all N examples, mean over splits.
  """

  depths: np.ndarray
  overlap: np.ndarray
  chance: np.ndarray
  correlation: np.ndarray

  @property
  def reliability(self) -> np.ndarray:
    """[Q] correlation to expect between these scores and those of as many fresh draws.

    Spearman and Brown's 2r / (1 + r) of the correlation r of halves, 0 where r < 0. With an odd
    number of replicates a half has less than half the draws, and the truth is a little higher.
    """
    correlation = np.maximum(self.correlation, 0)
    return 2 * correlation / (1 + correlation)

  def depth(self, agreement: float = 0.8) -> np.ndarray:
    """[Q] ints: the depth k down to which a query's top lists can be trusted.

    The largest of the depths such that the overlap reaches `agreement` there and at all smaller
    depths from 5 on (from ⌊N/2⌋ where that is less); 0 where it fails at the first of these. Depths
    below 5 are not looked at, because chance decides which of a few nearly equal examples is first.
    """
    asked = self.depths >= min(5, self.depths[-1])
    reached = np.logical_and.accumulate(self.overlap[:, asked] >= agreement, axis=1)
    return np.concatenate([[0], self.depths[asked]])[reached.sum(axis=1)]

  def summary(self) -> str:
    """One line on the top 10 (or ⌊N/2⌋), the trusted depth and the correlation."""
    column = np.flatnonzero(self.depths <= 10)[-1]
    overlap = self.overlap[:, column]
    depth = np.percentile(self.depth(), 50, method="lower")
    return (
      f"top {self.depths[column]}: halves of the draws agree on {_percent(overlap.mean())} "
      f"(worst query {_percent(overlap.min())}, chance {_percent(self.chance[column])}); "
      f"on 80 % down to depth {depth} in the median query; rank correlation "
      f"{self.correlation.mean():.2f}, of all draws with as many fresh ones "
      f"{self.reliability.mean():.2f}"
    )


def rank_stability(scores: Scores, *, seed: int = 0, num_splits: int = 20) -> RankStability:
  """Compares the rankings of two halves of the draws, at all depths.

  Args:
    scores: of Q queries and N ≥ 2 training examples, in G ≥ 2 replicates of training draws.
    seed: of the splits, where there are more than num_splits.
    num_splits: to average over; all distinct ones where there are fewer.

  Raises:
    ValueError: there is one replicate of draws only, or one training example.

  Examples:
    >>> ids, order = np.arange(20), np.arange(20.0)
    >>> agreeing = Scores(np.stack([order, order])[:, None], np.array(["sample"]), ids, {})
    >>> rank_stability(agreeing).depth(0.8).tolist()  # the deepest it looks at is half of them
    [10]
    >>> opposite = Scores(np.stack([order, -order])[:, None], np.array(["sample"]), ids, {})
    >>> rank_stability(opposite).depth(0.8).tolist()
    [0]
  """
  weights = split_weights(*num_replicates(scores), seed=seed, num_splits=num_splits)
  _, num_queries, num_train = scores.replicate_values.shape
  if num_train < 2:
    raise ValueError("Ranks need at least two training examples; the scores are of one.")
  depths = _depths(num_train // 2)
  shared = np.zeros((num_queries, len(depths)))
  correlation = np.zeros(num_queries)
  for query in range(num_queries):
    for halves in split_halves(replicates_of(scores, query), weights):
      ordered = np.sort(halves)
      for column, k in enumerate(depths):
        shared[query, column] += _num_shared(halves, ordered[:, -k], k)
      correlation[query] += spearman(*halves)
  num_splits = len(weights)
  return RankStability(
    depths, shared / (num_splits * depths), depths / num_train, correlation / num_splits
  )


def top_overlap(scores: Scores, k: int, *, seed: int = 0, num_splits: int = 20) -> np.ndarray:
  """[Q] |top-k(h₁) ∩ top-k(h₂)| / k, mean over splits: `rank_stability` at one depth, faster.

  Raises:
    ValueError: there is one replicate of draws only, or k is not in 1…N.
  """
  weights = split_weights(*num_replicates(scores), seed=seed, num_splits=num_splits)
  _, num_queries, num_train = scores.replicate_values.shape
  if not 1 <= k <= num_train:
    raise ValueError(f"k must lie in 1…{num_train}, the number of training examples; got {k}.")
  shared = np.zeros(num_queries)
  for query in range(num_queries):
    for halves in split_halves(replicates_of(scores, query), weights):
      shared[query] += _num_shared(halves, np.partition(halves, -k)[:, -k], k)
  return shared / (len(weights) * k)


def num_replicates(scores: Scores) -> tuple[int, int]:
  """(G, A) replicates of training draws and of query draws; A = 0 where these do not split."""
  of_queries = scores.query_replicate_values
  num_query = 0 if of_queries is None else len(of_queries)
  return len(scores.replicate_values), num_query if num_query > 1 else 0


def split_weights(num_train: int, num_query: int, *, seed: int, num_splits: int) -> np.ndarray:
  """[S, 2, G + A] weights of replicates of draws in the two halves of S distinct splits.

  Training replicates come first, then query replicates. Of an odd number of replicates a split
  leaves one out. Swapping both halves gives the same split.

  Args:
    num_train: G.
    num_query: A, 0 or at least 2.
    seed, num_splits: as of `rank_stability`.

  Raises:
    ValueError: there is one replicate of training draws only, or num_splits < 1.
  """
  if num_train < 2:
    raise ValueError(
      "Halves of the draws need at least 2 replicates of training draws; the scores have 1. "
      "Compute them with Draws(…, replicates=5), or with 2 or more."
    )
  num_splits, seed = checked_count(num_splits, "num_splits"), checked_seed(seed)
  if _num_halvings(num_train) * _num_halvings(num_query) // 2 <= num_splits:
    pairs = itertools.product(_halvings(num_train), _halvings(num_query))
    splits = dict.fromkeys(pair for pair in pairs if pair[0][0] < pair[0][1])
  else:
    rng = np.random.default_rng(seed)
    splits = {}
    while len(splits) < num_splits:
      train, query = _random_halving(rng, num_train), _random_halving(rng, num_query)
      splits[(train, query) if train[0] < train[1] else (train[::-1], query[::-1])] = None
  weights = np.zeros((len(splits), 2, num_train + num_query))
  weights[..., num_train:] = -1 / max(num_query, 1)
  for rows, (train, query) in zip(weights, splits, strict=True):
    for row, train_half, query_half in zip(rows, train, query, strict=True):
      row[list(train_half)] = 1 / len(train_half)
      row[[num_train + replicate for replicate in query_half]] += 1 / max(len(query_half), 1)
  return weights


def replicates_of(scores: Scores, query: int) -> np.ndarray:
  """[G + A, N] float64 scores of one query, of replicates of training draws and of query draws."""
  replicates, of_queries = scores.replicate_values[:, query], scores.query_replicate_values
  if of_queries is not None and len(of_queries) > 1:
    replicates = np.concatenate([replicates, of_queries[:, query]])
  return replicates.astype(np.float64)


def split_halves(replicates: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
  """Yields (h₁, h₂) [2, N] float32 of replicates [G + A, N] for each of S splits [S, 2, G + A]."""
  for pair in weights:
    yield (pair @ replicates).astype(np.float32)


def _num_shared(halves: np.ndarray, last: np.ndarray, k: int) -> float:
  """|top-k(h₁) ∩ top-k(h₂)|, the mean over the order of equal scores, each half's its own.

  Args:
    halves: h [2, N].
    last: [2] the k-th highest score of each half.
  """
  above, tied = halves > last[:, None], halves == last[:, None]
  chance = (k - above.sum(axis=1)) / tied.sum(axis=1)  # that one of the last enters
  first, second = above + chance[:, None] * tied
  return float(first @ second)


def _num_halvings(num: int) -> int:
  half = num // 2
  return math.comb(num, half) * math.comb(num - half, half)


def _halvings(num: int) -> Iterator[Halving]:
  """All ordered pairs of disjoint halves of `num` replicates."""
  for first in itertools.combinations(range(num), num // 2):
    rest = [replicate for replicate in range(num) if replicate not in first]
    for second in itertools.combinations(rest, num // 2):
      yield first, second


def _random_halving(rng: np.random.Generator, num: int) -> Halving:
  order, half = rng.permutation(num).tolist(), num // 2
  return tuple(sorted(order[:half])), tuple(sorted(order[half : 2 * half]))


def _depths(last: int) -> np.ndarray:
  """[K] 1, 2, 3, 5, 10, 20, 50, 100, … below `last`, then `last` ≥ 1."""
  steps = (digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5))
  return np.array(sorted({depth for depth in (*steps, 3) if depth < last} | {last}))


def _percent(share: float) -> str:
  return f"{100 * share:{'.0f' if share >= 0.01 else '.1g'}} %"
