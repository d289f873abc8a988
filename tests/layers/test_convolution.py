"""The second moment of patches: from the autocorrelation, as from the patches themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers.convolution import autocorrelates, autocorrelation, patch_moments, unfold

WEIGHTS = np.array([1.0, 0.0, 2.5], np.float32)


def same(num_axes: int) -> dict:
  """Three offsets an axis, stride 1, one zero at each end."""
  ones = (1,) * num_axes
  return dict(kernel=(3,) * num_axes, strides=ones, padding=((1, 1),) * num_axes, dilation=ones)


@pytest.mark.parametrize(
  "space",
  [(1,), (2,), (7,), (1, 1), (1, 2), (2, 2), (2, 5), (5, 3), (6, 6), (1, 2, 1), (3, 2, 4)],
  ids=lambda space: "×".join(map(str, space)),
)
def test_autocorrelation_gives_the_second_moment_of_patches(space):
  x = np.random.default_rng(0).normal(size=(len(WEIGHTS), *space, 2)).astype(np.float32)
  patches = np.asarray(jax.jit(partial(unfold, **same(len(space))))(x), np.float64)
  rows = patches.reshape(len(x), -1, patches.shape[-2] * patches.shape[-1])
  expected = np.einsum("b,bri,brj->ij", WEIGHTS, rows, rows)
  found = patch_moments(jax.jit(autocorrelation)(x, WEIGHTS))
  # float32 sums of a hundred terms
  np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_patches_are_what_each_offset_sees():
  """x[s·r + d·k − p], or zero outside, of an image and for a geometry without symmetry."""
  x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
  geometry = dict(kernel=(2, 3), strides=(2, 1), padding=((1, 0), (0, 2)), dilation=(2, 1))
  patches = np.asarray(unfold(jnp.asarray(x), **geometry))
  assert patches.shape == (2, 2, 4, 6, 3)
  for r, s, k, m in np.ndindex(2, 4, 2, 3):
    row, column = 2 * r + 2 * k - 1, s + m
    inside = 0 <= row < 5 and 0 <= column < 4
    expected = x[:, row, column] if inside else np.zeros((2, 3))
    np.testing.assert_array_equal(patches[:, r, s, 3 * k + m], expected)


@pytest.mark.parametrize(
  "change",
  [
    dict(kernel=(3, 1)), dict(strides=(1, 2)), dict(padding=((1, 1), (1, 0))),
    dict(dilation=(2, 1)), dict(x_dilation=(1, 2)), dict(groups=2),
  ],
  ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_no_other_geometry_takes_the_short_way(change):
  plain = same(2) | dict(x_dilation=(1, 1), groups=1)
  assert autocorrelates(**plain)
  assert not autocorrelates(**plain | change)
