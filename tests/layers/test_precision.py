"""A network in another precision: products rounded to bfloat16, everything else as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers.coverage import Selection
from jaxinf.layers.precision import PRECISIONS, in_precision
from jaxinf.layers.register import register
from tests import nets

X = jnp.asarray(nets.random_images(3))
T = jnp.array([1, 500, 999])


def rounded(x):
  return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)


def by_hand(params, x_t, t):
  """nets.conv_net with every product of rounded operands, rounded."""

  def conv(layer, x):
    y = nets.conv({"kernel": rounded(layer["kernel"]), "bias": 0.0}, rounded(x))
    return rounded(y) + layer["bias"]

  def dense(layer, x):
    return rounded(rounded(x) @ rounded(layer["kernel"])) + layer["bias"]

  h = conv(params["conv_in"], x_t) + dense(params["time"], nets.time_features(t))[:, None, None]
  h = jnp.tanh(h)
  h = jnp.tanh(dense(params["mix"], h))
  return conv(params["conv_out"], h)


@pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_products_are_rounded_and_nothing_else(wrap):
  model = nets.conv_model()
  ours = in_precision(wrap(model.apply_fn), "bfloat16")(model.params, X, T)
  exact = model.apply_fn(model.params, X, T)
  # Sums of rounded products in another order: a unit in the last of bfloat16's 8 bits.
  np.testing.assert_allclose(ours, by_hand(model.params, X, T), atol=2**-8 * np.abs(exact).max())
  assert ours.dtype == jnp.float32
  assert 1e-4 < np.abs(ours - exact).max() / np.abs(exact).max() < 3e-2


def test_derivatives_that_a_network_brings_along_are_kept():
  @jax.custom_vjp
  def straight_through(x):
    return jnp.round(x)

  straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, dy: (dy,))
  network = lambda params, x_t, t: straight_through(x_t @ params)
  gradient = jax.grad(lambda p: jnp.sum(in_precision(network, "bfloat16")(p, jnp.ones((1, 2)), T)))
  np.testing.assert_array_equal(gradient(jnp.ones((2, 1))), np.ones((2, 1)))


def test_a_rounded_network_has_the_same_layers():
  model = nets.conv_model()
  layers = [
    register(model, (4, 4, 1), Selection(), precision=precision).layers for precision in PRECISIONS
  ]
  assert all(found == layers[0] for found in layers)


def test_none_is_the_network_itself_and_unknown_ones_are_refused():
  model = nets.conv_model()
  assert in_precision(model.apply_fn, None) is model.apply_fn
  with pytest.raises(ValueError, match="Unknown precision 'float8'"):
    in_precision(model.apply_fn, "float8")
