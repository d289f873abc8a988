"""Arrays that may be larger than memory: read and hashed by rows, never whole.

NumPy arrays, memory maps, and what zarr and h5py give are taken alike: they have a shape and a
dtype, and give rows for a slice or for ascending row numbers.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK_BYTES = 2**24  # read at a time: far more than a disk's block, far less than memory


def as_array(value: Any) -> Any:
  """The value itself where it is an array of any kind, and otherwise NumPy's array of it."""
  if not all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__")):
    return np.asarray(value)
  try:
    np.dtype(value.dtype)
  except TypeError:  # a tensor of another framework, on the host
    return np.asarray(value)
  return np.asarray(value) if hasattr(value, "addressable_shards") else value


def read_rows(array: Any, rows: np.ndarray) -> np.ndarray:
  """The rows [n, …] with these numbers, which may repeat, in memory and in native byte order."""
  if isinstance(array, np.ndarray):
    return _native(array[rows])
  wanted, back = np.unique(rows, return_inverse=True)
  if len(wanted) and wanted[-1] - wanted[0] + 1 == len(wanted):
    return _native(array[int(wanted[0]) : int(wanted[-1]) + 1])[back]
  return _native(getattr(array, "oindex", array)[wanted])[back]


class Converted:
  """An array on disk whose rows come as another type."""

  def __init__(self, array: Any, dtype: Any):
    self._array, self.shape, self.dtype = array, tuple(array.shape), np.dtype(dtype)

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(self.shape[0]))
    return read_rows(self._array, rows).astype(self.dtype)


def converted(array: Any, dtype: Any) -> Any:
  """The array as another type: at once where it is in memory, or else as its rows are read."""
  if isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
    return array.astype(dtype)
  return Converted(array, dtype)


def blocks(array: Any) -> Iterator[np.ndarray]:
  """Consecutive rows [n, …] of an array, a few MiB at a time."""
  row_bytes = max(1, int(np.prod(array.shape[1:])) * np.dtype(array.dtype).itemsize)
  size = max(1, _BLOCK_BYTES // row_bytes)
  for begin in range(0, array.shape[0], size):
    yield _native(array[begin : begin + size])


def is_floating(dtype: Any) -> bool:
  """Whether a dtype is of floating-point numbers, bfloat16 among them."""
  return jnp.issubdtype(dtype, jnp.floating)


def fingerprint(arrays: Mapping[str, Any]) -> str:
  """A hash of names, types, shapes and contents, read block by block."""
  digest = hashlib.sha256()
  for name in sorted(arrays):
    array = as_array(arrays[name])
    digest.update(f"{name} {np.dtype(array.dtype)} {tuple(array.shape)}".encode())
    for block in blocks(array) if len(array.shape) else (np.asarray(array),):
      digest.update(block.tobytes())
  return digest.hexdigest()[:32]


def _native(rows: Any) -> np.ndarray:
  """Rows in memory, in this machine's byte order."""
  rows = np.asarray(rows)
  return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))


def as_float(data: Any) -> jax.Array:
  """Data as float32: uint8 0…255 is mapped to [-1, 1], other numbers keep their value."""
  if data.dtype == jnp.uint8:
    return data.astype(jnp.float32) / 127.5 - 1
  return data.astype(jnp.float32)
