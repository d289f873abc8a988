"""Blocks for kfac-jax: one class a kind of layer, which brings its arrays into one form.

A block turns what kfac-jax hands it (a layer's inputs and the gradients at its outputs) into
a [B, R, d_in] and g [B, R, d_out] (see factors.py), and says how the parameters make the matrix
[W | b]. Those of scale and shift, which have no Kronecker structure, are in elements.py.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

from jaxinf.core.types import Arrays, Eigenbasis, PyTree
from jaxinf.layers import chunks, factors
from jaxinf.layers.convolution import (
  autocorrelates,
  autocorrelation,
  kernel_gradient,
  patch_moments,
  unfold,
)
from jaxinf.layers.elements import ElementBlock
from jaxinf.layers.factors import Tap

_LETTERS = "abcdefgh"
# A convolution's own derivative is the fastest way to a gradient summed over pairs, but a program
# holds it once for each row of the result, and every one adds to the time that compiling takes. So
# it is taken for at most so many rows, each of which sums at least so many pairs.
_MOST_UNROLLED = 8
_LEAST_PAIRS = 4


class KroneckerBlock(kfac_jax.KroneckerFactored):
  """A layer whose curvature is G ⊗ A. Subclasses bring inputs and gradients into one form."""

  structure = "kronecker"

  def __init__(self, layer_tag_eq, **options):
    self._layer_tag_eq = layer_tag_eq
    if "parameters_specs" not in options:  # for kfac-jax: kernel and bias as [d_in, d_out]
      letters = [_LETTERS[: len(shape)] for shape in self.parameters_shapes]
      rows, columns = ("".join(letters[0][axis] for axis in axes) for axes in self.axes)
      specs = [f"{letters[0]} -> ({columns})({rows})", *(f"{b} -> 1({b})" for b in letters[1:])]
      options["parameters_specs"] = specs
    super().__init__(layer_tag_eq, **options)

  @property
  def form(self) -> Any:
    """Where inputs, outputs and matrix lie (see forms.py)."""
    return self.layer_tag_extra_params["form"]

  @property
  def has_bias(self) -> bool:
    return self.number_of_parameters == 2

  @property
  def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the kernel that make rows and columns of the matrix."""
    raise NotImplementedError

  @property
  def groups(self) -> int:
    return 1

  def inputs(self, x: jax.Array) -> jax.Array:
    """Layer inputs as [B, R, (groups,) d_in], without the 1 for a bias."""
    raise NotImplementedError

  def output_gradients(self, dy: jax.Array) -> jax.Array:
    """Gradients at the layer's outputs as [B, R, (groups,) d_out]."""
    raise NotImplementedError

  def tap(self, arrays: Arrays) -> Tap:
    """Inputs and output gradients with positions on one axis."""
    x, dy = arrays
    return Tap(inputs=self.inputs(x), gradients=self.output_gradients(_float32(dy)))

  def input_sums(self, x: jax.Array, weights: jax.Array, approx: str) -> PyTree:
    """Sums over pairs from which `input_factor` makes Σ_b w_b (1/R) Σ_r a_r a_rᵀ."""
    return factors.input_sum(self.inputs(x), weights, has_bias=self.has_bias, approx=approx)

  def input_factor(self, sums: PyTree) -> np.ndarray:
    """A [(groups,) d_in, d_in] on the host."""
    return np.asarray(sums)

  def gradient_sums(self, dy: jax.Array, weights: jax.Array, approx: str) -> jax.Array:
    """Σ_b w_b Σ_r g_r g_rᵀ [(groups,) d_out, d_out]."""
    return factors.gradient_sum(self.output_gradients(_float32(dy)), weights, approx=approx)

  def matrices(self, arrays: Arrays, rows: int) -> jax.Array:
    """Gradients [rows, (groups,) d_out, d_in], each summed over B / rows consecutive pairs."""
    each = len(arrays[1]) // rows

    def gradients(arrays):
      count = len(arrays[1]) // each
      return factors.gradient_matrices(self.tap(arrays), rows=count, has_bias=self.has_bias)

    one = self._single_position(arrays)
    return gradients(arrays) if one else chunks.stacked(gradients, arrays, each=each)

  def eigenvalue_sums(self, arrays: Arrays, basis: Eigenbasis, weights: jax.Array) -> jax.Array:
    """Σ_b w_b (Q_outᵀ gradient Q_in)² [(groups,) d_out, d_in]."""
    of_taps = lambda tap, weights: factors.eigenvalue_sum(
      tap, basis, weights, has_bias=self.has_bias
    )
    return self._over_pairs(of_taps, arrays, weights)

  def matrix_moments(self, arrays: Arrays, weights: jax.Array) -> dict[str, jax.Array]:
    """ "a": Σ_b w_b VᵀV [(groups,) d_in, d_in] and "g": Σ_b w_b V Vᵀ of pairs' gradients V."""
    of_taps = lambda tap, weights: factors.matrix_moments(tap, weights, has_bias=self.has_bias)
    return self._over_pairs(of_taps, arrays, weights)

  def _over_pairs(
    self, sums: Callable[[Tap, jax.Array], PyTree], arrays: Arrays, weights: jax.Array
  ) -> PyTree:
    """sums(tap, weights), a few pairs at a time where there are several positions."""
    of_weighted = lambda weighted: sums(self.tap(weighted[0]), weighted[1])
    one = self._single_position(arrays)
    return of_weighted((arrays, weights)) if one else chunks.summed(of_weighted, (arrays, weights))

  def _single_position(self, arrays: Arrays) -> bool:
    return jax.eval_shape(self.tap, arrays).inputs.shape[1] == 1

  def update_curvature_matrix_estimate(
    self, state, estimation_data, ema_old, ema_new, identity_weight, batch_size
  ):
    """kfac-jax's own use of the block: running means of the two factors of one device's batch."""
    del identity_weight
    if self.groups > 1:
      raise NotImplementedError("kfac-jax's own estimators hold one pair of factors a layer.")
    (x,), (dy,) = estimation_data.primals.inputs, estimation_data.tangents.outputs
    weights = jnp.full(len(dy), 1 / batch_size)
    a = factors.input_sum(self.inputs(x), weights, has_bias=self.has_bias, approx="expand")
    g = self.gradient_sums(dy, weights, "expand")
    state = state.copy()
    for average, value in zip(state.factors, (a, g), strict=True):
      average.update(value, ema_old, ema_new)
    return state


class DenseBlock(KroneckerBlock):
  """A matrix product over any axes of x; every other axis but the first is a position."""

  @property
  def axes(self):
    return self.form.kernel_out, self.form.kernel_in

  def inputs(self, x):
    return _features_last(_float32(x), self.form.x_in)

  def output_gradients(self, dy):
    return _features_last(dy, self.form.y_out)


class ConvBlock(KroneckerBlock):
  """A convolution over any number of axes; inputs are unfolded into patches."""

  @property
  def axes(self):
    out, features, *space = self.form.kernel_spec
    return (out,), (*space, features)

  @property
  def groups(self) -> int:
    return self.form.groups

  @property
  def _geometry(self) -> dict:
    form, shape = self.form, self.parameters_shapes[0]
    kernel = tuple(shape[axis] for axis in form.kernel_spec[2:])
    return dict(
      kernel=kernel,
      strides=form.strides,
      padding=form.padding,
      dilation=form.rhs_dilation,
      x_dilation=form.lhs_dilation,
    )

  def inputs(self, x):
    patches = unfold(self._images(x), **self._geometry)  # [B, *positions, K, C]
    *_, size, channels = patches.shape
    if self.groups == 1:
      return patches.reshape(len(x), -1, size * channels)
    patches = patches.reshape(len(x), -1, size, self.groups, channels // self.groups)
    return jnp.swapaxes(patches, 2, 3).reshape(*patches.shape[:2], self.groups, -1)

  def output_gradients(self, dy):
    rows = _channels_last(dy, self.form.y_spec)
    flat = rows.reshape(len(dy), -1, rows.shape[-1])
    return flat if self.groups == 1 else flat.reshape(*flat.shape[:2], self.groups, -1)

  def matrices(self, arrays: Arrays, rows: int) -> jax.Array:
    """As of any block; a few rows by the convolution's own derivative, see _MOST_UNROLLED."""
    few = rows <= _MOST_UNROLLED and len(arrays[1]) >= rows * _LEAST_PAIRS
    if not few or self._single_position(arrays):
      return super().matrices(arrays, rows)
    x, dy = (jnp.split(_float32(array), rows) for array in arrays)
    gradient = lambda x, dy: kernel_gradient(
      x, dy, self.form, self.parameters_shapes[0], has_bias=self.has_bias
    )
    return jnp.stack([gradient(*pair) for pair in zip(x, dy, strict=True)])

  def input_sums(self, x, weights, approx):
    if approx != "expand" or not self._autocorrelates:
      return super().input_sums(x, weights, approx)
    images = self._images(x)
    scaled = weights / math.prod(images.shape[1:-1])
    sums: dict[str, Any] = {"moments": autocorrelation(images, scaled)}
    if self.has_bias:
      sums["total"], sums["means"] = jnp.sum(weights), self._patch_sums(images, scaled)
    return sums

  def input_factor(self, sums):
    if not isinstance(sums, dict):
      return super().input_factor(sums)
    moments = patch_moments(sums["moments"])
    if not self.has_bias:
      return moments
    return np.block(
      [[moments, sums["means"][:, None]], [sums["means"][None], sums["total"].reshape(1, 1)]]
    )

  @property
  def _autocorrelates(self) -> bool:
    return autocorrelates(**self._geometry, groups=self.groups)

  def _patch_sums(self, images: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_b w_b Σ_r of patches [K · C], without unfolding: of the mean image, which is linear."""
    mean = jnp.einsum("b...,b->...", images, weights, precision=jax.lax.Precision.HIGHEST)
    patches = unfold(mean[None], **self._geometry)
    return jnp.sum(patches, axis=tuple(range(patches.ndim - 2))).reshape(-1)

  def _images(self, x):
    return _channels_last(_float32(x), self.form.x_spec)


class EmbedBlock(KroneckerBlock):
  """Rows of a table [V, C] by index: a matrix product with one-hot inputs, so d_in = V."""

  axes = ((1,), (0,))

  def inputs(self, x):
    size = self.parameters_shapes[0][0]
    return jax.nn.one_hot(x[..., 0].reshape(len(x), -1), size)

  def output_gradients(self, dy):
    return dy.reshape(len(dy), -1, dy.shape[-1])


class Uncovered(kfac_jax.ScaledIdentity):
  """Stands in for a parameter that is in no layer."""


def _float32(x: jax.Array) -> jax.Array:
  """Inputs and gradients of layers that compute in bfloat16 are multiplied up in float32."""
  return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _features_last(x: jax.Array, features: tuple[int, ...]) -> jax.Array:
  """[B, R, d] from an array with the batch first and its features at `features`."""
  rest = [axis for axis in range(x.ndim) if axis not in features]
  size = math.prod(x.shape[axis] for axis in features)
  return jnp.transpose(x, (*rest, *features)).reshape(len(x), -1, size)


def _channels_last(x: jax.Array, spec: tuple[int, ...]) -> jax.Array:
  """[B, *space, C] from an array whose batch, channel and space axes stand at `spec`."""
  batch, channel, *space = spec
  return jnp.transpose(x, (batch, *space, channel))


# What kfac-jax calls for each kind of tag; it passes options that differ between its versions.
BLOCKS = {
  "dense": DenseBlock,
  **{f"{kind}{n}d": ConvBlock for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
  "embed": EmbedBlock,
  "scale": ElementBlock,
  "shift": ElementBlock,
  "generic": Uncovered,
}
