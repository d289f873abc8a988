"""Each kind of layer: its gradients, factors and corrected eigenvalues against plain sums.

A kind is one row: a Flax module, the shape of its input and the kinds of its layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import DiffusionModel
from jaxinf.core.types import Eigenbasis, Matrices
from jaxinf.layers.coverage import Selection
from jaxinf.layers.factors import APPROXIMATIONS
from jaxinf.layers.register import Registration, register
from tests import nets, twins

NUM, TARGETS = 3, 2
DIAGONAL = r"(scale|layer/bias|positions|gain)$"  # where a kind has scales or shifts
WEIGHTS = np.array([1.0, 0.0, 2.5])
CLOSE = 3e-6  # float32 sums of at most some hundred terms


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


class Gain(nn.Module):
  """A number times the input, or the input plus a number, in front of a dense layer."""

  adds: bool = False

  @nn.compact
  def __call__(self, x):
    gain = self.param("gain", nn.initializers.ones, ())
    return nn.Dense(3, name="dense")(x + gain if self.adds else gain * x)


class Series(nn.Module):
  """Robot actions or audio [L, C]: 1-D convolutions, one strided and one back."""

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Conv(4, (3,), name="in")(x))
    h = nn.tanh(nn.Conv(4, (3,), strides=2, name="down")(h))
    h = nn.tanh(nn.ConvTranspose(4, (2,), strides=(2,), name="up")(h))
    return nn.Conv(x.shape[-1], (3,), name="out")(h)


class Vector(nn.Module):
  """States [D]: dense layers and a layer of learned scales."""

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Dense(5, name="in")(x))
    h = h * self.param("scale", nn.initializers.ones, (5,))
    return nn.Dense(x.shape[-1], name="out")(h)


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
  "scalar gain": Kind(Gain(), (4,), {"dense", "scale"}),
  "scalar shift": Kind(Gain(adds=True), (2, 4), {"dense", "shift"}),
  "series": Kind(Series(), (6, 2), {"conv1d", "conv_transpose1d"}),
  "vector": Kind(Vector(), (4,), {"dense", "scale"}),
  "embed": Kind(nn.Embed(8, 3), (1,), {"embed"}, OfTime),
  "group normalisation": Kind(nn.GroupNorm(2), (3, 2, 4), {"scale", "shift"}),
  "layer normalisation": Kind(nn.LayerNorm(), (3, 4), {"scale", "shift"}),
}


class Case(NamedTuple):
  """What both sides computed for a kind."""

  layers: Registration
  ours: dict[str, Matrices]
  grads: Matrices  # [K, B, …], float64
  taps: dict
  bases: dict[str, Eigenbasis]


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def case(request) -> Case:
  kind = KINDS[request.param]
  module, rng = kind.wrap(kind.module), np.random.default_rng(0)
  pairs = nets.some_pairs(NUM, kind.shape)
  pairs = pairs._replace(time=jnp.asarray([3, 63, 28]))
  params = jax.eval_shape(module.init, jax.random.key(0), pairs.inputs, pairs.time)["params"]
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
  apply_fn = lambda params, inputs, time: module.apply({"params": params}, inputs, time)
  shape = jax.eval_shape(apply_fn, params, pairs.inputs, pairs.time).shape
  dy = rng.normal(size=(TARGETS, *shape)).astype(np.float32)
  # What is back-propagated here has the shape of the output, which need not be that of the target.
  pairs = pairs._replace(target=jnp.zeros(shape))

  model = DiffusionModel(apply_fn, params, nets.PROCESS)
  diagonal = (DIAGONAL,) if kind.kinds & {"scale", "shift"} else ()
  layers = register(model, kind.shape, Selection(diagonal=diagonal))
  assert {layer.kind for layer in layers.layers} == kind.kinds
  assert layers.coverage.num_covered == layers.coverage.num_parameters
  kronecker = [layer for layer in layers.layers if layer.structure == "kronecker"]
  bases = {layer.name: random_basis(rng, layer) for layer in layers.layers}

  @jax.jit
  def ours(params, pairs, dy, bases):
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    sums = {
      approx: layers.factor_sums(params, pairs, lambda out: dy, weights, approx=approx)
      for approx in APPROXIMATIONS
    }
    identity = jax.tree.map(lambda b: Eigenbasis(None, None, None), bases, is_leaf=is_basis)
    return sums | {
      "gradients": layers.gradients(params, pairs, lambda out: dy[0], rows=NUM),
      "summed": layers.gradients(params, pairs, lambda out: dy[0], rows=1),
      "eigenvalues": layers.eigenvalue_sums(params, pairs, lambda out: dy, weights, bases),
      "diagonal": layers.eigenvalue_sums(params, pairs, lambda out: dy, weights, identity),
    }

  grads = twins.cotangent_gradients(apply_fn, params, layers.layers, pairs, dy)
  taps = twins.taps(module, params, kronecker, pairs, dy)
  return Case(layers, ours(params, pairs, dy, bases), grads, taps, bases)


def is_basis(x) -> bool:
  return isinstance(x, Eigenbasis)


def random_basis(rng, layer) -> Eigenbasis:
  """Random rotations, or none for a diagonal layer."""
  if layer.structure == "diagonal":
    return Eigenbasis(None, None, None)
  *groups, d_out, d_in = layer.matrix_shape
  rotation = lambda d: np.linalg.qr(rng.normal(size=(*groups, d, d)))[0].astype(np.float32)
  return Eigenbasis(rotation(d_in), rotation(d_out), None)


def test_gradients_of_pairs_equal_those_of_the_network(case):
  for name, expected in case.grads.items():
    twins.assert_close(case.ours["gradients"][name], expected[0], CLOSE)
    total, scale = expected[0].sum(0, keepdims=True), np.abs(expected).max()
    twins.assert_close(case.ours["summed"][name], total, CLOSE, scale)


def test_gradients_are_sums_of_outer_products(case):
  """The twins agree with each other: Σ_r g_r a_rᵀ is the gradient."""
  for name, (a, g) in case.taps.items():
    product = np.einsum("kbrgo,brgi->kbgoi", g, a)
    np.testing.assert_allclose(
      product.reshape(case.grads[name].shape), case.grads[name], atol=1e-12
    )


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_factors_equal_plain_sums(case, approx):
  factors = case.layers.factors(case.ours[approx], total=WEIGHTS.sum())
  assert factors.keys() == case.taps.keys()
  for name, (a, g) in case.taps.items():
    # Not the largest entry of the sum: the key biases of attention have gradients that cancel.
    scale = np.square(g).sum(2).max()
    if approx == "reduce":
      a, g = a.mean(1, keepdims=True), g.sum(2, keepdims=True)
    weights = WEIGHTS / WEIGHTS.sum()
    expected_a = np.einsum("b,brgi,brgj->gij", weights, a, a) / a.shape[1]
    expected_g = np.einsum("b,kbrgo,kbrgp->gop", weights, g, g) / TARGETS
    twins.assert_close(factors[name].a, expected_a.reshape(factors[name].a.shape), CLOSE)
    twins.assert_close(factors[name].g, expected_g.reshape(factors[name].g.shape), CLOSE, scale)


@pytest.mark.parametrize("basis", ["eigenvalues", "diagonal"])
def test_eigenvalues_are_second_moments_of_rotated_gradients(case, basis):
  for name, matrices in case.grads.items():
    q = case.bases[name]
    if basis == "eigenvalues" and q.q_in is not None:
      matrices = np.swapaxes(q.q_out, -1, -2) @ matrices @ q.q_in
    expected = np.einsum("b,kb...->...", WEIGHTS, matrices**2) / TARGETS
    twins.assert_close(case.ours[basis][name], expected, CLOSE)
