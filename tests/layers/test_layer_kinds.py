"""Each kind of layer: its gradients, factors and corrected eigenvalues against plain sums.

A kind is one row: a Flax module, the shape of its input and the kinds of its layers. The twins are
in naive.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.types import Eigenbasis, Matrices
from jaxinf.diffusion.objective import Noised
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, register
from tests.curvature import naive

NUM, TARGETS = 3, 2
DIAGONAL = ("scale$", "layer/bias$", "positions$")
WEIGHTS = np.array([1.0, 0.0, 2.5])
# float32 sums of at most some hundred terms
close = dict(rtol=0, atol=3e-6)


class RowMajor(nn.Module):
  """x Wᵀ + b with W [d_out, d_in], as Equinox and PyTorch keep it."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (3, x.shape[-1]))
    return x @ kernel.T + self.param("bias", nn.initializers.normal(), (3,))


class Mapped(nn.Module):
  """W x + b under vmap, as an Equinox layer is called; b may be missing."""

  use_bias: bool = True
  over: int = 1

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (3, x.shape[-1]))
    layer = lambda v: kernel @ jnp.tanh(v)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.normal(), (3,))
      layer = lambda v: kernel @ jnp.tanh(v) + bias
    for _ in range(self.over):
      layer = jax.vmap(layer)
    return layer(x)


class ChannelsFirst(nn.Module):
  """A convolution of one image [C, H, W] under vmap with a bias [C, 1, 1], as Equinox has it."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (3, x.shape[-1], 3, 3))
    bias = self.param("bias", nn.initializers.normal(), (3, 1, 1))
    one = lambda v: jax.lax.conv_general_dilated(v[None], kernel, (1, 1), "SAME")[0] + bias
    return jnp.moveaxis(jax.vmap(one)(jnp.moveaxis(x, -1, 1)), 1, -1)


class SideBySide(nn.Module):
  """W x + b for each W [d_in, d_out] of two, under vmap: one layer with twice the outputs."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (2, x.shape[-1], 3))
    bias = self.param("bias", nn.initializers.normal(), (2, 3))
    return jax.vmap(lambda w, b: x @ w + b, out_axes=-2)(kernel, bias)


class SequenceFirst(nn.Module):
  """Projections of tokens [L, B, C]: the batch is the second axis."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 3))
    return jnp.swapaxes(jnp.tanh(jnp.swapaxes(x, 0, 1)) @ kernel, 0, 1)


class OfTime(nn.Module):
  """A layer whose input is made of t: two indices below 8 a pair."""

  layer: nn.Module

  @nn.compact
  def __call__(self, x, t):
    return self.layer(jnp.stack([t % 8, t // 8 % 8], axis=-1))


class OfImage(nn.Module):
  layer: nn.Module

  @nn.compact
  def __call__(self, x, t):
    return self.layer(x)


class Attention(nn.Module):
  """Self-attention of tokens."""

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=5)(x, x)


class Positions(nn.Module):
  """Learned positions: a sum that is no bias, for it differs between positions."""

  @nn.compact
  def __call__(self, x):
    return x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))


class Kind(NamedTuple):
  module: nn.Module
  shape: tuple[int, ...]  # of one input
  kinds: set[str]
  wrap: Callable = OfImage


IMAGE = (5, 4, 2)
KINDS = {
  "dense": Kind(nn.Dense(3), (4,), {"dense"}),
  "dense over one axis": Kind(nn.Dense(3), (5, 4), {"dense"}),
  "dense over two axes": Kind(nn.Dense(3, use_bias=False), (2, 3, 4), {"dense"}),
  "dense, several axes": Kind(nn.DenseGeneral((2, 3), axis=(-2, -1)), (3, 2, 2), {"dense"}),
  "dense, axes swapped": Kind(nn.DenseGeneral((2, 3), axis=(-1, 1)), (3, 2, 2), {"dense"}),
  "dense, first axis": Kind(nn.DenseGeneral(3, axis=1), (4, 2), {"dense"}),
  "einsum": Kind(nn.Einsum((4, 2, 3), "bld,dhk->blhk"), (3, 4), {"dense"}),
  "row-major": Kind(RowMajor(), (5, 4), {"dense"}),
  "mapped, no bias": Kind(Mapped(use_bias=False, over=2), (5, 4), {"dense"}),
  "mapped twice": Kind(Mapped(over=2), (5, 4), {"dense"}),
  "side by side": Kind(SideBySide(), (5, 4), {"dense"}),
  "sequence first": Kind(SequenceFirst(), (5, 4), {"dense"}),
  "attention": Kind(Attention(), (3, 4), {"dense"}),
  "1 × 1": Kind(nn.Conv(3, (1, 1)), IMAGE, {"conv2d"}),
  "3 × 3": Kind(nn.Conv(3, (3, 3)), IMAGE, {"conv2d"}),
  "3 × 3, no bias": Kind(nn.Conv(3, (3, 3), use_bias=False), IMAGE, {"conv2d"}),
  "strided": Kind(nn.Conv(3, (3, 3), strides=2), IMAGE, {"conv2d"}),
  "dilated": Kind(nn.Conv(3, (3, 3), kernel_dilation=2), IMAGE, {"conv2d"}),
  "grouped": Kind(nn.Conv(6, (3, 3), feature_group_count=2), (4, 4, 4), {"conv2d"}),
  "depthwise": Kind(
    nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False), (4, 4, 4), {"conv2d"}
  ),
  "valid": Kind(nn.Conv(3, (3, 2), padding="VALID"), IMAGE, {"conv2d"}),
  "asymmetric": Kind(nn.Conv(3, (3, 3), padding=((0, 1), (2, 0))), IMAGE, {"conv2d"}),
  "circular": Kind(nn.Conv(3, (3, 3), padding="CIRCULAR"), IMAGE, {"conv2d"}),
  "channels first": Kind(ChannelsFirst(), IMAGE, {"conv2d"}),
  "1-D": Kind(nn.Conv(3, (3,)), (6, 2), {"conv1d"}),
  "causal": Kind(nn.Conv(3, (4,), padding="CAUSAL"), (6, 2), {"conv1d"}),
  "3-D": Kind(nn.Conv(2, (3, 3, 3)), (2, 3, 2, 2), {"conv3d"}),
  "transposed": Kind(nn.ConvTranspose(3, (2, 2), strides=(2, 2)), IMAGE, {"conv_transpose2d"}),
  "transposed, overlapping": Kind(
    nn.ConvTranspose(2, (3, 3), strides=(2, 2)), (2, 3, 2), {"conv_transpose2d"}
  ),
  "learned positions": Kind(
    nn.Sequential([nn.Dense(3, use_bias=False), Positions()]), (5, 4), {"dense", "shift"}
  ),
  "embed": Kind(nn.Embed(8, 3), (1,), {"embed"}, OfTime),
  "group normalisation": Kind(nn.GroupNorm(2), (3, 2, 4), {"scale", "shift"}),
  "layer normalisation": Kind(nn.LayerNorm(), (3, 4), {"scale", "shift"}),
}


class Case(NamedTuple):
  """What both sides computed for a kind."""

  model: Registration
  ours: dict[str, Matrices]
  grads: Matrices  # [K, B, …], float64
  taps: dict
  bases: dict[str, Eigenbasis]


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def case(request) -> Case:
  kind = KINDS[request.param]
  module, rng = kind.wrap(kind.module), np.random.default_rng(0)
  x_t = jnp.asarray(rng.normal(size=(NUM, *kind.shape)), jnp.float32)
  pairs = Noised(x_t, jnp.asarray([3, 63, 28]), x_t)
  params = jax.eval_shape(module.init, jax.random.key(0), pairs.x_t, pairs.t)["params"]
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
  apply_fn = lambda params, x_t, t: module.apply({"params": params}, x_t, t)
  shape = jax.eval_shape(apply_fn, params, pairs.x_t, pairs.t).shape
  dy = rng.normal(size=(TARGETS, *shape)).astype(np.float32)

  model = register(apply_fn, params, kind.shape, Selection(diagonal=DIAGONAL))
  assert {layer.kind for layer in model.layers} == kind.kinds
  assert model.coverage.num_covered == model.coverage.num_parameters
  kronecker = [layer for layer in model.layers if layer.structure == "kronecker"]
  bases = {layer.name: random_basis(rng, layer) for layer in model.layers}

  @jax.jit
  def ours(params, pairs, dy, bases):
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    sums = {
      sharing: model.factor_sums(params, pairs, lambda out: dy, weights, sharing=sharing)
      for sharing in ("expand", "reduce")
    }
    identity = jax.tree.map(lambda b: Eigenbasis(None, None, None), bases, is_leaf=is_basis)
    return sums | {
      "gradients": model.gradients(params, pairs, lambda out: dy[0], rows=NUM),
      "summed": model.gradients(params, pairs, lambda out: dy[0], rows=1),
      "eigenvalues": model.eigenvalue_sums(params, pairs, lambda out: dy, weights, bases),
      "diagonal": model.eigenvalue_sums(params, pairs, lambda out: dy, weights, identity),
    }

  grads = naive.gradients(apply_fn, params, model.layers, pairs, dy)
  taps = naive.taps(module, params, kronecker, pairs, dy)
  return Case(model, ours(params, pairs, dy, bases), grads, taps, bases)


def is_basis(x) -> bool:
  return isinstance(x, Eigenbasis)


def random_basis(rng, layer) -> Eigenbasis:
  """Random rotations, or none for a diagonal layer."""
  if layer.structure == "diagonal":
    return Eigenbasis(None, None, None)
  *groups, d_out, d_in = layer.matrix_shape
  rotation = lambda d: np.linalg.qr(rng.normal(size=(*groups, d, d)))[0].astype(np.float32)
  return Eigenbasis(rotation(d_in), rotation(d_out), None)


def assert_close(actual, expected, scale=None):
  scale = np.abs(expected).max() if scale is None else scale
  np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, **close)


def test_gradients_of_pairs_equal_those_of_the_network(case):
  for name, expected in case.grads.items():
    assert_close(case.ours["gradients"][name], expected[0])
    assert_close(case.ours["summed"][name], expected[0].sum(0, keepdims=True))


def test_gradients_are_sums_of_outer_products(case):
  """The twins agree with each other: Σ_r g_r a_rᵀ is the gradient."""
  for name, (a, g) in case.taps.items():
    product = np.einsum("kbrgo,brgi->kbgoi", g, a)
    np.testing.assert_allclose(
      product.reshape(case.grads[name].shape), case.grads[name], atol=1e-12
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_equal_plain_sums(case, sharing):
  factors = case.model.factors(case.ours[sharing], total=WEIGHTS.sum())
  assert factors.keys() == case.taps.keys()
  for name, (a, g) in case.taps.items():
    # Not the largest entry of the sum: the key biases of attention have gradients that cancel.
    scale = np.square(g).sum(2).max()
    if sharing == "reduce":
      a, g = a.mean(1, keepdims=True), g.sum(2, keepdims=True)
    weights = WEIGHTS / WEIGHTS.sum()
    expected_a = np.einsum("b,brgi,brgj->gij", weights, a, a) / a.shape[1]
    expected_g = np.einsum("b,kbrgo,kbrgp->gop", weights, g, g) / TARGETS
    assert_close(factors[name].a, expected_a.reshape(factors[name].a.shape))
    assert_close(factors[name].g, expected_g.reshape(factors[name].g.shape), scale)


@pytest.mark.parametrize("basis", ["eigenvalues", "diagonal"])
def test_eigenvalues_are_second_moments_of_rotated_gradients(case, basis):
  for name, matrices in case.grads.items():
    q = case.bases[name]
    if basis == "eigenvalues" and q.q_in is not None:
      matrices = np.swapaxes(q.q_out, -1, -2) @ matrices @ q.q_in
    expected = np.einsum("b,kb...->...", WEIGHTS, matrices**2) / TARGETS
    assert_close(case.ours[basis][name], expected)
