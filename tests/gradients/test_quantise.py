"""Block-wise int8: the error bound, zeros, and blocks that are not full."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.gradients.quantise import COMPRESSIONS, dequantise, quantise


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_each_number_is_off_by_at_most_half_a_step(size):
  rows = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
  rows *= np.logspace(0, -4, size, dtype=np.float32)  # blocks of very different scales
  quantised = quantise(jnp.asarray(rows), block_size=64)
  steps = np.repeat(np.asarray(quantised.scales), 64, axis=1)[:, :size]
  # Half a step, and float32 rounding of the product.
  assert (np.abs(dequantise(quantised) - rows) <= 0.5 * steps * (1 + 1e-5)).all()
  assert quantised.values.dtype == jnp.int8


def test_the_largest_number_of_a_block_is_kept_exactly():
  rows = jnp.array([[1.0, -254.0, 3.0]])
  assert dequantise(quantise(rows))[0, 1] == -254


def test_a_block_of_zeros_comes_back_as_zeros():
  rows = jnp.zeros((2, 300)).at[0, 299].set(1.0)
  np.testing.assert_array_equal(dequantise(quantise(rows)), rows)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_compression_restores_the_shape_and_nearly_the_direction(name):
  compress, restore = COMPRESSIONS[name]
  rows = np.random.default_rng(0).normal(size=(4, 700)).astype(np.float32)
  restored = np.asarray(restore(compress(jnp.asarray(rows))))
  assert restored.shape == rows.shape
  cosine = (
    np.sum(restored * rows, 1) / np.linalg.norm(restored, axis=1) / np.linalg.norm(rows, axis=1)
  )
  assert (cosine > 0.9999).all()
