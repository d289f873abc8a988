"""Scores by layer: what each layer of the network contributes to the influence of an example.

An inner product of gradients is a sum over layers, and so is a score. With the sum left out, the
layers can be weighted: scores[q, n] = Σ_l w_l · scores_l[q, n].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.scores.scores import Scores


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerScores:
  """Influence of every training example on every query through each of L layers.

  Attributes:
    replicate_values: [L, G, Q, N] float32, from G independent replicates of training draws.
    layers: names of the L layers.
    query_ids: [Q] ids of the queries.
    train_ids: [N] ids of the training examples.
    settings: what the scores were computed with, at one damping.
    query_replicate_values: [L, A, Q, N] float32, from A replicates of query draws; None for one.
    train_groups: [N] what the examples belong to; None: not given.

  Raises:
    ValueError: there are not as many names as layers of values, or a name comes twice.
  """

  replicate_values: np.ndarray
  layers: tuple[str, ...]
  query_ids: np.ndarray
  train_ids: np.ndarray
  settings: Mapping[str, Any]
  query_replicate_values: np.ndarray | None = None
  train_groups: np.ndarray | None = None

  def __post_init__(self):
    for name in ("replicate_values", "query_replicate_values"):
      values = getattr(self, name)
      if values is not None and (np.ndim(values) != 4 or len(values) != len(self.layers)):
        raise ValueError(
          f"{name} must be scores [{len(self.layers)}, …, Q, N] of as many layers as have names, "
          f"with replicates on the second axis; got shape {np.shape(values)}."
        )
    if len(set(self.layers)) < len(self.layers) or not self.layers:
      raise ValueError(f"layers must be different names, at least one; got {list(self.layers)}.")

  def __repr__(self) -> str:
    num_layers, num_replicates, num_queries, num_train = self.replicate_values.shape
    return (
      f"LayerScores({num_layers} layers × {num_queries} queries × {num_train} training examples, "
      f"{num_replicates} replicates of draws)"
    )

  @property
  def values(self) -> np.ndarray:
    """[L, Q, N] scores: the mean over replicates of draws."""
    return self.replicate_values.mean(axis=1)

  @property
  def spreads(self) -> np.ndarray:
    """[L] float64 spread of each layer's scores over training examples.

    It is the standard deviation over training examples, as a root mean square over queries.
    """
    return np.sqrt(self.values.var(axis=2, dtype=np.float64).mean(axis=1))

  def sum(self) -> Scores:
    """The scores of all layers together: those of `influence`."""
    return self._summed(np.ones(len(self.layers)), self.settings)

  def weighted(self, weights: Sequence[float] | np.ndarray) -> Scores:
    """Σ_l w_l · scores_l, with settings["layer_weights"].

    Standard errors are those of the draws; they take the weights as given.

    Args:
      weights: [L] finite numbers, one for each of `layers`. Where their mean is 1, equal ones are
        the scores of `sum`.

    Raises:
      ValueError: there are not as many weights as layers, or they are not finite.
    """
    factors = np.asarray(weights, np.float64)
    if factors.shape != (len(self.layers),) or not np.isfinite(factors).all():
      raise ValueError(
        f"weights must be {len(self.layers)} finite numbers, one for each layer in the order of "
        f".layers; got {weights!r}."
      )
    named = dict(zip(self.layers, factors.tolist(), strict=True))
    return self._summed(factors, {**self.settings, "layer_weights": named})

  def _summed(self, factors: np.ndarray, settings: Mapping[str, Any]) -> Scores:
    of_queries = self.query_replicate_values
    return Scores(
      _weighted_sum(factors, self.replicate_values),
      self.query_ids,
      self.train_ids,
      settings,
      None if of_queries is None else _weighted_sum(factors, of_queries),
      self.train_groups,
    )


def _weighted_sum(factors: np.ndarray, values: np.ndarray) -> np.ndarray:
  """[…] float32 sum of values [L, …] times factors [L], made in float64 layer by layer."""
  total = np.zeros(values.shape[1:])
  for factor, of_layer in zip(factors, values, strict=True):
    total += factor * of_layer.astype(np.float64)
  return total.astype(np.float32)
