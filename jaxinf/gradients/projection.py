"""Linear compression of gradients to a share of their numbers: random projection, truncation.

A layer's gradient v ∈ R^P is kept as y = R v with r < P rows in R, and comes back as Rᵀ y, so that
an inner product with it is one of projections: ⟨Rᵀ R u, v⟩ = ⟨R u, R v⟩.
"""

import dataclasses
import fractions
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxinf.random import fold_in_each, stream
from jaxinf.types import Array

_WORD = 32  # signs from one word of random bits


@dataclasses.dataclass(frozen=True)
class RandomProjection:
  """R of r = ⌈share · P⌉ rows of independent signs ±1/√r; see Compression.

  R is made from its key as it is used and never stored. Inner products are unbiased, with variance
  (‖u‖² ‖v‖² + ⟨u, v⟩² − 2 Σ_i u_i² v_i²) / r. Time is O(P · r), for R itself at each call too. All
  layers of one shape have one R.

  Reference: Park et al. 2023, TRAK.

  Attributes:
    share: of a layer's numbers P that are kept, in (0, 1].
    seed: of R.
    entries_at_once: of R in memory; memory and speed depend on it, R does not.
  """

  share: float
  seed: int
  entries_at_once: int = 2**24
  in_eigenbasis: ClassVar[bool] = False
  is_costly: ClassVar[bool] = True

  def __post_init__(self):
    _check_share(self.share)

  @property
  def description(self) -> str:
    return f"projection, {100 * self.share:g} %"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> jax.Array:
    size, num, num_columns, starts = self._chunks(eigenvalues.shape)
    padding = ((0, 0), (0, len(starts) * num_columns - size))
    padded = jnp.pad(rows.reshape(len(rows), -1), padding)
    chunks = jnp.moveaxis(padded.reshape(len(rows), -1, num_columns), 1, 0)

    def add_chunk(total, inputs):
      start, chunk = inputs
      signs = self._signs(eigenvalues.shape, start, num_columns, num)
      return total + jnp.matmul(chunk, signs, precision="highest"), None

    total, _ = jax.lax.scan(add_chunk, jnp.zeros((len(rows), num)), (starts, chunks))
    return total / math.sqrt(num)

  def restore(self, compressed: jax.Array, eigenvalues: Array) -> jax.Array:
    size, num, num_columns, starts = self._chunks(eigenvalues.shape)

    def chunk(start):
      signs = self._signs(eigenvalues.shape, start, num_columns, num)
      return jnp.matmul(compressed, signs.T, precision="highest")

    columns = jnp.moveaxis(jax.lax.map(chunk, starts), 0, 1).reshape(len(compressed), -1)
    return (columns[:, :size] / math.sqrt(num)).reshape(-1, *eigenvalues.shape)

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    return 4 * _num_kept(self.share, math.prod(shape))

  def _chunks(self, shape: tuple[int, ...]) -> tuple[int, int, int, jax.Array]:
    """P, r, columns of R in a chunk, and the first word of each chunk's columns."""
    size = math.prod(shape)
    num, num_words = _num_kept(self.share, size), -(-size // _WORD)
    words = min(num_words, max(1, self.entries_at_once // (_WORD * num)))
    return size, num, words * _WORD, jnp.arange(0, num_words, words)

  def _signs(
    self, shape: tuple[int, ...], start: jax.Array, num_columns: int, num: int
  ) -> jax.Array:
    """√r Rᵀ [num_columns, r] of a chunk: the 32 columns of one word have a key of their own."""
    key = stream(self.seed, f"projection of {shape}")
    keys = fold_in_each(key, start + jnp.arange(num_columns // _WORD))
    words = jax.vmap(lambda key: jax.random.bits(key, (num,), jnp.uint32))(keys)
    bits = (words[:, None] >> jnp.arange(_WORD, dtype=jnp.uint32)[:, None]) & 1
    return 1 - 2 * bits.reshape(num_columns, num).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Truncation:
  """The ⌈share · P⌉ coordinates of largest eigenvalues Λ, in the eigenbasis; see Compression.

  R has rows of the identity: the other coordinates come back as zeros. Of equal eigenvalues the
  first are kept.

  Attributes:
    share: of a layer's numbers P that are kept, in (0, 1].
  """

  share: float
  in_eigenbasis: ClassVar[bool] = True
  is_costly: ClassVar[bool] = True

  def __post_init__(self):
    _check_share(self.share)

  @property
  def description(self) -> str:
    return f"truncation, {100 * self.share:g} %"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> jax.Array:
    return rows.reshape(len(rows), -1)[:, self._kept(eigenvalues)]

  def restore(self, compressed: jax.Array, eigenvalues: Array) -> jax.Array:
    zeros = jnp.zeros((len(compressed), eigenvalues.size))
    restored = zeros.at[:, self._kept(eigenvalues)].set(compressed, unique_indices=True)
    return restored.reshape(-1, *eigenvalues.shape)

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    return 4 * _num_kept(self.share, math.prod(shape))

  def _kept(self, eigenvalues: Array) -> jax.Array:
    """Positions of the kept coordinates in the flat matrix, by falling eigenvalue."""
    order = jnp.argsort(jnp.asarray(eigenvalues, jnp.float32), axis=None, descending=True)
    return order[: _num_kept(self.share, eigenvalues.size)]


def _num_kept(share: float, size: int) -> int:
  """⌈share · size⌉ of the share as it is written: 0.07 of 100 is 7, though 0.07 * 100 > 7."""
  return math.ceil(fractions.Fraction(str(share)) * size)


def _check_share(share: float) -> None:
  """Raises ValueError unless the share lies in (0, 1]."""
  if not 0 < share <= 1:
    raise ValueError(f"The share of numbers to keep must lie in (0, 1], as 0.1 does; got {share}.")
