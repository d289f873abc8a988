"""Block-wise integers: the error bound, zeros, packing, and blocks that are not full."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression.quantise import Quantisation, dequantise, quantise

BITS = (4, 8, 16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 64, 255])
def test_each_number_is_off_by_at_most_half_a_step(size, bits):
  rows = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
  rows *= np.logspace(0, -4, size, dtype=np.float32)  # blocks of very different scales
  quantised = quantise(jnp.asarray(rows), bits=bits)
  levels = 2 ** (bits - 1) - 1
  largest = np.abs(np.pad(rows, [(0, 0), (0, -size % 64)]).reshape(3, -1, 64)).max(axis=2)
  # float32 rounds max / levels once.
  np.testing.assert_allclose(quantised.scales, largest / levels, rtol=2**-23)
  steps = np.repeat(quantised.scales, 64, axis=1)[:, :size]
  # Half a step; v / s and its product with s, up to `levels` steps, are rounded by 2⁻²⁴ each.
  assert (np.abs(dequantise(quantised) - rows) <= (0.5 + levels * 2**-23) * steps).all()


@pytest.mark.parametrize("bits", BITS)
def test_every_integer_comes_back_exactly(bits):
  levels = 2 ** (bits - 1) - 1
  rows = 2 * jnp.arange(-levels, levels + 1, dtype=jnp.float32)  # one block, of step 2
  np.testing.assert_array_equal(dequantise(quantise(rows, 2**bits, bits)), rows)


@pytest.mark.parametrize("bits", BITS)
def test_a_block_of_zeros_comes_back_as_zeros(bits):
  rows = jnp.zeros((2, 300)).at[0, 299].set(1.0)
  np.testing.assert_array_equal(dequantise(quantise(rows, bits=bits)), rows)


@pytest.mark.parametrize("bits", BITS)
def test_a_step_that_float32_cannot_hold_gives_zeros_and_touches_no_other_block(bits):
  tiny = np.finfo(np.float32).tiny
  rows = jnp.full((1, 128), tiny).at[0, 64:].set(1.0)
  restored = dequantise(quantise(rows, bits=bits))
  np.testing.assert_array_equal(restored, jnp.zeros((1, 128)).at[0, 64:].set(restored[0, -1]))
  assert restored[0, -1] == pytest.approx(1, rel=2**-23)  # levels · (1 / levels), two roundings


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(value):
  restored = dequantise(quantise(jnp.zeros((1, 128)).at[0, 3].set(value)))
  assert not np.isfinite(restored[0, 3]) and (restored[0, 64:] == 0).all()


def test_impossible_integers_are_refused():
  with pytest.raises(ValueError, match="4, 8, 16 bits; got 5"):
    Quantisation(5)
  with pytest.raises(ValueError, match="even for 4 bits; got 3"):
    Quantisation(4, block_size=3)
