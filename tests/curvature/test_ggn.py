"""K-FAC-expand against the exact block-diagonal GGN (2/D) E[JᵀJ], on linear networks.

Without non-linearities, and where no layer mixes the positions of a layer below it, the gradients g
at a layer's outputs do not depend on its inputs a and different positions do not interact: there
K-FAC-expand equals the GGN (Eschenhagen et al. 2023, deep linear networks in the expand setting).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.curvature.fit import fit_factors
from jaxinf.curvature.layers import leaf_names
from jaxinf.curvature.registration import register
from jaxinf.diffusion.objective import Noised
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.task import Task
from jaxinf.parallel import Rows
from tests import nets

NUM = 6
SHAPES = {
  "conv_in": {"kernel": (3, 3, 2, 3), "bias": (3,)},
  "time": {"kernel": (2, 3), "bias": (3,)},
  "project": {"kernel": (3, 4), "bias": (4,)},
  "conv_out": {"kernel": (1, 1, 4, 2), "bias": (2,)},
}
CONVOLUTIONS = {  # strides and padding of the first convolution
  "same": ((1, 1), "SAME"),
  "valid": ((1, 1), "VALID"),
  "strided, padded at the bottom and right": ((2, 2), ((0, 1), (0, 1))),
  "strided, padded all round": ((2, 2), ((1, 1), (1, 1))),
}


def linear_net(strides, padding):
  def apply_fn(params, x_t, t):
    h = nets.conv(params["conv_in"], x_t, strides, padding)
    h = h + nets.dense(params["time"], nets.time_features(t))[:, None, None]
    batch, height, width, channels = h.shape
    h = nets.dense(params["project"], h.reshape(batch, height * width, channels))
    return nets.conv(params["conv_out"], h.reshape(batch, height, width, -1))

  return apply_fn


def some_pairs(shape=(4, 4, 2)) -> Noised:
  rng = np.random.default_rng(1)
  x_t = jnp.asarray(rng.normal(size=(NUM, *shape)), jnp.float32)
  return Noised(x_t, jnp.asarray(rng.integers(0, 1000, NUM)), x_t)


def exact_blocks(apply_fn, params, pairs) -> dict[str, np.ndarray]:
  """Layer → (2/D) mean over pairs of JᵀJ in the row-major order of [W | b]."""
  jacobian = jax.jit(jax.jacrev(lambda p, x, t: apply_fn(p, x[None], t[None]).reshape(-1)))
  blocks: dict[str, np.ndarray] = {}
  for x_t, t in zip(pairs.x_t, pairs.t, strict=True):
    for name, layer in jacobian(params, x_t, t).items():
      kernel, bias = (np.asarray(layer[part], np.float64) for part in ("kernel", "bias"))
      outputs = len(bias)
      matrix = np.moveaxis(kernel, -1, 1).reshape(outputs, kernel.shape[-1], -1)
      rows = np.concatenate([matrix, bias[:, :, None]], axis=2).reshape(outputs, -1)
      blocks[name] = blocks.get(name, 0) + 2 / outputs * rows.T @ rows / len(pairs.t)
  return blocks


def exact_factors(model, apply_fn, params, pairs) -> dict:
  """Mean factors with every output's cotangent √(2/D) e_c: no Monte-Carlo noise."""
  shape = jax.eval_shape(apply_fn, params, pairs.x_t, pairs.t).shape[1:]
  size = int(np.prod(shape))
  cotangents = jnp.tile(np.sqrt(2 / size) * jnp.eye(size).reshape(size, *shape), (NUM, 1, 1, 1))
  repeated = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), pairs)
  sums = jax.jit(model.factor_sums)(params, repeated, cotangents, jnp.ones(NUM * size))
  return {name: f.replace(a=f.a / (NUM * size), g=f.g / NUM) for name, f in sums.items()}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_expand_equals_the_exact_ggn_on_a_linear_net(kind):
  apply_fn, params = linear_net(*CONVOLUTIONS[kind]), nets.random_params(SHAPES)
  pairs = some_pairs()
  model = register(apply_fn, params, (4, 4, 2), skip=())
  factors = exact_factors(model, apply_fn, params, pairs)
  for name, expected in exact_blocks(apply_fn, params, pairs).items():
    kronecker = np.kron(factors[name].g, factors[name].a)
    # float32 sums of at most a few hundred terms
    np.testing.assert_allclose(kronecker, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_expand_is_an_approximation_where_a_layer_above_mixes_positions():
  """The exactness above is no accident of the test: it ends where theory says so."""
  params = nets.random_params(nets.CONV_SHAPES)
  linear = lambda p, x, t: nets.conv(p["conv_out"], nets.conv(p["conv_in"], x))
  params = {name: params[name] for name in ("conv_in", "conv_out")}
  pairs = some_pairs((4, 4, 1))
  model = register(linear, params, (4, 4, 1), skip=())
  factors = exact_factors(model, linear, params, pairs)
  blocks = exact_blocks(linear, params, pairs)
  error = lambda name: (
    np.linalg.norm(np.kron(factors[name].g, factors[name].a) - blocks[name])
    / np.linalg.norm(blocks[name])
  )
  assert error("conv_out") < 1e-5
  assert error("conv_in") > 0.05


def test_monte_carlo_targets_give_the_exact_factors_in_expectation(devices):
  """Within 5 standard errors, for a linear net whose g do not depend on the example."""
  apply_fn, params = linear_net(*CONVOLUTIONS["same"]), nets.random_params(SHAPES)
  images, draws = nets.random_images(NUM, (4, 4, 2)), 200
  task = Task(apply_fn, params, Schedule.linear(1000, 1e-4, 0.02))
  model = register(apply_fn, params, (4, 4, 2), skip=())
  rows = Rows(images, np.arange(NUM, dtype=np.uint32), draws)
  sampled = fit_factors(task, model, rows, seed=0, batch_size=256, devices=devices)
  expected = exact_factors(model, apply_fn, params, some_pairs())
  for name, factors in sampled.items():
    g = np.asarray(expected[name].g)
    # Each pair contributes Σ_r g_r g_rᵀ with g_r Gaussian; positions of a pair can be at most fully
    # dependent, which bounds the variance of an entry by (G_ii G_jj + G_ij²) / M.
    bound = np.sqrt((np.outer(np.diag(g), np.diag(g)) + g**2) / (NUM * draws))
    assert (np.abs(factors.g - g) < 5 * bound).all(), name


def test_padding_leaves_no_trace_in_the_factors():
  """Weights of zero remove pairs, whatever they hold."""
  apply_fn, params = linear_net(*CONVOLUTIONS["same"]), nets.random_params(SHAPES)
  model, pairs = register(apply_fn, params, (4, 4, 2), skip=()), some_pairs()
  cotangents = nets.random_images(NUM, (4, 4, 2))
  weights = jnp.array([1.0] * (NUM - 2) + [0.0] * 2)
  padded = jax.jit(model.factor_sums)(params, pairs, cotangents, weights)
  cut = jax.tree.map(lambda x: x[: NUM - 2], (pairs, cotangents))
  expected = jax.jit(model.factor_sums)(params, *cut, jnp.ones(NUM - 2))
  for name in expected:
    np.testing.assert_allclose(padded[name].a, expected[name].a, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(padded[name].g, expected[name].g, rtol=1e-6, atol=1e-7)


def test_layers_are_named_after_their_parameters():
  params = nets.random_params(SHAPES)
  model = register(linear_net((1, 1), "SAME"), params, (4, 4, 2), skip=())
  assert {f"{layer.name}/kernel" for layer in model.layers} < set(leaf_names(params))
