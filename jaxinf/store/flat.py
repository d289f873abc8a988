"""Inner products with packed rows at the speed of memory: all layers as one long row.

A blockwise compression keeps each block of numbers by itself. The packed arrays of all layers are
then those of one long vector, and products with R query vectors are one matrix product. On a CPU it
is made tile by tile, so that restored numbers stay in the cache. Other devices restore whole rows.
"""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression.compression import Blockwise
from jaxinf.core.types import Array
from jaxinf.store.packing import Packing

# Numbers of a row in a tile: 16 KiB of float32, so that 64 rows of them fit a cache of 1 MiB.
_TILE = 4096


def flat_vectors(
  packing: Packing, block: int, vectors: Mapping[str, np.ndarray], names: Sequence[str]
) -> np.ndarray:
  """Vectors [R, …] of layers as long vectors [R, F] over the columns that hold those layers.

  Zeros stand for layers that lie between them and for the padding of blocks.

  Args:
    packing: of the rows.
    block: numbers in a block.
    vectors: layer name → [R, …].
    names: of the layers.
  """
  order = list(packing.shapes)
  first, last = (pick(order.index(name) for name in names) for pick in (min, max))
  num, parts = len(next(iter(vectors.values()))), []
  for name in order[first : last + 1]:
    size = int(np.prod(packing.shapes[name]))
    part = np.zeros((num, -(-size // block) * block), np.float32)
    if name in vectors:
      part[:, :size] = np.reshape(vectors[name], (num, size))
    parts.append(part)
  return np.concatenate(parts, axis=1)


def flat_products(
  compression: Blockwise, vectors: jax.Array, arrays: Sequence[jax.Array]
) -> jax.Array:
  """[B, R] inner products of packed rows, arrays [B, W_k], with long vectors [R, F]."""
  chex.assert_rank([vectors, *arrays], 2)
  chex.assert_equal_shape_prefix(arrays, 1)
  width = vectors.shape[1]
  tile = min(-(-_TILE // compression.block_size) * compression.block_size, width)
  ratios = [array.shape[1] / width for array in arrays]  # columns for each number

  def product(number: int | jax.Array, size: int) -> jax.Array:
    """Products over one tile, of `size` numbers."""
    cut = lambda x, ratio: jax.lax.dynamic_slice_in_dim(
      x, number * round(tile * ratio), round(size * ratio), axis=1
    )
    columns = [cut(x, ratio) for x, ratio in zip(arrays, ratios, strict=True)]
    return jnp.matmul(
      compression.restore_columns(columns), cut(vectors, 1.0).T, precision=jax.lax.Precision.HIGHEST
    )

  def by_tiles() -> jax.Array:
    whole, rest = divmod(width, tile)
    zeros = jnp.zeros((len(arrays[0]), len(vectors)))
    total = jax.lax.fori_loop(0, whole, lambda i, sums: sums + product(i, tile), zeros)
    return total + product(whole, rest) if rest else total

  def at_once() -> jax.Array:
    return jnp.matmul(
      compression.restore_columns(arrays), vectors.T, precision=jax.lax.Precision.HIGHEST
    )

  if len(arrays) == 1 and arrays[0].dtype == jnp.float32:
    return at_once()
  return jax.lax.platform_dependent(cpu=by_tiles, default=at_once)


def bits_of(array: np.ndarray) -> np.ndarray:
  """bfloat16 as uint16, without a copy; other arrays as they are."""
  return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def of_bits(array: Array) -> Array:
  """What `bits_of` was given, in a kernel."""
  if array.dtype != jnp.uint16:
    return array
  return jax.lax.bitcast_convert_type(array, jnp.bfloat16)
