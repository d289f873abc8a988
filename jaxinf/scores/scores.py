"""Scores of training examples for queries, and rankings made of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranking:
  """The highest scoring training examples of each query, best first.

  Attributes:
    ids: [Q, k] ids of training examples.
    values: [Q, k] their scores.
    std_errors: [Q, k] standard errors of the scores over draws.
    positions: [Q, k] their rows in the training set.
  """

  ids: np.ndarray
  values: np.ndarray
  std_errors: np.ndarray
  positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """Influence of every training example on every query.

  scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Positive: example n supports query q, so that removing
  n makes the model fit q worse. The predicted change of m_q for removing a set I of examples is
  Σ_{n∈I} scores[q, n] / N.

  Attributes:
    group_values: [G, Q, N] float32, scores from G disjoint groups of training draws.
    query_ids: [Q] ids of the queries.
    train_ids: [N] ids of the training examples.
    settings: what the scores were computed with (measurement, damping, draws, …).
    query_group_values: [A, Q, N] float32, scores from A disjoint groups of query draws, each with
      the mean over all training draws, as each of the G is with that over all query draws. None:
      query draws were not grouped.
  """

  group_values: np.ndarray
  query_ids: np.ndarray
  train_ids: np.ndarray
  settings: Mapping[str, Any]
  query_group_values: np.ndarray | None = None

  @property
  def values(self) -> np.ndarray:
    """[Q, N] scores: the mean over groups of draws."""
    return self.group_values.mean(axis=0)

  @property
  def std_errors(self) -> np.ndarray:
    """[Q, N] float32 standard errors over draws, of training examples and of queries.

    A score is bilinear in two averages over draws, the query's gradient and the example's, whose
    noises are independent. To first order they add:

      Var(score) = Var over training groups / G + Var over query groups / A.

    The product of the two noises, second order, is counted twice: large errors are on the safe
    side. Without groups of query draws (None or A = 1) the errors are over training draws alone;
    NaN where G = 1.
    """
    errors = _mean_errors(self.group_values)
    if self.query_group_values is None or len(self.query_group_values) < 2:
      return errors
    return np.hypot(errors, _mean_errors(self.query_group_values))

  def top(self, k: int) -> Ranking:
    """The k most supporting training examples of each query."""
    return self._ranked(k, -self.values)

  def bottom(self, k: int) -> Ranking:
    """The k most opposing training examples of each query (lowest scores first)."""
    return self._ranked(k, self.values)

  def neutral(self, k: int) -> Ranking:
    """The k training examples of each query whose scores are nearest to zero."""
    return self._ranked(k, np.abs(self.values))

  def _ranked(self, k: int, order_by: np.ndarray) -> Ranking:
    num_train = order_by.shape[1]
    if not 1 <= k <= num_train:
      raise ValueError(f"k must lie in 1…{num_train}, the number of training examples; got {k}.")
    positions = np.argsort(order_by, axis=1, kind="stable")[:, :k]
    pick = lambda array: np.take_along_axis(array, positions, axis=1)
    return Ranking(
      ids=self.train_ids[positions],
      values=pick(self.values),
      std_errors=pick(self.std_errors),
      positions=positions,
    )


def _mean_errors(groups: np.ndarray) -> np.ndarray:
  """[Q, N] standard errors of the mean of groups [G, Q, N]; NaN where G = 1."""
  if len(groups) < 2:
    return np.full(groups.shape[1:], np.nan, np.float32)
  return groups.std(axis=0, ddof=1) / len(groups) ** 0.5
