"""Gradients of examples by jax.grad, one example at a time, as the studies' tests compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import Curvature, Draws, Examples
from jaxinf.core.random import draw_keys, stream
from jaxinf.core.types import Matrices
from jaxinf.diffusion.measurements import LOSS
from jaxinf.layers.specs import to_matrices


def gradients_of(curvature: Curvature, examples: Examples, name: str, draws: Draws) -> Matrices:
  """Layer name → [n, d_out, d_in] float64 of the loss, for shared draws of the stream `name`."""
  model = curvature.model
  keys = draw_keys(jax.random.fold_in(stream(draws.seed, name), 0), draws.num)[None]

  @jax.jit
  @jax.grad
  def gradient(params, image):
    values = LOSS.evaluate(model.apply_fn, params, model.process, image[None], keys, draws=draws)
    return values.sum()

  grads = [gradient(model.params, jnp.asarray(image)) for image in examples.data]
  stacked = jax.tree.map(lambda *g: np.stack(g).astype(np.float64), *grads)
  return to_matrices(curvature.layers, stacked)
