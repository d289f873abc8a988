"""What users really have: half precision, global flags of JAX, scalar parameters, any shape."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import (
  EKFAC,
  KFAC,
  Compute,
  Diagonal,
  DiffusionModel,
  Draws,
  ExactGGN,
  Identity,
  Process,
  Shampoo,
  Solver,
  fit_curvature,
)
from jaxinf.layers.specs import to_matrices
from tests import nets, twins

NUM, DRAWS = 4, 3
COMPUTE = Compute(batch_size=8)
KINDS = {
  "kfac": KFAC(),
  "kfac reduce": KFAC("reduce", samples=2),
  "ekfac": EKFAC(fisher="empirical"),
  "shampoo": Shampoo(),
  "diagonal": Diagonal(fisher="exact"),
  "identity": Identity(),
  "exact": ExactGGN(Solver(tolerance=1e-3)),
}


def fitted(model, kind, examples, **options):
  return fit_curvature(model, examples, kind, draws=Draws(DRAWS), compute=COMPUTE, **options)


def blocks(curvature) -> dict[str, np.ndarray]:
  return {name: twins.block(basis) for name, basis in curvature.bases.items()}


# --- scalar parameters ---


def gain_net(params, x, t):
  """A gain and a shift without axes, as of LayerScale with one number, beside dense layers."""
  h = jnp.tanh(nets.dense(params["first"], params["gain"] * x + params["shift"]))
  return nets.dense(params["last"], h)


GAIN_SHAPES = {
  "first": {"kernel": (4, 3), "bias": (3,)},
  "last": {"kernel": (3, 4), "bias": (4,)},
  "gain": (),
  "shift": (),
}


@pytest.fixture(scope="module")
def gain_model():
  return DiffusionModel(gain_net, nets.random_params(GAIN_SHAPES), nets.PROCESS)


@pytest.mark.parametrize(
  "kind",
  [EKFAC(fisher="exact"), Diagonal(fisher="exact"), ExactGGN(Solver(1e-6))],
  ids=lambda kind: kind.name,
)
def test_parameters_without_axes_are_multiplied_and_solved_for(gain_model, kind):
  train, grads = nets.examples(NUM, (4,)), nets.random_params(GAIN_SHAPES, seed=3)
  curvature = fitted(gain_model, kind, train, diagonal=("gain", "shift"))
  product, layers = curvature.multiply(grads, 0.1), curvature.layers
  assert np.shape(product["gain"]) == np.shape(product["shift"]) == ()
  pairs = twins.fit_pairs(gain_model, train, DRAWS)
  if isinstance(kind, ExactGGN):
    vector = twins.vector(layers, grads)
    expected = twins.dense_ggn(gain_model, layers, pairs) @ vector + 0.1 * vector
    twins.assert_close(twins.vector(layers, product), expected)
  else:
    ((moment,),) = twins.ggn_blocks(gain_model, layers, pairs)["gain"]
    twins.assert_close(product["gain"], (moment + 0.1) * grads["gain"])
  # The solver's tolerance, of a system with a condition number of some ten.
  twins.assert_close(curvature.precondition(product, 0.1), grads, 1e-4)


# --- half precision ---


class Half(nn.Module):
  """Computes and returns in another type, as flax's dtype makes it."""

  dtype: object = jnp.bfloat16

  @nn.compact
  def __call__(self, x, t):
    layer = lambda features, name: nn.Conv(features, (3, 3), dtype=self.dtype, name=name)
    time = jnp.cos(t / 100).astype(self.dtype)
    return layer(1, "out")(nn.tanh(layer(3, "in")(x) + time[:, None, None, None]))


HALF_SHAPES = {
  "in": {"kernel": (3, 3, 1, 3), "bias": (3,)},
  "out": {"kernel": (3, 3, 3, 1), "bias": (1,)},
}


def half_model(dtype, params) -> DiffusionModel:
  apply_fn = lambda params, x, t: Half(dtype).apply({"params": params}, x, t)
  return DiffusionModel(apply_fn, params, nets.PROCESS)


@pytest.mark.parametrize(
  ("dtype", "params_dtype", "unit"),
  [
    (jnp.bfloat16, jnp.float32, 2**-8),
    (jnp.float16, jnp.float32, 2**-11),
    (jnp.bfloat16, jnp.bfloat16, 2**-8),
    (None, jnp.float16, 2**-11),
  ],
  ids=["bfloat16", "float16", "bfloat16 parameters", "float16 parameters"],
)
def test_half_precision_is_computed_as_the_model_does_and_summed_up_in_float32(
  dtype, params_dtype, unit
):
  """EK-FAC's both passes with a diagonal layer, and products of the exact GGN, which it solves."""
  params = jax.tree.map(lambda x: x.astype(params_dtype), nets.random_params(HALF_SHAPES))
  single = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  found, expected = (
    fitted(model, ExactGGN(), nets.examples(NUM), diagonal=("in",))
    for model in (half_model(dtype, params), half_model(jnp.float32, single))
  )
  # Some ten roundings on the way.
  twins.assert_close(blocks(found), blocks(expected), 10 * unit)
  grads = nets.random_params(HALF_SHAPES, seed=5)
  twins.assert_close(found.multiply(grads, 1e-3), expected.multiply(grads, 1e-3), 10 * unit)
  solved = found.precondition(grads, 0.1)
  chex.assert_trees_all_equal_shapes(solved, grads)
  assert all(np.asarray(leaf).dtype == np.float64 for leaf in jax.tree.leaves(solved))


# --- global flags ---

FLAGS = {
  "x64": lambda: jax.enable_x64(True),
  "rbg": lambda: jax.default_prng_impl("rbg"),
  "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
}
GRADS = nets.random_params(nets.CONV_SHAPES, seed=3)


def results():
  """Of EK-FAC's both passes, and of the exact GGN that it preconditions."""
  curvature = fitted(nets.conv_model(), ExactGGN(), nets.examples(NUM))
  solved = curvature.multiply(GRADS, 0.1), curvature.precondition(GRADS, 0.1)
  rows = {name: matrix[None] for name, matrix in to_matrices(curvature.layers, GRADS).items()}
  on_device = dict(curvature.approximation.precondition_rows(rows, 0.1))
  return dict(curvature.bases), solved, on_device


@pytest.fixture(scope="module")
def plain():
  return results()


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_jax_change_no_number(flag, plain):
  with FLAGS[flag]():
    found = results()
  chex.assert_trees_all_equal(found, plain)


# --- any shape ---


def one_convolution(num_axes: int):
  """3 × … × 3 over all but the last axis of [B, *space, 2], and its parameters."""
  letters = "N" + "DHW"[3 - num_axes :] + "C"
  specs = letters, letters[1:-1] + "IO", letters

  def apply_fn(params, x, t):
    layer, ones = params["out"], (1,) * num_axes
    y = jax.lax.conv_general_dilated(x, layer["kernel"], ones, "SAME", dimension_numbers=specs)
    return y + layer["bias"]

  return apply_fn, {"out": {"kernel": (3,) * num_axes + (2, 2), "bias": (2,)}}


LINEAR = {
  "series": ((6, 2), *one_convolution(1)),
  "images": ((3, 4, 2), *one_convolution(2)),
  "volumes": ((2, 3, 4, 2), *one_convolution(3)),
  "vectors": (
    (4,),
    lambda params, x, t: nets.dense(params["out"], x),
    {"out": {"kernel": (4, 4), "bias": (4,)}},
  ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_one_layer_on_data_of_any_shape_has_the_exact_ggn(name):
  """Gradients at its outputs are unit vectors, whatever its inputs: K-FAC-expand is the GGN."""
  shape, apply_fn, shapes = LINEAR[name]
  model = DiffusionModel(apply_fn, nets.random_params(shapes), Process.flow())
  train = nets.examples(NUM, shape)
  curvature = fitted(model, KFAC(fisher="exact"), train)
  pairs = twins.fit_pairs(model, train, DRAWS)
  twins.assert_close(blocks(curvature), twins.ggn_blocks(model, curvature.layers, pairs))


def test_of_one_dense_layer_on_vectors_shampoo_is_the_exact_ggn():
  """V = √(2 w) e_c aᵀ for output c, so that E[VᵀV] is 2 E[w a aᵀ] and E[V Vᵀ] a multiple of I."""
  shape, apply_fn, shapes = LINEAR["vectors"]
  model = DiffusionModel(apply_fn, nets.random_params(shapes), Process.flow())
  train = nets.examples(NUM, shape)
  curvature = fitted(model, Shampoo(fisher="exact"), train)
  pairs, basis = twins.fit_pairs(model, train, DRAWS), curvature.bases["out"]
  inputs = np.pad(twins.double(pairs.inputs), ((0, 0), (0, 1)), constant_values=1)
  moments = (np.float64(pairs.weights)[:, None] * inputs).T @ inputs / len(inputs)
  values, _ = np.linalg.eigh(moments)
  # Every output has the same eigenvalues, (2/D) of the inputs' moments; and D = 4.
  twins.assert_close(basis.eigenvalues, np.broadcast_to(values / 2, (4, 5)))
  twins.assert_close(blocks(curvature), twins.ggn_blocks(model, curvature.layers, pairs))


# --- parameters changed in place ---


def test_parameters_changed_in_place_after_the_fit_change_nothing():
  params = jax.tree.map(np.array, nets.random_params(nets.CONV_SHAPES))
  model = DiffusionModel(nets.conv_net, params, nets.PROCESS)
  curvature = fitted(model, KINDS["exact"], nets.examples(NUM))
  before = curvature.multiply(GRADS, 0.1)
  for leaf in jax.tree.leaves(params):
    leaf += 1
  chex.assert_trees_all_equal(curvature.multiply(GRADS, 0.1), before)
  chex.assert_trees_all_equal(model.params, nets.conv_model().params)
