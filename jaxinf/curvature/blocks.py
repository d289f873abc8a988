"""K-FAC-expand blocks for kfac-jax (paper, Section 3.1 and Appendix B; Eschenhagen et al. 2023).

For a layer with inputs a_r (1 appended where it has a bias) and output gradients g_r at positions
r = 1 … R of an example,

  A = E over examples, draws, positions of a_r a_rᵀ,    G = E over examples, draws of Σ_r g_r g_rᵀ,

and G ⊗ A approximates the GGN block of its matrix [W | b]. A dense layer with no positions has
R = 1; attention projections and 2-D convolutions (on unfolded inputs) have R > 1.

kfac-jax hands each block the layer's inputs and output gradients. Our blocks take its `ema_new` as
one weight a pair, [B], so that padding (weight 0) leaves no trace, and each update replaces the
state by the sums over its own batch: adding up over batches is the drivers' business.
"""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kfac_jax

from jaxinf.types import KroneckerFactors


class Tap(NamedTuple):
  """What K-FAC needs of a layer for B (example, draw) pairs with R positions each."""

  inputs: jax.Array  # a [B, R, d_in], without the 1 for a bias
  gradients: jax.Array  # g [B, R, d_out], of whatever was back-propagated


class KroneckerBlock(kfac_jax.KroneckerFactored):
  """A layer whose curvature is G ⊗ A. Subclasses bring inputs and gradients into one form."""

  kind: str

  @property
  @abc.abstractmethod
  def kernel_order(self) -> tuple[int, ...]:
    """Axes of the kernel with the outputs first and the inputs in the order of `inputs`."""

  @abc.abstractmethod
  def inputs(self, x: jax.Array) -> jax.Array:
    """Layer inputs as [B, R, d_in], without the 1 for a bias."""

  @abc.abstractmethod
  def output_gradients(self, dy: jax.Array) -> jax.Array:
    """Gradients at the layer's outputs as [B, R, d_out]."""

  def update_curvature_matrix_estimate(
    self, state, estimation_data, ema_old, ema_new, identity_weight, batch_size
  ):
    """Replaces the state's factors by sums over this batch, weighted by ema_new [B]."""
    del ema_old, identity_weight, batch_size
    tap = self.tap(estimation_data)
    factors = factor_sums(tap, weights=ema_new, has_bias=self.number_of_parameters == 2)
    state = state.copy()
    for average, value in zip(state.factors, (factors.a, factors.g), strict=True):
      average.value = value
    return state

  def tap(self, data: kfac_jax.LayerVjpData) -> "Tap":
    """The layer's inputs and output gradients with positions on one axis."""
    (x,) = data.primals.inputs
    (dy,) = data.tangents.outputs
    return Tap(inputs=self.inputs(x), gradients=self.output_gradients(dy))


class DenseBlock(KroneckerBlock):
  """Dense layer y = x W + b on x [B, …, d_in], W [d_in, d_out]; every position counts."""

  kind = "dense"

  @property
  def kernel_order(self) -> tuple[int, ...]:
    return (1, 0)

  def inputs(self, x):
    return x.reshape(x.shape[0], -1, x.shape[-1])

  def output_gradients(self, dy):
    return dy.reshape(dy.shape[0], -1, dy.shape[-1])


class Conv2DBlock(KroneckerBlock):
  """2-D convolution of any stride, padding and layout; inputs are unfolded into patches."""

  kind = "conv2d"

  @property
  def kernel_order(self) -> tuple[int, ...]:
    out, features, *spatial = self._conv["dimension_numbers"].rhs_spec
    return (out, *spatial, features)

  @property
  def _conv(self) -> dict:
    return self.layer_tag_extra_params

  def inputs(self, x):
    kernel = [self.parameters_shapes[0][axis] for axis in self.kernel_order[1:3]]
    patches = unfold(
      _channels_last(x, self._conv["dimension_numbers"].lhs_spec),
      kernel=kernel,
      strides=self._conv["window_strides"],
      padding=self._conv["padding"],
      dilation=self._conv["rhs_dilation"],
    )
    return patches.reshape(x.shape[0], -1, patches.shape[-1])

  def output_gradients(self, dy):
    dy = _channels_last(dy, self._conv["dimension_numbers"].out_spec)
    return dy.reshape(dy.shape[0], -1, dy.shape[-1])


class Uncovered(kfac_jax.ScaledIdentity):
  """Stands in for a layer that has no Kronecker block; `reason` says why."""

  def __init__(self, layer_tag_eq, reason: str, **options):
    self.reason = reason
    super().__init__(layer_tag_eq, **options)


def factor_sums(tap: Tap, *, weights: jax.Array, has_bias: bool) -> KroneckerFactors:
  """Σ_b w_b (1/R) Σ_r a_r a_rᵀ and Σ_b w_b Σ_r g_r g_rᵀ.

  Args:
    tap: a [B, R, d_in] and g [B, R, d_out].
    weights: w [B].
    has_bias: whether a 1 is appended to the inputs.
  """
  scale = weights[:, None, None]
  weighted = tap.inputs * (scale / tap.inputs.shape[1])
  a = _gram(weighted, tap.inputs)
  if has_bias:
    sums = jnp.sum(weighted, axis=(0, 1))[None]
    corner = jnp.sum(weights).reshape(1, 1)
    a = jnp.block([[a, sums.T], [sums, corner]])
  return KroneckerFactors(a=a, g=_gram(tap.gradients * scale, tap.gradients))


def gradient_matrices(tap: Tap, *, rows: int, has_bias: bool) -> jax.Array:
  """Σ over pairs and positions of g aᵀ for each of `rows` equal runs of pairs.

  Args:
    tap: a [B, R, d_in] and g [B, R, d_out]; rows divides B.
    rows: M, how many matrices; each sums B / M consecutive pairs.
    has_bias: whether a 1 is appended to the inputs.

  Returns:
    [M, d_out, d_in], the bias in the last column.
  """
  inputs, gradients = (x.reshape(rows, -1, x.shape[-1]) for x in (tap.inputs, tap.gradients))
  matrices = jnp.einsum("mko,mki->moi", gradients, inputs, precision=jax.lax.Precision.HIGHEST)
  if not has_bias:
    return matrices
  return jnp.concatenate([matrices, jnp.sum(gradients, axis=1)[..., None]], axis=-1)


def unfold(x: jax.Array, *, kernel, strides, padding, dilation) -> jax.Array:
  """Patches [B, H', W', kh · kw · C] (in that order) of images x [B, H, W, C].

  Shifted slices are far cheaper on a CPU than XLA's patches by convolution.
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  size = [(x.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(2)]
  slices = []
  for row in range(kernel[0]):
    for column in range(kernel[1]):
      start = (row * dilation[0], column * dilation[1])
      limit = [start[i] + strides[i] * (size[i] - 1) + 1 for i in range(2)]
      slices.append(x[:, start[0] : limit[0] : strides[0], start[1] : limit[1] : strides[1]])
  return jnp.concatenate(slices, axis=-1) if len(slices) > 1 else slices[0]


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
  x, y = (v.reshape(-1, v.shape[-1]) for v in (x, y))
  return jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)


def _channels_last(x: jax.Array, spec: tuple[int, ...]) -> jax.Array:
  """[B, H, W, C] from an array whose batch, channel and spatial axes stand at `spec`."""
  batch, channel, *spatial = spec
  return jnp.transpose(x, (batch, *spatial, channel))


def _dense(eqn, **options):
  block = DenseBlock(eqn, **options)
  num_axes = len(block.parameters_shapes[0])
  if num_axes != 2:
    reason = f"a dense kernel with {num_axes} axes (DenseGeneral) has no block yet"
    return Uncovered(eqn, reason, **options)
  return block


def _conv2d(eqn, **options):
  if any(d != 1 for d in eqn.params["lhs_dilation"]):
    return Uncovered(eqn, "transposed convolutions have no block yet", **options)
  if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
    return Uncovered(eqn, "grouped convolutions have no block yet", **options)
  return Conv2DBlock(eqn, **options)


def _scale_and_shift(eqn, **options):
  return Uncovered(eqn, "a scale or shift (normalisation) has no Kronecker block", **options)


def _generic(eqn, **options):
  return Uncovered(eqn, "kfac-jax found no dense or convolution layer around it", **options)


# What kfac-jax calls for each kind of layer; it passes options that differ between its versions.
BLOCKS = {
  "dense": _dense,
  "repeated_dense": _dense,
  "conv2d": _conv2d,
  "scale_and_shift": _scale_and_shift,
  "generic": _generic,
}
