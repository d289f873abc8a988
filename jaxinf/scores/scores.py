"""Scores of training examples for queries, and rankings made of them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.scores.statistics import mean_and_error


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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scores:
  """Influence of every training example on every query.

  scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Positive: example n supports query q, so that removing
  n makes the model fit q worse. The predicted change of m_q for removing a set I of examples is
  Σ_{n∈I} scores[q, n] / N; see `removal`.

  Attributes:
    replicate_values: [G, Q, N] float32, scores from G independent replicates of training draws.
    query_ids: [Q] ids of the queries.
    train_ids: [N] ids of the training examples.
    settings: what the scores were computed with (measurement, damping, draws, …).
    query_replicate_values: [A, Q, N] float32, scores from A replicates of query draws. Each of
      them has the mean over all training draws, and each of the G above the mean over all
      query draws. None: query draws have one replicate.
    train_groups: [N] what the examples belong to (an artist, a class); None: not given.
    num_examples: the N that a removal divides by; None: as many as there are train_ids. It is
      larger where a column is a sum over examples.

  Raises:
    ValueError: the shapes of the values and the numbers of ids or groups do not agree.

  Examples:
    >>> of_draws = np.array([[[3, -1, 0]], [[5, -1, 2]]], np.float32)  # two replicates
    >>> scores = Scores(of_draws, np.array(["sample"]), np.array(["cat", "dog", "fox"]), {})
    >>> scores.values.tolist()
    [[4.0, -1.0, 1.0]]
    >>> scores.std_errors.round(6).tolist()
    [[1.0, 0.0, 1.0]]
    >>> scores.top(2).ids.tolist()
    [['cat', 'fox']]
  """

  replicate_values: np.ndarray
  query_ids: np.ndarray
  train_ids: np.ndarray
  settings: Mapping[str, Any]
  query_replicate_values: np.ndarray | None = None
  train_groups: np.ndarray | None = None
  num_examples: int | None = None

  def __post_init__(self):
    shape = np.shape(self.replicate_values)
    if len(shape) != 3 or not shape[0]:
      raise ValueError(
        "replicate_values must be scores [G, Q, N] of G ≥ 1 replicates of draws, Q queries and N "
        f"training examples; got shape {shape}."
      )
    lengths = {"query_ids": shape[1], "train_ids": shape[2], "train_groups": shape[2]}
    for name, length in lengths.items():
      values = getattr(self, name)
      if values is not None and np.shape(values) != (length,):
        raise ValueError(
          f"{name} must be {length}, as replicate_values {shape} has them; got {np.shape(values)}."
        )
    of_queries = self.query_replicate_values
    if of_queries is not None and (np.ndim(of_queries) != 3 or of_queries.shape[1:] != shape[1:]):
      raise ValueError(
        f"query_replicate_values must be scores [A, {shape[1]}, {shape[2]}], of the same queries "
        f"and training examples as replicate_values; got shape {np.shape(of_queries)}."
      )

  @property
  def values(self) -> np.ndarray:
    """[Q, N] scores: the mean over replicates of draws."""
    return self.replicate_values.mean(axis=0)

  @property
  def std_errors(self) -> np.ndarray:
    """[Q, N] float32 standard errors over draws, of training examples and of queries.

    A score is bilinear in two averages over draws, the query's gradient and the example's, whose
    noises are independent. To first order they add:

      Var(score) = Var over training replicates / G + Var over query replicates / A.

    The product of the two noises, which is of second order, is counted twice: errors that are large
    beside the scores are overestimated. Without replicates of query draws (None or A = 1) the
    errors are over training draws alone; NaN where G = 1.
    """
    return _errors(self.replicate_values, self.query_replicate_values)

  def by_group(self) -> "Scores":
    """Scores of the M groups of training examples: sums over the examples of each.

    The groups become the train_ids, in ascending order. Replicates of draws stay apart, so that the
    standard errors are those of the sums: examples share their draws, and their noise with them.

    Raises:
      ValueError: the scores have no train_groups.
    """
    if self.train_groups is None:
      raise ValueError("Scores summed over groups need train_groups, whose each example is.")
    groups, members = np.unique(self.train_groups, return_inverse=True)
    of_queries = self.query_replicate_values
    summed = lambda values: _sums(values, members, len(groups))
    return dataclasses.replace(
      self,
      replicate_values=summed(self.replicate_values),
      query_replicate_values=None if of_queries is None else summed(of_queries),
      train_ids=groups,
      train_groups=None,
      num_examples=self._num_examples,
    )

  def removal(self, ids: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """Predicted change of each query's measurement where these training examples are removed.

    Σ scores[q, n] / N over the examples n; of scores `by_group`, ids are groups, and N still counts
    examples. Positive: the model will fit the query worse.

    Args:
      ids: of train_ids; one that comes twice counts once.

    Returns:
      Changes [Q] and their standard errors [Q] over draws, NaN where draws are one replicate. The
      errors are those of the sum, since examples share draws.

    Raises:
      ValueError: an id is none of train_ids.
    """
    asked = set(np.asarray(list(ids)).tolist())
    known = np.asarray(self.train_ids).tolist()
    unknown = sorted(map(repr, asked - set(known)))
    if unknown:
      raise ValueError(
        f"{len(unknown)} ids are of no training example: {', '.join(unknown[:3])}"
        f"{', …' if len(unknown) > 3 else ''}. There are {len(known)}, such as {known[:3]}."
      )
    removed = np.array([identity in asked for identity in known])
    change = lambda values: values[..., removed].sum(axis=-1, dtype=float) / self._num_examples
    of_queries = self.query_replicate_values
    replicates = change(self.replicate_values)
    errors = _errors(replicates, None if of_queries is None else change(of_queries))
    return replicates.mean(axis=0), errors

  def size(self) -> str:
    """How many queries, training examples and replicates of draws there are, in words."""
    num_replicates, num_queries, num_train = self.replicate_values.shape
    text = (
      f"{num_queries} queries × {num_train} training examples, {num_replicates} replicates of draws"
    )
    return (
      text
      if self.query_replicate_values is None
      else f"{text}, {len(self.query_replicate_values)} of query draws"
    )

  def summary(self) -> str:
    """One line: their number, what they are of, and how large they are beside their errors."""
    names = [name for name in ("method", "measurement", "damping") if name in self.settings]
    said = [f"{name} {self.settings[name]}" for name in names]
    values, errors = self.values, self.std_errors
    scale = float(np.sqrt(np.mean(np.square(values, dtype=float)))) if values.size else 0.0
    said.append(f"root mean square {scale:.3g}")
    if values.size and not np.isnan(errors).all():
      said.append(f"standard errors {float(np.sqrt(np.mean(np.square(errors, dtype=float)))):.3g}")
    return f"{self.size()}; {', '.join(said)}"

  def __repr__(self) -> str:
    damping = self.settings.get("damping")
    return f"Scores({self.size()}" + (")" if damping is None else f"; λ = {damping:g})")

  def top(self, k: int) -> Ranking:
    """The k most supporting training examples of each query."""
    return self._ranked(k, -self.values)

  def bottom(self, k: int) -> Ranking:
    """The k most opposing training examples of each query (lowest scores first)."""
    return self._ranked(k, self.values)

  def neutral(self, k: int) -> Ranking:
    """The k training examples of each query whose scores are nearest to zero."""
    return self._ranked(k, np.abs(self.values))

  @property
  def _num_examples(self) -> int:
    return len(self.train_ids) if self.num_examples is None else self.num_examples

  def _ranked(self, k: int, order_by: np.ndarray) -> Ranking:
    num_train = order_by.shape[1]
    if checked_count(k, "k") > num_train:
      raise ValueError(f"k must lie in 1…{num_train}, the number of training examples; got {k}.")
    positions = np.argsort(order_by, axis=1, kind="stable")[:, :k]
    pick = lambda array: np.take_along_axis(array, positions, axis=1)
    return Ranking(
      ids=self.train_ids[positions],
      values=pick(self.values),
      std_errors=pick(self.std_errors),
      positions=positions,
    )


def _errors(replicates: np.ndarray, query_replicates: np.ndarray | None) -> np.ndarray:
  """Standard errors of numbers [G, …] and [A, …] over replicates; see `Scores.std_errors`."""
  _, errors = mean_and_error(replicates, axis=0)
  if query_replicates is None or len(query_replicates) < 2:
    return errors
  return np.hypot(errors, mean_and_error(query_replicates, axis=0)[1])


def _sums(values: np.ndarray, members: np.ndarray, num_groups: int) -> np.ndarray:
  """[…, M] float32 sums of values [..., N] over the examples of each group, made in float64."""
  order = np.argsort(members, kind="stable")
  begins = np.searchsorted(members[order], np.arange(num_groups))
  return np.add.reduceat(values[..., order], begins, axis=-1, dtype=np.float64).astype(np.float32)
