"""The block of a scale or a shift, which has no Kronecker structure: its curvature is diagonal."""

from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax

from jaxinf.core.types import Arrays, Eigenbasis


class ElementBlock(kfac_jax.Diagonal):
  """x · p or x + p with p of any shape: its matrix is p as a column [size, 1]."""

  structure = "diagonal"
  has_bias = False
  groups = 1

  @property
  def form(self) -> Any:
    return self.layer_tag_extra_params["form"]

  @property
  def axes(self):
    return tuple(range(len(self.parameters_shapes[0]))), ()

  def matrices(self, arrays: Arrays, rows: int) -> jax.Array:
    """Gradients [rows, size, 1], each summed over B / rows consecutive pairs."""
    x, dy = arrays
    product = dy * x if self.form.kind == "scale" else dy
    product = product.reshape(rows, -1, *product.shape[1:])
    shape = self.parameters_shapes[0]
    # The first axis of dy, the batch, has become two; axes of length 1 may have vanished.
    kept = [axis + 1 for axis, size in zip(self.form.axes, shape, strict=True) if size != 1]
    rest = tuple(axis for axis in range(1, product.ndim) if axis not in kept)
    return jnp.sum(product, axis=rest).reshape(rows, -1, 1)

  def eigenvalue_sums(self, arrays: Arrays, basis: Eigenbasis, weights: jax.Array) -> jax.Array:
    """Σ_b w_b gradient² [size, 1]."""
    del basis
    squares = jnp.square(self.matrices(arrays, rows=len(arrays[1])))
    return jnp.sum(squares * weights[:, None, None], axis=0)

  def update_curvature_matrix_estimate(
    self, state, estimation_data, ema_old, ema_new, identity_weight, batch_size
  ):
    """kfac-jax's own use of the block: a running mean of the diagonal."""
    del identity_weight
    arrays = (estimation_data.primals.inputs[0], estimation_data.tangents.outputs[0])
    weights = jnp.full(len(arrays[1]), 1 / batch_size)
    value = self.eigenvalue_sums(arrays, Eigenbasis(None, None, None), weights)
    state = state.copy()
    (average,) = state.diagonal_factors
    average.update(value.reshape(self.parameters_shapes[0]), ema_old, ema_new)
    return state
