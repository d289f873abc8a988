"""The Nyström sketch of known matrices."""

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, cg

from jaxinf.curvature.nystrom import nystrom

SIZE = 60


def matrix(values) -> np.ndarray:
  basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
  return basis @ np.diag(values) @ basis.T


def test_a_matrix_of_low_rank_is_found_whole():
  values = np.concatenate([[9.0, 4, 2, 1], np.zeros(SIZE - 4)])
  exact = matrix(values)
  sketch = nystrom(lambda v: exact @ v, SIZE, rank=10)
  # float32 test vectors, and the shift of 1e-6 of the largest eigenvalue
  np.testing.assert_allclose(sketch.eigenvalues[:4], values[:4], rtol=1e-3)
  assert sketch.eigenvalues[4:].max() < 1e-3
  found = (sketch.vectors * sketch.eigenvalues) @ sketch.vectors.T
  np.testing.assert_allclose(found, exact, atol=1e-3)
  v, damping = np.random.default_rng(1).normal(size=SIZE), 0.1
  expected = (sketch.eigenvalues[-1] + damping) * np.linalg.solve(exact + damping * np.eye(SIZE), v)
  np.testing.assert_allclose(sketch.precondition(v, damping), expected, atol=1e-3)


def test_eigenvalues_are_never_above_those_of_the_matrix():
  """A Nyström approximation is at most the matrix, which makes it a safe preconditioner."""
  values = np.logspace(1, -6, SIZE)
  exact = matrix(values)
  sketch = nystrom(lambda v: exact @ v, SIZE, rank=20)
  assert (sketch.eigenvalues <= values[:20] * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
def test_conjugate_gradients_take_few_steps_with_it(damping):
  exact = matrix(np.logspace(2, -6, SIZE))
  sketch = nystrom(lambda v: exact @ v, SIZE, rank=40)
  operator = lambda f: LinearOperator((SIZE, SIZE), matvec=f, dtype=np.float64)
  damped, b = exact + damping * np.eye(SIZE), np.ones(SIZE)
  steps = {}
  for name, metric in (
    ("plain", None),
    ("sketch", operator(lambda v: sketch.precondition(v, damping))),
  ):
    count = []
    x, _ = cg(damped, b, rtol=1e-5, maxiter=500, M=metric, callback=count.append)
    steps[name] = len(count)
    assert np.linalg.norm(damped @ x - b) <= 1.1e-5 * np.linalg.norm(b)
  assert steps["sketch"] <= steps["plain"] / 3
