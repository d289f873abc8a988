"""The leading eigendirections of a matrix, from products with it: a Nyström sketch.

(Frangella, Tropp and Udell, 2021: Randomized Nyström Preconditioning.) The GGN of a network has a
few thousand eigenvalues above a damping of interest, spread over many decades, and conjugate
gradients take a step for each decade; with the leading r of them taken out, the rest is close to a
multiple of the identity. The sketch is made once and serves every damping and right-hand side.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.linalg

_NOISE = 1e-6  # of the largest eigenvalue: what float32 products are right to


@dataclasses.dataclass(frozen=True)
class Nystrom:
  """U Λ Uᵀ ≈ H.

  Attributes:
    vectors: U [P, r] float32, orthonormal columns.
    eigenvalues: Λ [r] ≥ 0, descending.
  """

  vectors: np.ndarray
  eigenvalues: np.ndarray


def nystrom(
  product: Callable[[np.ndarray], np.ndarray],
  size: int,
  rank: int,
  seed: int = 0,
  rows_at_once: int = 64,
) -> Nystrom:
  """The Nyström approximation of a symmetric positive semi-definite matrix.

  Args:
    product: rows v [R, P] → rows H v [R, P].
    size: P.
    rank: r ≤ P, as many products are taken.
    seed: of the random test vectors.
    rows_at_once: R, at most.
  """
  rng = np.random.default_rng(seed)
  test, _ = np.linalg.qr(rng.normal(size=(size, rank)).astype(np.float32))
  sketch = np.empty_like(test)
  for begin in range(0, rank, rows_at_once):
    columns = slice(begin, begin + rows_at_once)
    sketch[:, columns] = product(test[:, columns].T.astype(np.float64)).T
  shift = _NOISE * float(np.linalg.norm(sketch, axis=0).max()) * np.sqrt(size)
  sketch += np.float32(shift) * test
  core = (test.T @ sketch).astype(np.float64)
  del test
  lower = scipy.linalg.cholesky((core + core.T) / 2, lower=True)
  root = scipy.linalg.solve_triangular(lower, sketch.T, lower=True, overwrite_b=True)
  found = from_root(root)
  eigenvalues = np.maximum(found.eigenvalues, shift) - shift
  return Nystrom(found.vectors, eigenvalues)


def from_root(root: np.ndarray) -> Nystrom:
  """The eigendirections of Rᵀ R for R [r, P], by the r × r matrix R Rᵀ of the same eigenvalues."""
  root = np.asarray(root, np.float32)
  values, rotation = np.linalg.eigh((root @ root.T).astype(np.float64))
  # Directions below the rounding of float32 are noise: their eigenvalues count as zero.
  kept = values > np.finfo(np.float32).eps * max(values[-1], np.finfo(np.float32).tiny)
  scale = np.divide(1, np.sqrt(np.abs(values)), out=np.zeros_like(values), where=kept)
  vectors = root.T @ (rotation * scale).astype(np.float32)
  return Nystrom(vectors[:, ::-1], np.where(kept, values, 0)[::-1])
