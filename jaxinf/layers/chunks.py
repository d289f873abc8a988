"""A batch's pairs a few at a time on CPUs, because that is faster there.

The patches and the gradient matrices of all pairs of a batch go through main memory. Those of a few
pairs stay in the processor's cache. Other devices take the whole batch, so that more is done at
once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinf.core.types import PyTree

# Measured on a 3 × 3 convolution of 64 channels and 16 × 16 positions: 1 to 16 pairs at a time take
# equally long within 20 %, 32 and more take twice as long. Larger layers want fewer.
_PAIRS = 8


def summed(kernel: Callable[[PyTree], PyTree], arrays: PyTree) -> PyTree:
  """kernel(arrays), where that is a sum over the first axis of arrays [B, …]."""

  def by_chunks(arrays):
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(kernel, arrays))
    add = lambda total, chunk: (jax.tree.map(jnp.add, total, kernel(chunk)), None)
    return jax.lax.scan(add, zeros, _chunks(arrays, 1))[0]

  return jax.lax.platform_dependent(arrays, cpu=by_chunks, default=kernel)


def stacked(kernel: Callable[[PyTree], jax.Array], arrays: PyTree, *, each: int) -> jax.Array:
  """kernel(arrays) [B / each, …], where each row depends on `each` consecutive pairs alone."""

  def by_chunks(arrays):
    rows = jax.lax.map(kernel, _chunks(arrays, each))
    return rows.reshape(-1, *rows.shape[2:])

  return jax.lax.platform_dependent(arrays, cpu=by_chunks, default=kernel)


def _chunks(arrays: PyTree, multiple: int) -> PyTree:
  """[B, …] → [B / size, size, …], size the largest divisor of B that suits.

  It is a multiple of `multiple` and at most _PAIRS, or `multiple` itself where that is larger.
  """
  num = len(jax.tree.leaves(arrays)[0])
  sizes = range(multiple, max(_PAIRS, multiple) + 1, multiple)
  size = max(size for size in sizes if num % size == 0)
  return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
