"""Conjugate gradients and stochastic steps against dense solves of small matrices."""

import copy

import numpy as np
import pytest
import scipy.linalg

from jaxinf.curvature.iterations import (
  begin,
  conjugate_gradients,
  first_guess,
  largest_ratio,
  norms,
  stochastic_steps,
)

SIZE = 40
RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(SIZE, SIZE)) * np.logspace(0, -2, SIZE)
A = ROOT @ ROOT.T + 1e-3 * np.eye(SIZE)
# An approximation as preconditioner, symmetric: some 20 % off in every direction.
NEAR = scipy.linalg.sqrtm(A) @ np.diag(RNG.uniform(0.8, 1.2, SIZE)) @ scipy.linalg.sqrtm(A)
B = RNG.normal(size=(3, SIZE)) * np.array([[1], [0], [1e6]])
METRICS = {"none": np.array, "near": lambda rows: np.linalg.solve(NEAR, rows.T).T}
EXPECTED = np.linalg.solve(A, B.T).T


def product(rows):
  return rows @ A


def run(at, metric=np.array, tolerance=1e-8, max_iterations=500, b=B, by=product):
  how = {"tolerance": tolerance, "max_iterations": max_iterations}
  for _ in conjugate_gradients(by, metric, b, at, **how):
    pass
  return at


@pytest.mark.parametrize("name", METRICS)
def test_conjugate_gradients_solve_every_system_to_its_own_tolerance(name):
  """One of them is zero, and another a million times as large."""
  metric, counts = METRICS[name], []

  def counted(rows):
    counts.append(len(rows))
    return product(rows)

  at = run(begin(metric, B), metric, by=counted)
  assert (norms(B - product(at.x)) <= 1e-8 * norms(B)).all()
  assert (norms(at.x - EXPECTED) <= 1e-8 / 1e-3 * norms(B)).all()
  assert at.iterations[1] == 0 and not at.x[1].any()
  assert sum(counts) == at.iterations.sum()  # none for what is solved already
  if name == "near":
    assert at.iterations.max() <= 20 < run(begin(np.array, B)).iterations.max()


def test_a_system_is_solved_as_if_it_were_alone():
  metric = METRICS["near"]  # few iterations, in which rounding does not add up
  together, alone = run(begin(metric, B), metric), run(begin(metric, B[2:]), metric, b=B[2:])
  assert together.iterations[2] == alone.iterations[0]
  np.testing.assert_allclose(together.x[2:], alone.x, rtol=1e-6)  # BLAS adds up in another order


def test_a_warm_start_is_taken_where_it_is_nearer():
  near = EXPECTED * (1 + 1e-6)
  far = -1e3 * EXPECTED
  warm = np.where(np.arange(3)[:, None] == 2, far, near)
  at = begin(np.array, B, (warm, B - product(warm)))
  np.testing.assert_array_equal(at.x[0], near[0])
  assert not at.x[1:].any()
  cold = run(begin(np.array, B), tolerance=1e-4)
  assert run(at, tolerance=1e-4).iterations[0] < cold.iterations[0]


def test_steps_over_everything_are_a_neumann_series():
  """x_k − x = (I − α M⁻¹A)^k (x_0 − x), without momentum."""
  at, metric = first_guess(METRICS["near"], B), METRICS["near"]
  error = at.x - EXPECTED
  how = {"learning_rate": 0.3, "momentum": 0.0, "decay": 1.0, "num_steps": 12}
  for _ in stochastic_steps(lambda number, rows: product(rows), metric, B, at, **how):
    error = error - 0.3 * metric(product(error))
    np.testing.assert_allclose(at.x - EXPECTED, error, rtol=0, atol=1e-8 * np.abs(EXPECTED).max())
  assert (at.iterations == 12).all()


def test_steps_shrink_by_the_decay_in_a_hundred():
  """On A = M = I the error shrinks by 1 − α_k in step k."""
  at = first_guess(lambda rows: 0 * rows, B)
  how = {"learning_rate": 0.1, "momentum": 0.0, "decay": 0.5, "num_steps": 101}
  for _ in stochastic_steps(lambda number, rows: rows, np.array, B, at, **how):
    pass
  left = np.prod(1 - 0.1 * 0.5 ** (np.arange(101) / 100))
  np.testing.assert_allclose(B - at.x, left * B, rtol=1e-9)


def test_steps_that_diverge_are_refused():
  how = {"learning_rate": 2.5, "momentum": 0.0, "decay": 1.0, "num_steps": 100}
  rounds = stochastic_steps(
    lambda number, rows: product(rows), METRICS["near"], B, first_guess(METRICS["near"], B), **how
  )
  with pytest.raises(ValueError, match="The stochastic solves diverge: after .*step_pairs"):
    list(rounds)


def test_the_largest_eigenvalue_of_the_preconditioned_matrix_is_approached_from_below():
  start = RNG.normal(size=(4, SIZE))
  values = scipy.linalg.eigh(A, NEAR, eigvals_only=True)
  few, many = (largest_ratio(product, METRICS["near"], start, n) for n in (3, 300))
  assert few < many <= values[-1] * (1 + 1e-12)
  np.testing.assert_allclose(many, values[-1], rtol=1e-3)


@pytest.mark.parametrize("method", ["cg", "stochastic"])
def test_an_iteration_goes_on_from_its_arrays_bitwise(method):
  metric = METRICS["near"]

  def rounds(at):
    if method == "cg":
      return conjugate_gradients(product, metric, B, at, tolerance=1e-9, max_iterations=9)
    how = {"learning_rate": 0.1, "momentum": 0.9, "decay": 0.9, "num_steps": 9}
    noisy = lambda k, rows: product(rows) * (1 + 0.1 * (-1) ** k)
    return stochastic_steps(noisy, metric, B, at, **how)

  at = begin(metric, B) if method == "cg" else first_guess(metric, B)
  for number, _ in enumerate(rounds(at)):
    if number == 3:
      saved = copy.deepcopy(at)
  list(rounds(saved))
  for name, array in saved.arrays.items():
    np.testing.assert_array_equal(array, at.arrays[name])
