"""Per-example gradients of a measurement, as layer matrices."""

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.types import Matrices, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.process import Process
from jaxinf.layers.register import Registration

# At most so many examples go one after another as batches of their own, if each has many pairs: an
# ordinary backward pass is then faster than taps, and each example takes its time to compile.
_MOST_APART = 2
_MANY_DRAWS = 16


def example_gradients(
  layers: Registration,
  measurement: Measurement,
  process: Process,
  params: Params,
  *,
  data: jax.Array,
  keys: jax.Array,
  conditioning: PyTree = None,
  draws: Draws = INDEPENDENT,
  augmentation: Augmentation = PLAIN,
) -> Matrices:
  """Gradients of each example's measurement over its draws.

  Args:
    layers: the registered layers.
    measurement: what is differentiated.
    process: the diffusion process.
    params: the parameters.
    data: [B, …], what the measurement is of.
    keys: [B, S], one a draw.
    conditioning: pytree of arrays [B, …], or None.
    draws: the design by which the S draws of an example depend on each other, and how they count.
    augmentation: what each draw does to its example.

  Returns:
    Layer name → [B, d_out, d_in].
  """
  num, size = keys.shape
  chex.assert_axis_dimension(data, 0, num)
  if 1 < num <= _MOST_APART and size >= _MANY_DRAWS:
    alone = lambda row: example_gradients(
      layers,
      measurement,
      process,
      params,
      data=data[row][None],
      keys=keys[row][None],
      conditioning=jax.tree.map(lambda x: x[row][None], conditioning),
      draws=draws,
      augmentation=augmentation,
    )
    return jax.tree.map(lambda *x: jnp.concatenate(x), *map(alone, range(num)))
  pairs = measurement.pairs(process, data, keys, conditioning, draws, augmentation)
  cotangents = measurement.cotangents(process, pairs, size, draws.power)
  grads = layers.gradients(params, pairs, cotangents, rows=num)
  chex.assert_tree_shape_prefix(grads, (num,))
  return grads
