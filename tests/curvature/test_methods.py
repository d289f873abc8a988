"""Each kind of curvature of one non-linear network, against its exact GGN blocks.

The network has a layer of each structure: Kronecker, grouped, and diagonal. Every output is
back-propagated (fisher="exact"), so that what differs is the kind's own.
"""

import chex
import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import pytest

from jaxinf import (
  EKFAC,
  KFAC,
  Compute,
  Diagonal,
  DiffusionModel,
  Draws,
  Identity,
  Shampoo,
  fit_curvature,
)
from jaxinf.layers.blocks import BLOCKS
from jaxinf.layers.coverage import Selection
from jaxinf.layers.find import tagged
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from tests import nets, twins
from tests.twins import assert_close

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


KINDS = {
  "identity": Identity(),
  "diagonal": Diagonal(fisher="exact"),
  "kfac": KFAC(fisher="exact"),
  "kfac, reduce": KFAC("reduce", "exact"),
  "ekfac": EKFAC(fisher="exact"),
  "ekfac, reduce": EKFAC("reduce", "exact"),
  "shampoo": Shampoo("exact"),
}


def fitted(model, kind):
  compute = Compute(batch_size=6, devices=jax.local_devices()[:1])
  return fit_curvature(
    model, nets.examples(NUM, SHAPE), kind, draws=Draws(DRAWS, seed=SEED), skip=(),
    diagonal=DIAGONAL, compute=compute,
  )  # fmt: skip


@pytest.fixture(scope="module")
def model():
  return DiffusionModel(tanh_net, nets.random_params(SHAPES), nets.PROCESS)


@pytest.fixture(scope="module")
def curvatures(model):
  return {name: fitted(model, kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def pairs(model):
  """What the fits went over."""
  return twins.fit_pairs(model, nets.examples(NUM, SHAPE), DRAWS, SEED)


@pytest.fixture(scope="module")
def exact(model, curvatures, pairs):
  """Layer name → exact GGN block [(groups,) P, P]."""
  return twins.ggn_blocks(model, curvatures["kfac"].layers, pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_is_the_explicit_product_and_precondition_its_inverse(curvatures, kind):
  curvature, grads = curvatures[kind], nets.random_params(SHAPES, seed=7)
  grads = twins.double(grads)
  product = curvature.multiply(grads, 0.1)
  matrices, products = (to_matrices(curvature.layers, tree) for tree in (grads, product))
  for name, basis in curvature.bases.items():
    block, vectors = twins.block(basis), matrices[name].reshape(*matrices[name].shape[:-2], -1)
    expected = np.einsum("...ij,...j->...i", block, vectors) + 0.1 * vectors
    np.testing.assert_allclose(products[name].reshape(expected.shape), expected, rtol=1e-9)
  back = curvature.precondition(product, 0.1)
  chex.assert_trees_all_close(back, grads, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_convolution_has_a_block_for_each_group(curvatures, kind):
  (layer,) = (layer for layer in curvatures[kind].layers if layer.name == "grouped")
  assert layer.matrix_shape == (2, 2, 3 * 3 * 2 + 1)
  assert curvatures[kind].bases["grouped"].eigenvalues.shape == layer.matrix_shape


def test_identity_scores_are_inner_products_of_gradients(curvatures):
  for basis in curvatures["identity"].bases.values():
    assert basis.q_in is None and (basis.eigenvalues == 1).all()


def test_diagonal_is_the_diagonal_of_the_exact_blocks(curvatures, exact):
  for name, block in exact.items():
    found = curvatures["diagonal"].bases[name]
    assert found.q_in is None
    assert_close(found.eigenvalues, twins.diagonal_in(found, block))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "identity"])
def test_declared_layers_are_diagonal_in_every_kind(curvatures, exact, kind):
  basis = curvatures[kind].bases["norm/scale"]
  assert basis.q_in is None
  assert_close(basis.eigenvalues[:, 0], np.diag(exact["norm/scale"]))


@pytest.mark.parametrize("approx", ["", ", reduce"])
def test_ekfac_has_the_diagonal_of_the_exact_blocks_in_the_basis_of_kfac(curvatures, exact, approx):
  """So it is the nearest in Frobenius norm of all that are diagonal there, K-FAC included."""
  kfac, ekfac = (curvatures[name + approx].bases for name in ("kfac", "ekfac"))
  for name in ("conv", "grouped", "mix", "time"):
    np.testing.assert_array_equal(ekfac[name].q_in, kfac[name].q_in)
    np.testing.assert_array_equal(ekfac[name].q_out, kfac[name].q_out)
    assert_close(ekfac[name].eigenvalues, twins.diagonal_in(ekfac[name], exact[name]))
    far, near = (np.linalg.norm(twins.block(b[name]) - exact[name]) for b in (kfac, ekfac))
    assert near < 0.999 * far, name


def test_shampoo_has_the_eigenvectors_of_whole_gradients_and_the_true_eigenvalues(
  curvatures, exact
):
  """E[V Vᵀ] and E[VᵀV] are partial traces of the exact block E[vec V vec Vᵀ]."""
  for name in ("conv", "grouped", "mix", "time"):
    basis = curvatures["shampoo"].bases[name]
    shape = basis.eigenvalues.shape
    block = exact[name].reshape(*shape, *shape[-2:])
    moments = np.einsum("...oipi->...op", block), np.einsum("...oioj->...ij", block)
    for q, moment in zip((basis.q_out, basis.q_in), moments, strict=True):
      rotated = np.swapaxes(q, -1, -2) @ moment @ q
      values = np.linalg.eigvalsh(moment)  # ascending, as the columns are
      assert_close(rotated, values[..., None] * np.eye(values.shape[-1]))
    assert_close(basis.eigenvalues, twins.diagonal_in(basis, exact[name]))


def test_empirical_is_the_second_moment_of_true_loss_gradients(model, pairs):
  curvature = fitted(model, EKFAC(fisher="empirical"))
  grads = twins.twin_gradients(model, curvature.layers, pairs)
  for name, basis in curvature.bases.items():
    block = twins.second_moments(grads[name][None])
    assert_close(basis.eigenvalues, twins.diagonal_in(basis, block))


def test_kfac_jax_updates_our_blocks_to_the_same_statistics(model, pairs):
  """Inside kfac-jax's own estimator, whose squared error is a sum: D times our mean over pixels.

  Without the grouped layer, for whose factors kfac-jax has no place.
  """

  def ungrouped_net(params, x_t, t):
    constant = {"grouped": model.params["grouped"]}
    return tanh_net(params | constant, x_t, t)

  network, all_params = tagged(ungrouped_net, {}), model.params
  params = {name: all_params[name] for name in all_params if name != "grouped"}

  def loss(params, x_t, t):
    kfac_jax.register_squared_error_loss(network(params, x_t, t))
    return jnp.zeros(())

  estimator = kfac_jax.BlockDiagonalCurvature(
    loss, params_index=0, layer_tag_to_block_ctor=BLOCKS,
    auto_register_kwargs=dict(graph_patterns=()),
  )  # fmt: skip
  args = (params, pairs.inputs, pairs.time)
  estimator.finalize(args)
  state = estimator.init(jax.random.key(0), args, None, None)
  update = lambda state, *args: estimator.update_curvature_matrix_estimate(
    state, ema_old=0.0, ema_new=1.0, identity_weight=0.0, batch_size=len(pairs.time),
    rng=jax.random.key(0), func_args=args, estimation_mode="ggn_exact",
  )  # fmt: skip
  state = jax.jit(update)(state, *args)

  ungrouped = DiffusionModel(ungrouped_net, params, nets.PROCESS)
  layers = register(ungrouped, SHAPE, Selection(diagonal=DIAGONAL))
  size = int(np.prod(SHAPE))
  units = np.sqrt(2) * np.eye(size).reshape(size, 1, *SHAPE)
  dy = jnp.broadcast_to(jnp.asarray(units, jnp.float32), (size, *pairs.inputs.shape))
  kernel = lambda params, pairs, weights: layers.factor_sums(params, pairs, lambda out: dy, weights)
  sums = jax.jit(kernel)(params, pairs, jnp.ones(len(pairs.time)))
  factors = layers.factors(sums, total=len(pairs.time))
  states = dict(zip(estimator.jaxpr.layer_indices, state.blocks_states, strict=True))
  for layer in layers.layers:
    found = states[tuple(i for i in (layer.kernel, layer.bias) if i is not None)]
    if layer.structure == "diagonal":
      expected = size * np.asarray(sums[layer.name]).ravel() / len(pairs.time)
      assert_close(np.ravel(found.diagonal_factors[0].value), expected)
    else:
      assert_close(np.asarray(found.factors[0].value), factors[layer.name].a)
      assert_close(np.asarray(found.factors[1].value), size * factors[layer.name].g)
