"""The Nyström sketch of known matrices."""

import numpy as np

from jaxinf.curvature.nystrom import from_root, nystrom

SIZE = 60


def matrix(values) -> np.ndarray:
  basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
  return basis @ np.diag(values) @ basis.T


def test_a_matrix_of_low_rank_is_found_whole():
  values = np.concatenate([[9.0, 4, 2, 1], np.zeros(SIZE - 4)])
  exact = matrix(values)
  sketch = nystrom(lambda rows: rows @ exact, SIZE, rank=10, rows_at_once=4)
  # float32 test vectors, and the shift of 1e-6 of the largest eigenvalue
  np.testing.assert_allclose(sketch.eigenvalues[:4], values[:4], rtol=1e-3)
  assert sketch.eigenvalues[4:].max() < 1e-3
  found = (sketch.vectors * sketch.eigenvalues) @ sketch.vectors.T
  np.testing.assert_allclose(found, exact, atol=1e-3)


def test_eigenvalues_are_never_above_those_of_the_matrix():
  """A Nyström approximation is at most the matrix, which makes it a safe preconditioner."""
  values = np.logspace(1, -6, SIZE)
  exact = matrix(values)
  sketch = nystrom(lambda rows: rows @ exact, SIZE, rank=20)
  assert (sketch.eigenvalues <= values[:20] * (1 + 1e-4) + 1e-4).all()


def test_the_eigendirections_of_a_root_leave_out_what_is_rounding():
  root = np.diag([3.0, 2, 1e-6]) @ matrix(np.ones(SIZE))[:3]
  found = from_root(root)
  np.testing.assert_allclose(found.eigenvalues, [9, 4, 0], rtol=1e-5)
  product = (found.vectors * found.eigenvalues) @ found.vectors.T
  np.testing.assert_allclose(product, root.T @ root, atol=1e-5)
