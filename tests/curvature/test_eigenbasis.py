"""(G ⊗ A + λI)^±1 in the eigenbasis, and the public Curvature that applies it to parameters."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxinf import KFAC, Curvature, RelativeDamping
from jaxinf.core.types import Eigenbasis, KroneckerFactors
from jaxinf.curvature.curvature import ExactCurvature
from jaxinf.curvature.decompose import DECOMPOSERS, decomposed
from jaxinf.curvature.eigenbasis import multiply, precondition
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from tests import nets, twins

D_OUT, D_IN = 3, 7


def random_factor(size: int, seed: int) -> np.ndarray:
  """A covariance whose eigenvalues span six orders of magnitude."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(size, size)))
  return (q * np.logspace(0, -6, size)) @ q.T


def eigenbasis(factors: KroneckerFactors) -> Eigenbasis:
  bases, _ = decomposed({"layer": factors}, "host")
  return bases["layer"]


@pytest.fixture(scope="module")
def factors():
  return KroneckerFactors(a=random_factor(D_IN, 0), g=random_factor(D_OUT, 1))


@pytest.mark.parametrize("damping", [1e-8, 1e-4, 1.0])
def test_precondition_equals_a_dense_solve(factors, damping):
  basis = eigenbasis(factors)
  grads = np.random.default_rng(2).normal(size=(5, D_OUT, D_IN))
  dense = np.kron(factors.g, factors.a) + damping * np.eye(D_OUT * D_IN)
  expected = np.linalg.solve(dense, grads.reshape(5, -1).T).T.reshape(grads.shape)
  # float64 with condition numbers up to 1e8
  np.testing.assert_allclose(precondition(grads, basis, damping), expected, rtol=1e-6)


def test_multiply_equals_the_explicit_kronecker_product(factors):
  basis = eigenbasis(factors)
  grads = np.random.default_rng(2).normal(size=(5, D_OUT, D_IN))
  dense = np.kron(factors.g, factors.a) + 0.1 * np.eye(D_OUT * D_IN)
  expected = (grads.reshape(5, -1) @ dense).reshape(grads.shape)
  np.testing.assert_allclose(multiply(grads, basis, 0.1), expected, rtol=1e-10)


def test_float32_on_a_device_is_close_to_float64(factors):
  basis = eigenbasis(factors)
  grads = np.random.default_rng(2).normal(size=(5, D_OUT, D_IN))
  on_device = jax.jit(precondition, static_argnums=2)(grads.astype(np.float32), basis, 1e-3)
  expected = precondition(grads, basis, 1e-3)
  # Rounding of 6e-8 times the condition number 1e3.
  np.testing.assert_allclose(on_device, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_groups_are_blocks_of_their_own(factors):
  """Leading axes of factors and gradients are carried through everything."""
  pair = [factors, KroneckerFactors(a=random_factor(D_IN, 5), g=random_factor(D_OUT, 6))]
  stacked = KroneckerFactors(*(np.stack([getattr(f, x) for f in pair]) for x in ("a", "g")))
  grads = np.random.default_rng(2).normal(size=(5, 2, D_OUT, D_IN))
  for apply in (multiply, precondition):
    found = apply(grads, eigenbasis(stacked), 0.1)
    each = [apply(grads[:, i], eigenbasis(f), 0.1) for i, f in enumerate(pair)]
    np.testing.assert_allclose(found, np.stack(each, axis=1), rtol=1e-9)


@pytest.mark.parametrize("where", DECOMPOSERS)
def test_bases_express_the_product_of_the_factors(where, devices):
  """Layers of several sizes, and one of two groups, on one device and two."""
  sizes = {"small": (2, 3), "tall": (6, 2), "wide": (1, 9), "square": (5, 5)}
  layers = {
    name: KroneckerFactors(a=random_factor(d_in, i), g=random_factor(d_out, 9 + i))
    for i, (name, (d_out, d_in)) in enumerate(sizes.items())
  }
  layers["groups"] = KroneckerFactors(
    a=np.stack([random_factor(3, 3), random_factor(3, 4)]), g=np.ones((2, 1, 1))
  )
  bases, _ = decomposed(layers, where, devices)
  assert bases.keys() == layers.keys()
  for name, f in layers.items():
    pairs = zip(f.g.reshape(-1, *f.g.shape[-2:]), f.a.reshape(-1, *f.a.shape[-2:]), strict=True)
    expected = np.stack([np.kron(g, a) for g, a in pairs])
    found = twins.block(bases[name])
    # Entries are at most 1. float32 rounding, some steps of 6e-8 an eigenvalue; float64's
    atol = {"devices": 3e-6, "host": 1e-14}[where]
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=atol)


@pytest.mark.parametrize("where", DECOMPOSERS)
def test_negative_eigenvalues_are_clipped_and_counted(where):
  """Of what rounding makes of a null space, the sign is chance: H + λI must stay invertible."""
  factors = KroneckerFactors(a=np.diag([-2e-3, 4.0, -1e-3]), g=np.diag([1.0, -1e-4]))
  fine = KroneckerFactors(a=np.eye(3), g=np.eye(2))
  bases, clipped = decomposed({"null/space": factors, "fine": fine}, where)
  expected = np.zeros((2, 3))
  expected[1, 2] = 4.0  # ascending along both axes
  np.testing.assert_allclose(bases["null/space"].eigenvalues, expected, rtol=1e-6)
  assert clipped.keys() == {"null/space"}
  assert clipped["null/space"]["num_clipped"] == 3
  # the least ÷ the largest of its factor: −2e-3 / 4
  np.testing.assert_allclose(clipped["null/space"]["most_negative"], -5e-4, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
  ("side", "message"),
  [
    ("a", "input factor A of layer up/conv .* activations"),
    ("g", "G of layer up/conv .* gradients"),
  ],
)
def test_a_factor_that_is_not_finite_stops_with_the_layer_and_factor(bad, side, message):
  factors = KroneckerFactors(a=np.eye(3), g=np.eye(2))
  getattr(factors, side)[0, 1] = bad
  with pytest.raises(ValueError, match=message):
    decomposed({"up/conv": factors}, "host")


@pytest.fixture(scope="module")
def curvature():
  """A curvature of random factors, with the time layer skipped."""
  model, selection = nets.conv_model(), Selection(skip=("time",))
  layers = register(model, (4, 4, 1), selection)
  bases = {}
  for i, layer in enumerate(layers.layers):
    d_out, d_in = layer.matrix_shape
    factors = KroneckerFactors(a=random_factor(d_in, i), g=random_factor(d_out, 10 + i))
    bases[layer.name] = eigenbasis(factors)
  return Curvature(model, KFAC(), layers.layers, bases, layers.coverage, selection, {})


@pytest.mark.parametrize("order", ["precondition∘multiply", "multiply∘precondition"])
def test_precondition_inverts_multiply_at_a_damping_of_1e_minus_8_of_the_layer(curvature, order):
  grads = nets.random_params(nets.CONV_SHAPES, seed=3)
  damping = 1e-8 * max(basis.eigenvalues.max() for basis in curvature.bases.values())
  first, second = order.split("∘")[::-1]
  applied = getattr(curvature, second)(getattr(curvature, first)(grads, damping), damping)
  for name in ("conv_in", "mix", "conv_out"):
    for part, expected in grads[name].items():
      np.testing.assert_allclose(applied[name][part], expected, rtol=1e-3)


def test_relative_damping_is_each_layers_own_multiple_of_its_mean_eigenvalue(curvature):
  """Of G ⊗ A that is tr G · tr A / (d_out · d_in): a dense solve, layer by layer."""
  grads, rho = twins.double(nets.random_params(nets.CONV_SHAPES, seed=3)), 1e-2
  relative = RelativeDamping(rho)
  solved = curvature.precondition(grads, relative)
  found, back, matrices = (
    to_matrices(curvature.layers, tree)
    for tree in (solved, curvature.multiply(solved, relative), grads)
  )
  one_row = {name: matrix[None] for name, matrix in matrices.items()}
  rows = dict(curvature.precondition_rows(one_row, relative))
  for i, layer in enumerate(curvature.layers):
    d_out, d_in = layer.matrix_shape
    a, g = random_factor(d_in, i), random_factor(d_out, 10 + i)
    damping = rho * np.trace(g) * np.trace(a) / (d_out * d_in)
    dense = np.kron(g, a) + damping * np.eye(d_out * d_in)
    expected = np.linalg.solve(dense, matrices[layer.name].ravel()).reshape(d_out, d_in)
    twins.assert_close(found[layer.name], expected, 1e-9)  # float64, condition numbers of some 1e4
    twins.assert_close(rows[layer.name][0], expected, 1e-3)  # float32
    twins.assert_close(back[layer.name], matrices[layer.name], 1e-9)


def test_the_exact_ggn_has_no_eigenvalues_to_be_relative_to(curvature):
  fields = {field.name: getattr(curvature, field.name) for field in dataclasses.fields(Curvature)}
  exact = ExactCurvature(**fields)
  for refused in (exact.check_damping, lambda damping: dict(exact.precondition_rows({}, damping))):
    with pytest.raises(ValueError, match="must be a number here; .* neither the exact GGN nor"):
      refused(RelativeDamping(0.1))


def test_parameters_outside_the_curvature_come_back_as_zeros(curvature):
  applied = curvature.multiply(nets.random_params(nets.CONV_SHAPES, seed=3), 0.1)
  assert not applied["time"]["kernel"].any() and not applied["time"]["bias"].any()
  assert jax.tree.structure(applied) == jax.tree.structure(curvature.model.params)


def test_a_pytree_of_other_shapes_is_refused(curvature):
  with pytest.raises(ValueError, match="structure and shapes of the parameters"):
    curvature.multiply({"conv_in": np.zeros(3)}, 0.1)


def test_gradients_of_another_shape_are_refused(factors):
  """Broadcasting would give numbers without a meaning."""
  with pytest.raises(AssertionError, match="shape"):
    precondition(np.ones((5, D_OUT, 1)), eigenbasis(factors), 0.1)


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
def test_damping_must_be_positive(curvature, damping):
  with pytest.raises(ValueError, match="damping must be positive"):
    curvature.precondition(curvature.model.params, damping)
