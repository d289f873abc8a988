"""Preconditioners of matrices that are a Kronecker part and something of low rank."""

import types

import numpy as np
import pytest

from jaxinf.core.types import Eigenbasis
from jaxinf.curvature.iterations import begin, conjugate_gradients, norms
from jaxinf.curvature.metrics import Kronecker, Metric, Sketch

SHAPES = {"first": (4, 5), "last": (3, 6)}
LAYERS = [types.SimpleNamespace(name=n, matrix_shape=shape) for n, shape in SHAPES.items()]
SIZE = 4 * 5 + 3 * 6
RNG = np.random.default_rng(0)


def orthogonal(size):
  return np.linalg.qr(RNG.normal(size=(size, size)))[0]


BASES = {
  name: Eigenbasis(orthogonal(d_in), orthogonal(d_out), RNG.uniform(size=(d_out, d_in)) ** 6)
  for name, (d_out, d_in) in SHAPES.items()
}
K = np.zeros((SIZE, SIZE))
K[:20, :20], K[20:, 20:] = (
  np.kron(b.q_out, b.q_in) @ np.diag(b.eigenvalues.ravel()) @ np.kron(b.q_out, b.q_in).T
  for b in BASES.values()
)
LOW = RNG.normal(size=(SIZE, 12))
H = K + LOW @ LOW.T  # what K misses has rank 12
ROWS = RNG.normal(size=(3, SIZE))
PARTS = {"zero": (None, np.zeros_like(K)), "Kronecker": (BASES, K)}
WITHOUT_ROUNDING = 1e-10
SINGLE = 1e-4  # a sketch is float32, of a matrix with some ten decades


def power(matrix, exponent):
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * values**exponent) @ vectors.T


def sketched(kronecker, rank, damping):
  return Sketch.of(
    lambda rows: rows @ H, kronecker, size=SIZE, rank=rank, damping=damping, rows_at_once=7
  )


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.5])
@pytest.mark.parametrize("part", PARTS)
def test_powers_are_those_of_the_dense_matrix(part, exponent):
  """Of more rows than visit the device together."""
  bases, dense = PARTS[part]
  rows = RNG.normal(size=(20, SIZE))
  found = Kronecker(LAYERS, bases, "float64").power(rows, exponent, 0.1)
  expected = rows @ power(dense + 0.1 * np.eye(SIZE), exponent)
  np.testing.assert_allclose(found, expected, rtol=0, atol=WITHOUT_ROUNDING)


@pytest.mark.parametrize("damping", [0.1, 0.02])
@pytest.mark.parametrize("part", PARTS)
def test_a_sketch_deflates_what_the_kronecker_part_misses(part, damping):
  """M⁻¹ from the eigenvectors of P^(-½) H P^(-½), at the damping of the sketch and at another."""
  bases, dense = PARTS[part]
  kronecker = Kronecker(LAYERS, bases, "float64")
  metric = Metric(kronecker, damping, sketched(kronecker, SIZE, 0.1))
  root = power(dense + damping * np.eye(SIZE), -0.5)
  values, vectors = np.linalg.eigh(root @ H @ root)
  least = max(values[0], 0)
  inner = (vectors * (least + 1) / (values + 1)) @ vectors.T
  expected = ROWS @ root @ inner @ root
  np.testing.assert_allclose(metric(ROWS), expected, atol=SINGLE * np.abs(expected).max())


def iterations(metric, damping):
  product = lambda rows: rows @ H + damping * rows
  at = begin(metric, ROWS)
  how = {"tolerance": 1e-6, "max_iterations": 200}
  for _ in conjugate_gradients(product, metric, ROWS, at, **how):
    pass
  assert (norms(ROWS - product(at.x)) <= 1e-6 * norms(ROWS)).all()
  return at.iterations.max()


def test_conjugate_gradients_take_few_steps_with_both_parts():
  """K alone leaves 13 different eigenvalues; a sketch alone the small ones of K."""
  damping = 1e-3
  kronecker, nothing = Kronecker(LAYERS, BASES, "float64"), Kronecker(LAYERS, None, "float64")
  plain, one = iterations(np.array, damping), iterations(Metric(kronecker, damping), damping)
  low = iterations(Metric(nothing, damping, sketched(nothing, 14, damping)), damping)
  both = iterations(Metric(kronecker, damping, sketched(kronecker, 14, damping)), damping)
  assert both < one < plain
  assert both < low < plain
