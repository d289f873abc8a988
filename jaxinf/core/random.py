"""Random keys that belong to examples.

A key is `fold_in(fold_in(stream(seed, name), example), draw)`, so that a result never depends on
batch size, order, padding, the number of devices, or where a run was interrupted.
"""

import hashlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

# Named here, so that jax_default_prng_impl changes no draw. Others (rbg) draw for a vmapped batch
# of keys from its first key, so that what is drawn depends on the batch.
_GENERATOR = "threefry2x32"


def stream(seed: int | jax.Array, name: str) -> jax.Array:
  """The key of one named source of randomness, such as "train_gradients"."""
  return stream_of(seed, stream_number(name))


def stream_of(seed: int | jax.Array, number: int | jax.Array) -> jax.Array:
  """The key of the named source of randomness with that `stream_number`; both may be traced."""
  return jax.random.fold_in(jax.random.key(seed, impl=_GENERATOR), number)


def substreams(keys: jax.Array, name: str) -> jax.Array:
  """Keys [B] of one named part of the draws whose keys are `keys` [B], such as "noise".

  Parts are told apart by name because `jax.random.split(key)[i]` is `fold_in(key, i)`: two parts
  made by splitting and by folding in small numbers would be one and the same.
  """
  return fold_in_each(keys, jnp.full(keys.shape, stream_number(name), jnp.uint32))


def wrapped(key_data: jax.Array) -> jax.Array:
  """The key whose data, as of jax.random.key_data, went through a program's arguments."""
  return jax.random.wrap_key_data(key_data, impl=_GENERATOR)


def fold_in_each(keys: jax.Array, numbers: jax.Array) -> jax.Array:
  """Folds numbers [B] into one key, or into keys [B] row by row; returns keys [B]."""
  in_axes = (0 if keys.ndim else None, 0)
  return jax.vmap(jax.random.fold_in, in_axes)(keys, numbers)


def draw_keys(key: jax.Array, draws: int, first: int | jax.Array = 0) -> jax.Array:
  """Keys [draws] of the draws first, first + 1, … of the example whose key is `key`."""
  return fold_in_each(key, first + jnp.arange(draws))


def example_numbers(ids: np.ndarray) -> np.ndarray:
  """uint32 numbers [N] that identify examples in keys, from integer or string ids [N].

  Integers in [0, 2³²) stand for themselves; strings are hashed. Two ids that share a hash merely
  share their draws of (t, ε).
  """
  ids = np.asarray(ids)
  if np.issubdtype(ids.dtype, np.integer):
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**32):
      raise ValueError("Integer ids must lie in [0, 2**32); pass other ids as strings.")
    return ids.astype(np.uint32)
  if ids.dtype.kind not in "US":
    raise ValueError(f"Ids must be integers or strings, not {ids.dtype}.")
  digests = (hashlib.blake2b(str(i).encode(), digest_size=4).digest() for i in ids)
  return np.fromiter((int.from_bytes(d, "little") for d in digests), np.uint32, len(ids))


def stream_number(name: str) -> int:
  """The uint32 number of a named source of randomness."""
  return zlib.crc32(name.encode())
