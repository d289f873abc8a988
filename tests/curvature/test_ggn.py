"""K-FAC against the exact block-diagonal GGN (2/D) E[JᵀJ], where theory says that they are equal.

In a linear network the gradients g at a layer's outputs do not depend on its inputs a. Then

  expand is exact where no layer above mixes positions: an output has a gradient at one position;
  reduce is exact where all positions are added up above: they all have the same gradient;

(Eschenhagen et al. 2023). For one pair both are exact in every layer without positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.curvature.fit import Fit
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.objective import Noised
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine import Rows
from jaxinf.layers.coverage import Selection
from jaxinf.layers.factors import SHARINGS
from jaxinf.layers.register import register
from jaxinf.layers.specs import leaf_names
from tests import nets
from tests.curvature import naive

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


def some_pairs(shape=IMAGE, num=NUM) -> Noised:
  rng = np.random.default_rng(1)
  x_t = jnp.asarray(rng.normal(size=(num, *shape)), jnp.float32)
  return Noised(x_t, jnp.asarray(rng.integers(0, 1000, num)), x_t)


def exact_factors(model, apply_fn, params, pairs, sharing="expand") -> dict:
  """Mean factors from the cotangents of every output: no Monte-Carlo noise."""
  shape = jax.eval_shape(apply_fn, params, pairs.x_t, pairs.t).shape
  cotangents = jnp.asarray(naive.unit_cotangents(shape[0], shape[1:]), jnp.float32)
  kernel = lambda params, pairs, weights: model.factor_sums(
    params, pairs, lambda out: cotangents, weights, sharing=sharing
  )
  return model.factors(jax.jit(kernel)(params, pairs, jnp.ones(shape[0])), total=shape[0])


def errors(apply_fn, params, pairs) -> dict[str, dict[str, float]]:
  """Sharing → layer name → ‖G ⊗ A − block‖ / ‖block‖, Frobenius norms."""
  model = register(apply_fn, params, pairs.x_t.shape[1:], Selection())
  matrices = naive.output_gradients(apply_fn, params, model.layers, pairs)
  blocks = {name: naive.second_moments(matrix) for name, matrix in matrices.items()}
  error = lambda f, block: np.linalg.norm(np.kron(f.g, f.a) - block) / np.linalg.norm(block)
  return {
    sharing: {
      name: error(factors, blocks[name])
      for name, factors in exact_factors(model, apply_fn, params, pairs, sharing).items()
    }
    for sharing in SHARINGS
  }


@functools.cache
def errors_of(case: str) -> dict[str, dict[str, float]]:
  """The errors of a network in EXACT."""
  _, (apply_fn, shapes) = EXACT[case]
  return errors(apply_fn, nets.random_params(shapes), some_pairs())


ROUNDING = 1e-5  # float32 sums of at most a few hundred terms


@pytest.mark.parametrize("case", EXACT)
def test_kfac_equals_the_exact_ggn_on_a_linear_net(case):
  sharing, (_, shapes) = EXACT[case]
  found = errors_of(case)[sharing]
  assert found.keys() == shapes.keys()
  assert max(found.values()) < ROUNDING, found


@pytest.mark.parametrize("case", ["expand, same", "reduce, mean"])
def test_the_other_sharing_is_exact_only_without_positions(case):
  """The exactness above is no accident of the test: it ends where theory says so."""
  sharing, _ = EXACT[case]
  (other,) = set(SHARINGS) - {sharing}
  found = errors_of(case)[other]
  without = {"time", "head"} if sharing == "reduce" else {"time"}
  assert {name for name, error in found.items() if error < ROUNDING} == without, found
  assert max(found.values()) > 0.05


def test_expand_is_an_approximation_where_a_layer_above_mixes_positions():
  params = nets.random_params(nets.CONV_SHAPES)
  linear = lambda p, x, t: nets.conv(p["conv_out"], nets.conv(p["conv_in"], x))
  params = {name: params[name] for name in ("conv_in", "conv_out")}
  found = errors(linear, params, some_pairs((4, 4, 1)))["expand"]
  assert found["conv_out"] < ROUNDING
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
  one, several = (errors(tanh_net, params, some_pairs((2, 2, 2), num)) for num in (1, 4))
  for sharing in SHARINGS:
    assert max(one[sharing].values()) < ROUNDING
    assert max(several[sharing].values()) > 0.01


@pytest.mark.parametrize(("targets", "draws"), [(1, 200), (4, 50)])
def test_monte_carlo_targets_give_the_exact_factors_in_expectation(targets, draws):
  """Within 5 standard errors, for a linear net whose g do not depend on the example."""
  _, (apply_fn, shapes) = EXACT["expand, same"]
  params = nets.random_params(shapes)
  task = Task(apply_fn, params, Schedule.linear(1000, 1e-4, 0.02))
  model = register(apply_fn, params, IMAGE, Selection())
  rows = Rows(nets.random_images(NUM, IMAGE), np.arange(NUM, dtype=np.uint32), draws)
  settings = dict(
    method="kfac", sharing="expand", estimator="mc", targets=targets, seed=0, random_flip=False
  )
  fit = Fit(task, model, rows, settings, batch_size=256)
  sampled = model.factors(fit.first_pass(model), total=len(rows))
  expected = exact_factors(model, apply_fn, params, some_pairs())
  for name, factors in sampled.items():
    g = expected[name].g
    # Each target contributes Σ_r g_r g_rᵀ with g_r Gaussian; positions can be at most fully
    # dependent, which bounds the variance of an entry by (G_ii G_jj + G_ij²) / M for M targets.
    bound = np.sqrt((np.outer(np.diag(g), np.diag(g)) + g**2) / (len(rows) * targets))
    assert (np.abs(factors.g - g) < 5 * bound).all(), name


def test_padding_leaves_no_trace_in_the_factors():
  """Weights of zero remove pairs, whatever they hold."""
  _, (apply_fn, shapes) = EXACT["expand, same"]
  params, pairs = nets.random_params(shapes), some_pairs()
  model = register(apply_fn, params, IMAGE, Selection())
  dy = nets.random_images(NUM, IMAGE)
  kernel = jax.jit(lambda p, q, dy, w: model.factor_sums(p, q, lambda out: dy[None], w))
  padded = kernel(params, pairs, dy, jnp.array([1.0] * (NUM - 2) + [0.0] * 2))
  cut = jax.tree.map(lambda x: x[: NUM - 2], (pairs, dy))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),  # the order of sums
    padded,
    kernel(params, *cut, jnp.ones(NUM - 2)),
  )


def test_layers_are_named_after_their_parameters():
  _, (apply_fn, shapes) = EXACT["expand, same"]
  params = nets.random_params(shapes)
  model = register(apply_fn, params, IMAGE, Selection())
  assert {f"{layer.name}/kernel" for layer in model.layers} < set(leaf_names(params))
