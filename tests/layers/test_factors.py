"""Moments of whole gradients, by either order of operations, against float64 sums over pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.layers.factors import Tap, matrix_moments
from tests.twins import assert_close

NUM, D_IN, D_OUT = 4, 5, 3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("positions", [1, 40])  # through positions; through the pairs' matrices
def test_moments_are_weighted_sums_of_products_of_each_pairs_gradient(positions, groups, has_bias):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(NUM, positions, *groups, D_IN))
  gradients = rng.normal(size=(NUM, positions, *groups, D_OUT))
  weights = np.array([1.0, 0.5, 0.0, 2.0])
  tap = Tap(jnp.asarray(inputs, jnp.float32), jnp.asarray(gradients, jnp.float32))
  found = matrix_moments(tap, jnp.asarray(weights, jnp.float32), has_bias=has_bias)
  if has_bias:
    inputs = np.concatenate([inputs, np.ones((*inputs.shape[:-1], 1))], axis=-1)
  matrices = np.einsum("br...o,br...i->b...oi", gradients, inputs)
  expected = {
    "a": np.einsum("b,b...oi,b...oj->...ij", weights, matrices, matrices),
    "g": np.einsum("b,b...oi,b...pi->...op", weights, matrices, matrices),
  }
  assert_close(found, expected)
