"""Convolutions as matrix products: patches, and the second moment of patches without patches.

For a 3 × 3 (or 3, or 3 × 3 × 3) kernel with stride 1 and zero padding of 1, the second moment of
patches is fixed by the input's autocorrelation: entry (i, j) of kernel offsets is the sum of
x[q] x[q + j − i]ᵀ over the positions q that offset i reaches, which are all but those of one edge.
So 15 C² numbers (5 offsets in a row, 3 rows) stand for 81 C².
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.layers.forms import ConvForm

_HIGHEST = jax.lax.Precision.HIGHEST
_CUT = {0: ("1",), 1: (), 2: ("0",)}  # kernel offset → the edge that it does not reach


def unfold(
  x: jax.Array,
  *,
  kernel: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  dilation: Sequence[int],
  x_dilation: Sequence[int] | None = None,
) -> jax.Array:
  """Patches [B, *positions, prod(kernel), C] of images x [B, *space, C].

  Shifted slices are far cheaper on a CPU than XLA's patches by convolution.

  Args:
    x: images.
    kernel, strides, padding, dilation: one number (or pair) an axis of space.
    x_dilation: zeros are put between pixels (transposed convolutions); None: no zeros.
  """
  inner = [0] * len(kernel) if x_dilation is None else [d - 1 for d in x_dilation]
  config = [(low, high, i) for (low, high), i in zip(padding, inner, strict=True)]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
  reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
  size = [
    (x.shape[1 + i] - r) // s + 1 for i, (r, s) in enumerate(zip(reach, strides, strict=True))
  ]
  slices = []
  for offset in itertools.product(*map(range, kernel)):
    start = [o * d for o, d in zip(offset, dilation, strict=True)]
    limit = [a + s * (n - 1) + 1 for a, s, n in zip(start, strides, size, strict=True)]
    slices.append(jax.lax.slice(x, (0, *start, 0), (len(x), *limit, x.shape[-1]), (1, *strides, 1)))
  return jnp.stack(slices, axis=-2)


def autocorrelates(kernel, strides, padding, dilation, x_dilation, groups) -> bool:
  """Whether the second moment of patches follows from `autocorrelation`."""
  return (
    groups == 1
    and all(k == 3 for k in kernel)
    and all(p == (1, 1) for p in padding)
    and all(n == 1 for n in (*strides, *dilation, *x_dilation))
  )


def autocorrelation(x: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
  """Σ over images and positions of w x[q] x[q + d]ᵀ for all offsets d, and the same on each edge.

  Args:
    x: images [B, *space, C].
    weights: w [B].

  Returns:
    Edge name → [3, 5, …, C, C]: offsets 0, 1, 2 on the first axis of space and −2 … 2 on the
    others. A name has one letter an axis: "." all of it, "0" its first and "1" its last row. Along
    an axis cut to one row, the one offset is 0.
  """
  num_axes = x.ndim - 2
  sums = {}
  for name in map("".join, itertools.product(".01", repeat=num_axes)):
    cut = tuple(
      slice(None) if c == "." else slice(0, 1) if c == "0" else slice(-1, None) for c in name
    )
    index = (slice(None), *cut)
    sums[name] = _correlate(x[index], weights, [c == "." for c in name])
  return sums


def patch_moments(sums: dict[str, np.ndarray]) -> np.ndarray:
  """Σ of patches' outer products [K · C, K · C], K = 3 ** axes, from `autocorrelation`."""
  (num_axes,) = {len(name) for name in sums}
  channels = next(iter(sums.values())).shape[-1]
  offsets = list(itertools.product(range(3), repeat=num_axes))
  result = np.zeros((len(offsets), channels, len(offsets), channels), np.float64)
  for (a, i), (b, j) in itertools.product(enumerate(offsets), repeat=2):
    if a > b:
      result[a, :, b] = result[b, :, a].T
      continue
    # Offset 0 does not reach the last row and offset 2 not the first; a pair of different offsets
    # on an axis meets only zeros there.
    cuts = [[".", *_CUT[p]] if p == q else ["."] for p, q in zip(i, j, strict=True)]
    for name in map("".join, itertools.product(*cuts)):
      sign = (-1) ** (num_axes - name.count("."))
      result[a, :, b] += sign * _at(sums[name], name, [q - p for p, q in zip(i, j, strict=True)])
  return result.reshape(len(offsets) * channels, -1)


def _at(sums: np.ndarray, name: str, offset: Sequence[int]) -> np.ndarray:
  """The [C, C] sum at one offset, whose first entry on an axis not cut is never negative."""
  free = [axis for axis, letter in enumerate(name) if letter == "."]
  place = {axis: offset[axis] + (2 if k else 0) for k, axis in enumerate(free)}
  return np.asarray(sums, np.float64)[tuple(place.get(axis, 0) for axis in range(len(name)))]


def _correlate(x: jax.Array, weights: jax.Array, free: Sequence[bool]) -> jax.Array:
  """Offsets [3 or 1, 5 or 1, …, C, C], by the spectrum: F⁻¹ of Σ over images of conj(X) Xᵀ.

  Takes a quarter of the operations that the sums over positions take, or less where images are
  large.
  """
  axes = [axis for axis, is_free in enumerate(free) if is_free]
  sizes = [x.shape[1 + axis] + 2 for axis in axes]  # zeros keep offsets from wrapping around
  spectrum = jnp.fft.rfftn(x, sizes, [1 + axis for axis in axes]) if axes else x
  spectrum = spectrum.reshape(len(x), -1, x.shape[-1])
  power = jnp.einsum(
    "bfi,bfj->fij", jnp.conj(spectrum) * weights[:, None, None], spectrum, precision=_HIGHEST
  )
  inverse = np.ones((1, 1))
  for axis, size in zip(axes, sizes, strict=True):
    inverse = np.kron(inverse, _inverse_transform(size, axis == axes[0], axis == axes[-1]))
  product = lambda matrix, part: jnp.einsum(
    "of,fij->oij", jnp.asarray(matrix, jnp.float32), part, precision=_HIGHEST
  )
  sums = product(inverse.real, power.real) - product(inverse.imag, power.imag)
  counts = [1 if not is_free else 3 if i == axes[0] else 5 for i, is_free in enumerate(free)]
  return sums.reshape(*counts, *sums.shape[-2:])


def _inverse_transform(size: int, from_zero: bool, halved: bool) -> np.ndarray:
  """Frequencies to offsets 0 … 2 or −2 … 2 of one axis [offsets, frequencies], complex.

  Args:
    size: frequencies there are.
    from_zero: whether offsets begin at 0.
    halved: whether the axis has the frequencies 0 … size // 2 only, which stand for their negatives
      too, as the result's real part is taken.
  """
  frequencies = np.arange(size // 2 + 1 if halved else size)
  twice = halved & (frequencies > 0) & (2 * frequencies != size)
  phases = np.outer(np.arange(0 if from_zero else -2, 3), frequencies)
  return np.exp(2j * np.pi / size * phases) * (1 + twice) / size


def kernel_gradient(
  x: jax.Array, dy: jax.Array, form: ConvForm, shape: tuple[int, ...], *, has_bias: bool
) -> jax.Array:
  """The gradient matrix of a convolution, summed over pairs, by its own transpose.

  Args:
    x: [B, …] float32, inputs.
    dy: [B, …] float32, gradients at the outputs.
    form: where batch, channels and space stand.
    shape: of the kernel.
    has_bias: whether the bias's gradient is the last column.

  Returns:
    [(groups,) d_out, d_in].
  """
  specs = jax.lax.ConvDimensionNumbers(form.x_spec, form.kernel_spec, form.y_spec)
  convolve = lambda kernel: jax.lax.conv_general_dilated(
    x,
    kernel,
    form.strides,
    form.padding,
    form.lhs_dilation,
    form.rhs_dilation,
    specs,
    feature_group_count=form.groups,
    precision=jax.lax.Precision.HIGHEST,
  )
  (gradient,) = jax.linear_transpose(convolve, jnp.zeros(shape))(dy)
  out, features, *space = form.kernel_spec
  matrix = jnp.transpose(gradient, (out, *space, features)).reshape(shape[out], -1)
  if has_bias:
    positions = tuple(axis for axis in range(dy.ndim) if axis != form.y_spec[1])
    matrix = jnp.concatenate([matrix, jnp.sum(dy, positions)[:, None]], axis=1)
  *_, d_in = matrix.shape
  return matrix if form.groups == 1 else matrix.reshape(form.groups, -1, d_in)
