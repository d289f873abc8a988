"""Arrays that may be larger than memory: read and hashed by rows, never whole.

NumPy arrays, memory maps, and what zarr and h5py give are taken alike: they have a shape and a
dtype, and give rows for a slice or for ascending row numbers.
"""

import abc
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK_BYTES = 2**24  # read at a time: far more than a disk's block, far less than memory
_MOST_HELD_BYTES = 2**30  # of an array that is put into memory unasked: any machine has as much


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


class Rows(abc.ABC):
  """An array whose rows are made when they are asked for: by number, numbers, slice or mask.

  Row numbers may repeat and come in any order. A kind of rows has `read`, and sets the attributes.

  Attributes:
    shape: [N, …] as a tuple.
    dtype: of the numbers.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  @abc.abstractmethod
  def read(self, rows: np.ndarray) -> np.ndarray:
    """The rows [n, …] with these numbers in 0 … N − 1, in memory."""

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize

  def __getitem__(self, rows: Any) -> np.ndarray:
    numbers = np.arange(len(self))[rows]
    return self.read(numbers) if numbers.ndim else self.read(numbers[None])[0]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    if copy is False:
      raise ValueError("Rows that are made when asked for have no array yet: allow a copy.")
    return self[:].astype(dtype or self.dtype, copy=False)


class Converted(Rows):
  """An array on disk whose rows come as another type."""

  def __init__(self, array: Any, dtype: Any):
    self._array, self.shape, self.dtype = array, tuple(array.shape), np.dtype(dtype)

  def read(self, rows: np.ndarray) -> np.ndarray:
    return read_rows(self._array, rows).astype(self.dtype)


class Chosen(Rows):
  """Some rows of an array on disk, in an order of their own.

  Args:
    array: [N, …].
    rows: [n] row numbers in 0 … N − 1; the result is [n, …].
  """

  def __init__(self, array: Any, rows: np.ndarray):
    self._array, self._rows = array, np.asarray(rows)
    self.shape = (len(self._rows), *array.shape[1:])
    self.dtype = np.dtype(array.dtype).newbyteorder("=")

  def read(self, rows: np.ndarray) -> np.ndarray:
    return read_rows(self._array, self._rows[rows])


def chosen(array: Any, rows: np.ndarray) -> Any:
  """The rows [n, …] with these numbers: in memory, unless they lie on disk and exceed 1 GiB."""
  view = Chosen(array, rows)
  on_disk = isinstance(array, np.memmap) or not isinstance(array, np.ndarray)
  return view if on_disk and not fits_memory(view.shape, view.dtype) else view[:]


def fits_memory(shape: tuple[int, ...], dtype: Any) -> bool:
  """Whether an array is small enough to be put into memory unasked: at most 1 GiB."""
  return int(np.prod(shape)) * np.dtype(dtype).itemsize <= _MOST_HELD_BYTES


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
