"""Block-wise symmetric int8 quantisation of gradients (paper, Appendix F).

A block of `block_size` numbers v is kept as round(v / s) with the step s = max |v| / 127, so that
each number is off by at most s / 2. A block of zeros has s = 0 and comes back as zeros.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinf.types import Quantised

_LEVELS = 127


def quantise(rows: jax.Array, block_size: int = 64) -> Quantised:
  """Quantises the last axis of rows [..., P] float32 block by block."""
  size = rows.shape[-1]
  padding = [(0, 0)] * (rows.ndim - 1) + [(0, -size % block_size)]
  blocks = jnp.pad(rows, padding).reshape(*rows.shape[:-1], -1, block_size)
  scales = jnp.max(jnp.abs(blocks), axis=-1) / _LEVELS
  safe = jnp.where(scales > 0, scales, 1)
  values = jnp.round(blocks / safe[..., None]).astype(jnp.int8)
  return Quantised(values=values, scales=scales, size=size)


def dequantise(quantised: Quantised) -> jax.Array:
  """The rows [..., P] float32 that `quantise` was given, to within half a step a block."""
  blocks = quantised.values.astype(jnp.float32) * quantised.scales[..., None]
  return blocks.reshape(*blocks.shape[:-2], -1)[..., : quantised.size]


def keep(rows: jax.Array) -> jax.Array:
  """No compression."""
  return rows


COMPRESSIONS: dict[str | None, tuple[Callable, Callable]] = {
  "int8": (quantise, dequantise),
  None: (keep, keep),
}
