"""The empirical Fisher of features (paper, Eq. 11) and its damped inverse, on the host in float64.

H = Φᵀ Φ / N for features Φ [N, k] of N training examples, and A = H + λ I. One eigendecomposition,
of the smaller of Φᵀ Φ [k, k] and Φ Φᵀ [N, N], serves every damping λ: with K = Φ Φᵀ / N,

  A⁻¹ Φᵀ = Φᵀ (K + λ I)⁻¹.
"""

from collections.abc import Iterator

import numpy as np

_PART = 2**25  # numbers that are turned into float64 at once


class PrimalFisher:
  """H from the eigendecomposition of Φᵀ Φ / N [k, k]: for no more features than examples."""

  def __init__(self, features: np.ndarray):
    self.features = features
    eigenvalues, self._vectors = np.linalg.eigh(_gram(features) / len(features))
    self._eigenvalues = np.maximum(eigenvalues, 0)  # below zero by rounding alone

  def scores(self, queries: np.ndarray, damping: float) -> np.ndarray:
    """S = q A⁻¹ Φᵀ [Q, N] of features of queries q [Q, k]."""
    return _products(self._solved(queries, damping), self.features)

  def slack(self, damping: float) -> np.ndarray:
    """1 − h_n [N] in (0, 1], with the leverages h_n = φ_nᵀ A⁻¹ φ_n / N."""
    weights = 1 / (self._eigenvalues + damping) / len(self.features)
    parts = [np.square(part @ self._vectors) @ weights for _, part in _parts(self.features)]
    return 1 - np.concatenate(parts)

  def change(
    self, queries: np.ndarray, scores: np.ndarray, changes: np.ndarray, damping: float
  ) -> np.ndarray:
    """dS [Q, N], what S changes by to first order where Φ changes by dΦ, in H as well.

    dS = U − (U Φ + S dΦ) A⁻¹ Φᵀ / N, with U = q A⁻¹ dΦᵀ.
    """
    direct = _products(self._solved(queries, damping), changes)
    mixed = _combined(direct, self.features) + _combined(scores, changes)
    return direct - self.scores(mixed / len(self.features), damping)

  def _solved(self, queries: np.ndarray, damping: float) -> np.ndarray:
    """q A⁻¹ [Q, k]."""
    return queries @ self._vectors / (self._eigenvalues + damping) @ self._vectors.T


class DualFisher:
  """H from the eigendecomposition of K = Φ Φᵀ / N [N, N]: for more features than examples."""

  def __init__(self, features: np.ndarray):
    self.features = features
    eigenvalues, self._vectors = np.linalg.eigh(_gram(features.T) / len(features))
    self._eigenvalues = np.maximum(eigenvalues, 0)

  def scores(self, queries: np.ndarray, damping: float) -> np.ndarray:
    """S = q Φᵀ (K + λ I)⁻¹ [Q, N]."""
    return self._solved(_products(queries, self.features), damping)

  def slack(self, damping: float) -> np.ndarray:
    """1 − h_n = [λ (K + λ I)⁻¹]_nn [N]."""
    return np.square(self._vectors) @ (damping / (self._eigenvalues + damping))

  def change(
    self, queries: np.ndarray, scores: np.ndarray, changes: np.ndarray, damping: float
  ) -> np.ndarray:
    """dS = (q dΦᵀ − S (Φ dΦᵀ + dΦ Φᵀ) / N) (K + λ I)⁻¹, without a division by λ alone."""
    num = len(self.features)
    direct = _products(queries - _combined(scores, self.features) / num, changes)
    return self._solved(
      direct - _products(_combined(scores, changes) / num, self.features), damping
    )

  def _solved(self, rows: np.ndarray, damping: float) -> np.ndarray:
    """rows (K + λ I)⁻¹ [Q, N]."""
    return rows @ self._vectors / (self._eigenvalues + damping) @ self._vectors.T


Fisher = PrimalFisher | DualFisher


def fisher_of(features: np.ndarray) -> Fisher:
  """The Fisher of features [N, k] float32, from the smaller eigendecomposition."""
  num, size = features.shape
  return PrimalFisher(features) if size <= num else DualFisher(features)


def group_scores(
  fisher: Fisher, train: np.ndarray, query: np.ndarray, damping: float
) -> tuple[np.ndarray, np.ndarray]:
  """Scores by replicates of training draws [G, Q, N] and of query draws [A, Q, N]; means are S.

  A replicate of training draws moves S by dS for dΦ = Φ_g − Φ, and H with it: its features in an H
  that stood still would say too much, where they leave the span of Φ and λ is small.

  Args:
    fisher: of the means of `train`.
    train: [N, G, k] features.
    query: [Q, A, k] features, in which S is linear.
    damping: λ.
  """
  of_queries = np.stack([fisher.scores(query[:, a], damping) for a in range(query.shape[1])])
  scores, asked = of_queries.mean(axis=0), query.mean(axis=1, dtype=np.float64)
  moved = np.zeros((train.shape[1], *scores.shape))
  if len(moved) > 1:
    for g in range(len(moved)):
      moved[g] = fisher.change(asked, scores, train[:, g] - fisher.features, damping)
    moved -= moved.mean(axis=0)  # which is zero but for rounding
  return scores + moved, of_queries


def _gram(rows: np.ndarray) -> np.ndarray:
  """rowsᵀ rows in float64."""
  total = np.zeros((rows.shape[1], rows.shape[1]))
  for _, part in _parts(rows):
    total += part.T @ part
  return total


def _products(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """vectors [Q, k] · rowsᵀ [k, N] in float64."""
  return np.concatenate([vectors @ part.T for _, part in _parts(rows)], axis=1)


def _combined(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """weights [Q, N] · rows [N, k] in float64."""
  return sum(
    (weights[:, span] @ part for span, part in _parts(rows)),
    start=np.zeros((len(weights), rows.shape[1])),
  )


def _parts(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (which rows, those rows in float64)."""
  size = max(1, _PART // rows.shape[1])
  for begin in range(0, len(rows), size):
    span = slice(begin, begin + size)
    yield span, rows[span].astype(np.float64)
