"""K-FAC against the exact block-diagonal GGN (2/D) E[JᵀJ], where theory says that they are equal.

In a linear network the gradients g at a layer's outputs do not depend on its inputs a. Then

  expand is exact where no layer above mixes positions: an output has a gradient at one position;
  reduce is exact where all positions are added up above: they all have the same gradient;

(Eschenhagen et al. 2023). For one pair both are exact in every layer without positions.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import KFAC, Compute, DiffusionModel, Draws
from jaxinf.curvature.fit import Fit
from jaxinf.layers.coverage import Selection
from jaxinf.layers.factors import APPROXIMATIONS
from jaxinf.layers.register import register
from jaxinf.layers.specs import leaf_names
from tests import nets, twins

NUM = 6
IMAGE = (4, 4, 2)
SHAPES = {
  "conv_in": {"kernel": (3, 3, 2, 3), "bias": (3,)},
  "time": {"kernel": (2, 3), "bias": (3,)},
  "project": {"kernel": (3, 4), "bias": (4,)},
}
CONVOLUTIONS = {  # strides and padding of the first convolution
  "same": ((1, 1), "SAME"),
  "strided, padded at the bottom and right": ((2, 2), ((0, 1), (0, 1))),
}


def tokens_net(strides, padding):
  """Linear: a convolution and a time embedding, then a dense layer over positions [B, R, 4]."""

  def apply_fn(params, x_t, t):
    h = nets.conv(params["conv_in"], x_t, strides, padding)
    h = h + nets.dense(params["time"], nets.time_features(t))[:, None, None]
    return nets.dense(params["project"], h.reshape(len(h), -1, h.shape[-1]))

  return apply_fn


def position_wise(strides, padding):
  """Every output comes from one position."""
  tokens = tokens_net(strides, padding)

  def apply_fn(params, x_t, t):
    h = tokens(params, x_t, t)
    side = int(np.sqrt(h.shape[1]))
    return nets.conv(params["head"], h.reshape(len(h), side, side, -1))

  return apply_fn, SHAPES | {"head": {"kernel": (1, 1, 4, 2), "bias": (2,)}}


def pooled(pool, strides, padding):
  """Every output comes from the sum or mean of all positions."""
  tokens = tokens_net(strides, padding)

  def apply_fn(params, x_t, t):
    return nets.dense(params["head"], pool(tokens(params, x_t, t), axis=1))

  return apply_fn, SHAPES | {"head": {"kernel": (4, 5), "bias": (5,)}}


EXACT = {f"expand, {name}": ("expand", position_wise(*c)) for name, c in CONVOLUTIONS.items()}
EXACT |= {
  "reduce, mean": ("reduce", pooled(jnp.mean, *CONVOLUTIONS["same"])),
  "reduce, sum": (
    "reduce",
    pooled(jnp.sum, *CONVOLUTIONS["strided, padded at the bottom and right"]),
  ),
}


def exact_factors(layers, apply_fn, params, pairs, approx="expand") -> dict:
  """Mean factors from the cotangents of every output: no Monte-Carlo noise."""
  shape = jax.eval_shape(apply_fn, params, pairs.inputs, pairs.time).shape
  units = np.sqrt(2) * np.eye(math.prod(shape[1:])).reshape(-1, 1, *shape[1:])
  cotangents = jnp.broadcast_to(jnp.asarray(units, jnp.float32), (len(units), *shape))
  pairs = pairs._replace(target=jnp.zeros(shape))  # of the output's shape, which here may differ
  kernel = lambda params, pairs, weights: layers.factor_sums(
    params, pairs, lambda out: cotangents, weights, approx=approx
  )
  return layers.factors(jax.jit(kernel)(params, pairs, jnp.ones(shape[0])), total=shape[0])


def errors(apply_fn, params, pairs) -> dict[str, dict[str, float]]:
  """Approximation → layer name → ‖G ⊗ A − block‖ / ‖block‖, Frobenius norms."""
  model = DiffusionModel(apply_fn, params, nets.PROCESS)
  layers = register(model, pairs.inputs.shape[1:], Selection())
  blocks = twins.ggn_blocks(model, layers.layers, pairs)
  error = lambda f, block: np.linalg.norm(np.kron(f.g, f.a) - block) / np.linalg.norm(block)
  return {
    approx: {
      name: error(factors, blocks[name])
      for name, factors in exact_factors(layers, apply_fn, params, pairs, approx).items()
    }
    for approx in APPROXIMATIONS
  }


@functools.cache
def errors_of(case: str) -> dict[str, dict[str, float]]:
  """The errors of a network in EXACT."""
  _, (apply_fn, shapes) = EXACT[case]
  return errors(apply_fn, nets.random_params(shapes), nets.some_pairs(NUM, IMAGE))


@pytest.mark.parametrize("case", EXACT)
def test_kfac_equals_the_exact_ggn_on_a_linear_net(case):
  approx, (_, shapes) = EXACT[case]
  found = errors_of(case)[approx]
  assert found.keys() == shapes.keys()
  assert max(found.values()) < twins.ROUNDING, found


@pytest.mark.parametrize("case", ["expand, same", "reduce, mean"])
def test_the_other_approximation_is_exact_only_without_positions(case):
  """The exactness above is no accident of the test: it ends where theory says so."""
  approx, _ = EXACT[case]
  (other,) = set(APPROXIMATIONS) - {approx}
  found = errors_of(case)[other]
  without = {"time", "head"} if approx == "reduce" else {"time"}
  assert {name for name, error in found.items() if error < twins.ROUNDING} == without, found
  assert max(found.values()) > 0.05


def test_expand_is_an_approximation_where_a_layer_above_mixes_positions():
  params = nets.random_params(nets.CONV_SHAPES)
  linear = lambda p, x, t: nets.conv(p["conv_out"], nets.conv(p["conv_in"], x))
  params = {name: params[name] for name in ("conv_in", "conv_out")}
  found = errors(linear, params, nets.some_pairs(NUM, (4, 4, 1)))["expand"]
  assert found["conv_out"] < twins.ROUNDING
  assert found["conv_in"] > 0.05


def test_one_pair_is_exact_without_positions():
  """Of one pair the GGN is Σ_c g_c g_cᵀ ⊗ a aᵀ, whatever stands between the layers."""

  def tanh_net(params, x_t, t):
    h = nets.dense(params["first"], x_t.reshape(len(x_t), -1))
    h = jnp.tanh(h + nets.dense(params["time"], nets.time_features(t)))
    return nets.dense(params["last"], h)

  shapes = {
    "first": {"kernel": (8, 3), "bias": (3,)},
    "time": {"kernel": (2, 3), "bias": (3,)},
    "last": {"kernel": (3, 4), "bias": (4,)},
  }
  params = nets.random_params(shapes)
  one, several = (errors(tanh_net, params, nets.some_pairs(num, (2, 2, 2))) for num in (1, 4))
  for approx in APPROXIMATIONS:
    assert max(one[approx].values()) < twins.ROUNDING
    assert max(several[approx].values()) > 0.01


@pytest.mark.parametrize(("samples", "draws"), [(1, 200), (4, 50)])
def test_monte_carlo_targets_give_the_exact_factors_in_expectation(samples, draws):
  """Within 5 standard errors, for a linear net whose g do not depend on the example."""
  _, (apply_fn, shapes) = EXACT["expand, same"]
  model = DiffusionModel(apply_fn, nets.random_params(shapes), nets.PROCESS)
  layers = register(model, IMAGE, Selection())
  kind, compute = KFAC(samples=samples), Compute(batch_size=256)
  fit = Fit(
    model, nets.examples(NUM, IMAGE), layers, kind, Draws(draws), Selection(), "host", compute
  )
  sampled = layers.factors(fit.first_pass(layers), total=NUM * draws)
  expected = exact_factors(layers, apply_fn, model.params, nets.some_pairs(NUM, IMAGE))
  for name, factors in sampled.items():
    g = expected[name].g
    # Each target contributes Σ_r g_r g_rᵀ with g_r Gaussian; positions can be at most fully
    # dependent, which bounds the variance of an entry by (G_ii G_jj + G_ij²) / M for M targets.
    bound = np.sqrt((np.outer(np.diag(g), np.diag(g)) + g**2) / (NUM * draws * samples))
    assert (np.abs(factors.g - g) < 5 * bound).all(), name


def test_padding_leaves_no_trace_in_the_factors():
  """Weights of zero remove pairs, whatever they hold."""
  _, (apply_fn, shapes) = EXACT["expand, same"]
  model, pairs = (
    DiffusionModel(apply_fn, nets.random_params(shapes), nets.PROCESS),
    nets.some_pairs(NUM, IMAGE),
  )
  layers = register(model, IMAGE, Selection())
  dy = nets.random_images(NUM, IMAGE)
  kernel = jax.jit(lambda p, q, dy, w: layers.factor_sums(p, q, lambda out: dy[None], w))
  padded = kernel(model.params, pairs, dy, jnp.array([1.0] * (NUM - 2) + [0.0] * 2))
  cut = jax.tree.map(lambda x: x[: NUM - 2], (pairs, dy))
  # The order of sums.
  expected = kernel(model.params, *cut, jnp.ones(NUM - 2))
  chex.assert_trees_all_close(padded, expected, rtol=1e-6, atol=1e-6)


def test_layers_are_named_after_their_parameters():
  _, (apply_fn, shapes) = EXACT["expand, same"]
  model = DiffusionModel(apply_fn, nets.random_params(shapes), nets.PROCESS)
  layers = register(model, IMAGE, Selection())
  assert {f"{layer.name}/kernel" for layer in layers.layers} < set(leaf_names(model.params))
