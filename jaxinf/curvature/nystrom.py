"""A Nyström preconditioner: the leading eigendirections of a matrix, from products with it.

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

  def precondition(self, vector: np.ndarray, damping: float) -> np.ndarray:
    """About (λ_r + λ) (H + λI)⁻¹ v for v [P], with λ_r the least eigenvalue of the sketch."""
    along = self.vectors.T @ vector.astype(np.float32)
    least = self.eigenvalues[-1] + damping
    return vector + self.vectors @ (along * (least / (self.eigenvalues + damping) - 1)).astype(
      np.float32
    )


def nystrom(
  product: Callable[[np.ndarray], np.ndarray], size: int, rank: int, seed: int = 0
) -> Nystrom:
  """The Nyström approximation of a symmetric positive semi-definite matrix.

  Args:
    product: v [P] → H v [P].
    size: P.
    rank: r ≤ P, as many products are taken.
    seed: of the random test vectors.
  """
  rng = np.random.default_rng(seed)
  test, _ = np.linalg.qr(rng.normal(size=(size, rank)).astype(np.float32))
  sketch = np.empty_like(test)
  for i in range(rank):
    sketch[:, i] = product(test[:, i].astype(np.float64))
  shift = _NOISE * float(np.linalg.norm(sketch, axis=0).max()) * np.sqrt(size)
  sketch += np.float32(shift) * test
  core = (test.T @ sketch).astype(np.float64)
  del test
  lower = scipy.linalg.cholesky((core + core.T) / 2, lower=True)
  root = scipy.linalg.solve_triangular(lower, sketch.T, lower=True, overwrite_b=True).T
  # U and Λ from the r × r matrix rootᵀ root, whose eigenvalues are those of the approximation.
  values, rotation = np.linalg.eigh((root.T @ root).astype(np.float64))
  values = np.maximum(values, shift)
  vectors = (root @ (rotation / np.sqrt(values)))[:, ::-1]
  return Nystrom(vectors.astype(np.float32), np.maximum(values[::-1] - shift, 0))
