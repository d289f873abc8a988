"""Compression of gradients (paper, Appendix F), each method behind one interface.

Quantisation is the paper's own choice. It finds the low rank that serves language models (Grosse et
al. 2023) to fail in diffusion, where a gradient averages over many draws of (t, ε).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxinf.compression.projection import RandomProjection, Truncation
from jaxinf.compression.quantise import Quantisation
from jaxinf.core.types import Array, PyTree


class Compression(Protocol):
  """How gradient matrices of one layer are kept.

  Implementations are hashable, so that jitted functions may close over them, and their methods are
  pure. Each row is compressed by itself.

  Attributes:
    in_eigenbasis: whether rows must be given in the layer's eigenbasis, Q_outᵀ · grads · Q_in, and
      come back in it; otherwise any basis will do.
    is_costly: whether `restore` takes too long to be repeated for every batch of gradients.
  """

  in_eigenbasis: ClassVar[bool]
  is_costly: ClassVar[bool]

  @property
  def description(self) -> str:
    """What tables call it."""

  def compress(self, rows: jax.Array, eigenvalues: Array) -> PyTree:
    """Arrays with leading axis B, which `restore` understands.

    Args:
      rows: [B, (groups,) d_out, d_in] float32.
      eigenvalues: the layer's Λ [(groups,) d_out, d_in], of which the shape counts, and the order
        where coordinates are picked by it; the same for compress and restore.
    """

  def restore(self, compressed: PyTree, eigenvalues: Array) -> jax.Array:
    """Nearly the rows [B, (groups,) d_out, d_in] float32 that `compress` was given."""

  def __hash__(self) -> int: ...

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    """Bytes of one compressed row of a layer with matrices of `shape`, ((groups,) d_out, d_in)."""


@runtime_checkable
class Blockwise(Compression, Protocol):
  """A compression that keeps every block of consecutive numbers by itself; see flat.py.

  Attributes:
    block_size: numbers in a block; a layer's last one is filled up with zeros.
  """

  block_size: int

  def restore_columns(self, columns: Sequence[jax.Array]) -> jax.Array:
    """[B, n] of the columns of a compressed row's leaves, side by side, that hold n numbers.

    bfloat16 may come as uint16, its bits.
    """


def settings_of(compression: Compression) -> list:
  """Kind and options of a compression, as JSON, which `description` does not tell in full."""
  return [type(compression).__name__, dict(vars(compression))]


def compression_named(name: str | None, size: float | None = None) -> Compression:
  """The compression of that name.

  Args:
    name: a key of COMPRESSIONS; None is no compression.
    size: the rank of "svd", the share kept by "projection" and "truncation"; None: its default.

  Raises:
    ValueError: there is none of that name, or none of that size.
  """
  if name not in COMPRESSIONS:
    raise ValueError(f"Unknown compression {name!r}; there are: {list(COMPRESSIONS)}.")
  if size is None:
    return COMPRESSIONS[name]
  if name is None or name not in _SIZED:
    raise ValueError(
      f"Compression {name!r} takes no size, got {size}; those that do: {', '.join(_SIZED)}."
    )
  return _SIZED[name](size)


@dataclasses.dataclass(frozen=True)
class Uncompressed:
  """float32 as it is; see Compression."""

  in_eigenbasis: ClassVar[bool] = False
  is_costly: ClassVar[bool] = False
  block_size: ClassVar[int] = 1

  @property
  def description(self) -> str:
    return "float32"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> jax.Array:
    return rows

  def restore(self, compressed: jax.Array, eigenvalues: Array) -> jax.Array:
    return compressed

  def restore_columns(self, columns: Sequence[jax.Array]) -> jax.Array:
    return columns[0]

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Bfloat16:
  """The upper half of a float32, rounded to nearest even: off by 2⁻⁸ of each number at most."""

  in_eigenbasis: ClassVar[bool] = False
  is_costly: ClassVar[bool] = False
  block_size: ClassVar[int] = 1

  @property
  def description(self) -> str:
    return "bfloat16"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> jax.Array:
    return rows.astype(jnp.bfloat16)

  def restore(self, compressed: jax.Array, eigenvalues: Array) -> jax.Array:
    return compressed.astype(jnp.float32)

  def restore_columns(self, columns: Sequence[jax.Array]) -> jax.Array:
    (bits,) = columns
    if bits.dtype == jnp.uint16:  # XLA converts bfloat16 ten times slower on CPUs than it shifts
      return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    return bits.astype(jnp.float32)

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """The leading singular triplets of each matrix (Grosse et al. 2023); see Compression.

  By Eckart and Young no matrix of that rank is nearer: the squared error is Σ σ_i² over the
  singular values left out. A matrix is kept as it is where its factors would be no smaller.

  Attributes:
    rank: triplets that are kept.
  """

  rank: int
  in_eigenbasis: ClassVar[bool] = False
  is_costly: ClassVar[bool] = False

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"The rank must be at least 1; got {self.rank}.")

  @property
  def description(self) -> str:
    return f"svd, rank {self.rank}"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> PyTree:
    if self._keeps_whole(eigenvalues.shape):
      return rows
    # Numbers near 1: an SVD squares them, which neither overflows nor vanishes.
    largest = jnp.max(jnp.abs(rows), axis=(-2, -1), keepdims=True)
    scale = jnp.where(largest == 0, 1, largest)
    left, values, right = jnp.linalg.svd(rows / scale, full_matrices=False)
    left = left * values[..., None, :] * scale
    return left[..., : self.rank], right[..., : self.rank, :]

  def restore(self, compressed: PyTree, eigenvalues: Array) -> jax.Array:
    if self._keeps_whole(eigenvalues.shape):
      return compressed
    return jnp.matmul(*compressed, precision="highest")

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    if self._keeps_whole(shape):
      return 4 * math.prod(shape)
    *groups, d_out, d_in = shape
    return 4 * math.prod(groups) * self.rank * (d_out + d_in)

  def _keeps_whole(self, shape: tuple[int, ...]) -> bool:
    """Whether the factors are no smaller than the matrix: so for every rank ≥ min(d_out, d_in)."""
    d_out, d_in = shape[-2:]
    return self.rank * (d_out + d_in) >= d_out * d_in


def _low_rank(size: float) -> LowRank:
  if not float(size).is_integer():
    raise ValueError(f"The rank of svd must be a whole number; got {size}.")
  return LowRank(int(size))


_SIZED: dict[str, Callable[[float], Compression]] = {
  "svd": _low_rank,
  "projection": lambda share: RandomProjection(share, seed=0),
  "truncation": Truncation,
}

DEFAULT = "int16"  # of preconditioned query gradients

COMPRESSIONS: dict[str | None, Compression] = {
  "int4": Quantisation(4),
  "int8": Quantisation(8),
  "int16": Quantisation(16),
  "bfloat16": Bfloat16(),
  "svd": LowRank(20),
  "projection": RandomProjection(0.1, seed=0),
  "truncation": Truncation(0.25),
  None: Uncompressed(),
}
