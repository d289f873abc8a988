"""Each method's curvature of one non-linear network, against its exact GGN blocks.

The network has a layer of each structure: Kronecker, grouped, and diagonal. Every output is
back-propagated (estimator "exact"), so that what differs is the method's own.
"""

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import pytest

from jaxinf import Task, fit_curvature
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.engine import Rows
from jaxinf.layers.blocks import BLOCKS
from jaxinf.layers.coverage import Selection
from jaxinf.layers.find import tagged
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from tests import nets
from tests.curvature import naive

NUM, DRAWS, SEED, SHAPE = 5, 2, 3, (3, 2, 2)
SHAPES = {
  "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
  "grouped": {"kernel": (3, 3, 2, 4), "bias": (4,)},
  "mix": {"kernel": (4, 2), "bias": (2,)},
  "norm": {"scale": (4,)},
  "time": {"kernel": (2, 4)},
}
DIAGONAL = ("norm/scale",)


def tanh_net(params, x_t, t):
  h = nets.conv(params["conv"], x_t)
  h = h + (nets.time_features(t) @ params["time"]["kernel"])[:, None, None]
  h = jnp.tanh(h) * params["norm"]["scale"]
  h = jax.lax.conv_general_dilated(
    h, params["grouped"]["kernel"], (1, 1), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2,
  )  # fmt: skip
  h = jnp.tanh(h + params["grouped"]["bias"]).reshape(len(h), -1, 4)
  return nets.dense(params["mix"], h).reshape(x_t.shape)


METHODS = {
  "identity": dict(method="identity"),
  "diagonal": dict(method="diagonal"),
  "kfac": dict(method="kfac"),
  "kfac, reduce": dict(method="kfac", sharing="reduce"),
  "ekfac": dict(method="ekfac"),
  "ekfac, reduce": dict(method="ekfac", sharing="reduce"),
}


@pytest.fixture(scope="module")
def task():
  return Task(tanh_net, nets.random_params(SHAPES), nets.SCHEDULE)


@pytest.fixture(scope="module")
def curvatures(task):
  fit = lambda options: fit_curvature(
    task, nets.random_images(NUM, SHAPE), draws=DRAWS, seed=SEED, estimator="exact",
    skip=(),
    diagonal=DIAGONAL, batch_size=6, devices=jax.local_devices()[:1], **options,
  )  # fmt: skip
  return {name: fit(options) for name, options in METHODS.items()}


@pytest.fixture(scope="module")
def pairs(task):
  """What the fits went over."""
  rows = Rows(nets.random_images(NUM, SHAPE), np.arange(NUM, dtype=np.uint32), DRAWS)
  return curvature_pairs(task.schedule, SEED, rows.padded_batch(0, len(rows)))[0]


@pytest.fixture(scope="module")
def exact(task, curvatures, pairs):
  """Layer name → exact GGN block [(groups,) P, P]."""
  layers = curvatures["kfac"].layers
  matrices = naive.output_gradients(task.apply_fn, task.params, layers, pairs)
  return {name: naive.second_moments(m) for name, m in matrices.items()}


def assert_close(actual, expected):
  scale = np.abs(expected).max()
  # float32 sums of a hundred terms
  np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_multiply_is_the_explicit_product_and_precondition_its_inverse(curvatures, task, method):
  curvature, grads = curvatures[method], nets.random_params(SHAPES, seed=7)
  grads = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
  product = curvature.multiply(grads, 0.1)
  matrices, products = (to_matrices(curvature.layers, tree) for tree in (grads, product))
  for name, basis in curvature.bases.items():
    block, vectors = naive.dense(basis), matrices[name].reshape(*matrices[name].shape[:-2], -1)
    expected = np.einsum("...ij,...j->...i", block, vectors) + 0.1 * vectors
    np.testing.assert_allclose(products[name].reshape(expected.shape), expected, rtol=1e-9)
  back = curvature.precondition(product, 0.1)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), back, grads)


@pytest.mark.parametrize("method", METHODS)
def test_a_grouped_convolution_has_a_block_for_each_group(curvatures, method):
  (layer,) = (layer for layer in curvatures[method].layers if layer.name == "grouped")
  assert layer.matrix_shape == (2, 2, 3 * 3 * 2 + 1)
  assert curvatures[method].bases["grouped"].eigenvalues.shape == layer.matrix_shape


def test_identity_scores_are_inner_products_of_gradients(curvatures):
  for basis in curvatures["identity"].bases.values():
    assert basis.q_in is None and (basis.eigenvalues == 1).all()


def test_diagonal_is_the_diagonal_of_the_exact_blocks(curvatures, exact):
  for name, block in exact.items():
    expected = np.diagonal(block, axis1=-2, axis2=-1)
    found = curvatures["diagonal"].bases[name]
    assert found.q_in is None
    assert_close(found.eigenvalues.reshape(expected.shape), expected)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "identity"])
def test_declared_layers_are_diagonal_in_every_method(curvatures, exact, method):
  basis = curvatures[method].bases["norm/scale"]
  assert basis.q_in is None
  assert_close(basis.eigenvalues[:, 0], np.diag(exact["norm/scale"]))


@pytest.mark.parametrize("sharing", ["", ", reduce"])
def test_ekfac_has_the_diagonal_of_the_exact_blocks_in_the_basis_of_kfac(
  curvatures, exact, sharing
):
  """So it is the nearest in Frobenius norm of all that are diagonal there, K-FAC included."""
  kfac, ekfac = (curvatures[name + sharing].bases for name in ("kfac", "ekfac"))
  for name in ("conv", "grouped", "mix", "time"):
    np.testing.assert_array_equal(ekfac[name].q_in, kfac[name].q_in)
    np.testing.assert_array_equal(ekfac[name].q_out, kfac[name].q_out)
    assert_close(ekfac[name].eigenvalues, diagonal_in_basis(exact[name], ekfac[name]))
    far, near = (np.linalg.norm(naive.dense(b[name]) - exact[name]) for b in (kfac, ekfac))
    assert near < 0.999 * far, name


def diagonal_in_basis(block, basis):
  """diag(Qᵀ H Q) as [(groups,) d_out, d_in]."""
  shape = basis.eigenvalues.shape
  block = block.reshape(*shape, *shape[-2:])
  q_out, q_in = basis.q_out, basis.q_in
  return np.einsum(
    "...oipj,...ou,...iv,...pu,...jv->...uv", block, q_out, q_in, q_out, q_in, optimize=True
  )


def test_empirical_is_the_second_moment_of_true_loss_gradients(task, pairs):
  curvature = fit_curvature(
    task, nets.random_images(NUM, SHAPE), draws=DRAWS, seed=SEED, estimator="empirical",
    method="ekfac", skip=(), diagonal=DIAGONAL, devices=jax.local_devices()[:1],
  )  # fmt: skip
  out = naive.in_float64(task.apply_fn, task.params, pairs.x_t, pairs.t)
  dy = 2 * (out - np.asarray(pairs.noise)) / out[0].size
  matrices = naive.gradients(task.apply_fn, task.params, curvature.layers, pairs, dy[None])
  for name, basis in curvature.bases.items():
    block = naive.second_moments(matrices[name])
    if basis.q_in is None:
      assert_close(basis.eigenvalues.ravel(), np.diag(block))
    else:
      assert_close(basis.eigenvalues, diagonal_in_basis(block, basis))


def test_kfac_jax_updates_our_blocks_to_the_same_statistics(task, pairs):
  """Inside kfac-jax's own estimator, whose squared error is a sum: D times our mean over pixels.

  Without the grouped layer, for whose factors kfac-jax has no place.
  """

  def ungrouped_net(params, x_t, t):
    constant = {"grouped": task.params["grouped"]}
    return tanh_net(params | constant, x_t, t)

  network, all_params = tagged(ungrouped_net, {}), task.params
  params = {name: all_params[name] for name in all_params if name != "grouped"}

  def loss(params, x_t, t):
    kfac_jax.register_squared_error_loss(network(params, x_t, t))
    return jnp.zeros(())

  estimator = kfac_jax.BlockDiagonalCurvature(
    loss, params_index=0, layer_tag_to_block_ctor=BLOCKS,
    auto_register_kwargs=dict(graph_patterns=()),
  )  # fmt: skip
  args = (params, pairs.x_t, pairs.t)
  estimator.finalize(args)
  state = estimator.init(jax.random.key(0), args, None, None)
  update = lambda state, *args: estimator.update_curvature_matrix_estimate(
    state, ema_old=0.0, ema_new=1.0, identity_weight=0.0, batch_size=len(pairs.t),
    rng=jax.random.key(0), func_args=args, estimation_mode="ggn_exact",
  )  # fmt: skip
  state = jax.jit(update)(state, *args)

  model = register(ungrouped_net, params, SHAPE, Selection(diagonal=DIAGONAL))
  size = int(np.prod(SHAPE))
  dy = jnp.asarray(naive.unit_cotangents(len(pairs.t), SHAPE), jnp.float32)
  kernel = lambda params, pairs, weights: model.factor_sums(params, pairs, lambda out: dy, weights)
  sums = jax.jit(kernel)(params, pairs, jnp.ones(len(pairs.t)))
  factors = model.factors(sums, total=len(pairs.t))
  states = dict(zip(estimator.jaxpr.layer_indices, state.blocks_states, strict=True))
  for layer in model.layers:
    found = states[tuple(i for i in (layer.kernel, layer.bias) if i is not None)]
    if layer.structure == "diagonal":
      expected = size * np.asarray(sums[layer.name]).ravel() / len(pairs.t)
      assert_close(np.ravel(found.diagonal_factors[0].value), expected)
    else:
      assert_close(np.asarray(found.factors[0].value), factors[layer.name].a)
      assert_close(np.asarray(found.factors[1].value), size * factors[layer.name].g)
