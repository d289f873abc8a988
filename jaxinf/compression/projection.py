"""Random projection of gradients, and what else compresses linearly: truncation.

A gradient v ∈ R^P is kept as y = R v, where R has r < P rows, and comes back as Rᵀ y. Inner
products are then those of projections: ⟨Rᵀ R u, v⟩ = ⟨R u, R v⟩. `RandomProjection` and
`Truncation` compress layer by layer. `Projection` takes the gradient of all parameters to one
short vector.

Random matrices are never stored. They are made from their keys as they are used, a part at a time.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxinf.core.checks import checked_count, checked_seed
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.registry import named
from jaxinf.core.types import Array

_WORD = 32  # entries that share a key: the signs in one word of random bits


def _checked_seed(seed: int) -> int:
  """`checked_seed`; one traced within a compiled function has no value to check yet."""
  return seed if isinstance(seed, jax.core.Tracer) else checked_seed(seed)


# (key, words [n], r) → Rᵀ √r [32 n, r]: the columns 32 w … 32 w + 31 of R for each word w.
Entries = Callable[[jax.Array, jax.Array, int], jax.Array]


def rademacher(key: jax.Array, words: jax.Array, num: int) -> jax.Array:
  """Independent signs ±1 [32 n, num]. The 32 rows of a word come from a key of its own.

  Signs are the default, because one random word makes 32 of them, and because an inner product has
  less variance with them than with normal numbers, by 2 Σ_i u_i² v_i² / r.
  """
  keys = fold_in_each(key, words)
  bits = jax.vmap(lambda key: jax.random.bits(key, (num,), jnp.uint32))(keys)
  # Each bit becomes the sign bit of the float32 1.0, because that is twice as fast as arithmetic.
  signs = (bits[:, None] >> jnp.arange(_WORD, dtype=jnp.uint32)[:, None]) << 31
  ones = (signs | jnp.uint32(0x3F800000)).reshape(-1, num)
  return jax.lax.bitcast_convert_type(ones, jnp.float32)


def normal(key: jax.Array, words: jax.Array, num: int) -> jax.Array:
  """Independent standard normal numbers [32 n, num]. 32 rows come from one key, as for signs."""
  keys = fold_in_each(key, words)
  return jax.vmap(lambda key: jax.random.normal(key, (_WORD, num)))(keys).reshape(-1, num)


ENTRIES: dict[str, Entries] = {"rademacher": rademacher, "normal": normal}


def projected(
  rows: jax.Array, key: jax.Array, num: int, entries: Entries, entries_at_once: int
) -> jax.Array:
  """R v [B, num] of rows v [B, P], where √num Rᵀ has the entries of the key."""
  size = rows.shape[1]
  columns = _columns_at_once(size, num, entries_at_once)
  whole, rest = divmod(size, columns)

  def product(part: int | jax.Array, cut: jax.Array) -> jax.Array:
    """Product of a cut of the rows and their part of the matrix, which is made in whole words."""
    words = -(-cut.shape[1] // _WORD)
    matrix = entries(key, part * (columns // _WORD) + jnp.arange(words), num)
    return jnp.matmul(cut, matrix[: cut.shape[1]], precision="highest")

  def add_part(part: jax.Array, total: jax.Array) -> jax.Array:
    cut = jax.lax.dynamic_slice_in_dim(rows, part * columns, columns, axis=1)
    return total + product(part, cut)

  total = jnp.zeros((len(rows), num))
  if whole:
    total = jax.lax.fori_loop(0, whole, add_part, total)
  if rest:
    total += product(whole, rows[:, size - rest :])
  return total / math.sqrt(num)


def _columns_at_once(size: int, num: int, entries_at_once: int) -> int:
  """Columns of R [num, size] in a part: a whole number of words."""
  return _WORD * min(-(-size // _WORD), max(1, entries_at_once // (_WORD * num)))


@dataclasses.dataclass(frozen=True)
class Projection:
  """R of `dim` rows with independent entries of variance 1/dim, for vectors of any length.

  Inner products are unbiased. Their variance is that of RandomProjection with signs, and
  (‖u‖² ‖v‖² + ⟨u, v⟩²) / dim with normal numbers. Making R takes O(P · dim) a call, as does each
  row.

  Reference: Park et al. 2023, TRAK.

  Attributes:
    dim: k ≥ 1.
    seed: of R.
    kind: of entries: "rademacher" (±1/√k) or "normal" (N(0, 1/k)).
    entries_at_once: of R in memory. None: 2²⁰ on a CPU, 4 MiB, to stay in its cache; elsewhere 2²⁶,
      256 MiB, for large products. R does not depend on it.

  Raises:
    ValueError: dim is too small, or there is no such kind.
  """

  dim: int
  seed: int
  kind: str = "rademacher"
  entries_at_once: int | None = None

  # Rows of R that are made together. With more, a part of 2²⁰ entries would have few columns, and
  # products with it would be slow. R depends on it, because each tile has its own key.
  tile: ClassVar[int] = 512

  def __post_init__(self):
    object.__setattr__(self, "dim", checked_count(self.dim, "dim"))
    object.__setattr__(self, "seed", _checked_seed(self.seed))
    named(ENTRIES, self.kind, "projection")

  @property
  def key(self) -> jax.Array:
    return stream(self.seed, f"projection, {self.kind}")

  def __call__(self, rows: jax.Array, key: jax.Array) -> jax.Array:
    """R v [B, dim] of rows v [B, P], float32. `key` is `self.key`, perhaps an operand."""
    entries = ENTRIES[self.kind]
    num_tiles = -(-self.dim // self.tile)
    size = -(-self.dim // num_tiles)  # rows of a tile; those of the last may be cut
    keys = fold_in_each(key, jnp.arange(num_tiles))

    def of_tile(key: jax.Array, at_once: int) -> jax.Array:
      return projected(rows, key, size, entries, at_once)

    def tiles(at_once: int) -> jax.Array:
      if num_tiles == 1:
        return of_tile(keys[0], at_once)[None]
      return jax.lax.map(lambda key: of_tile(key, at_once), keys)

    if self.entries_at_once is None:
      parts = jax.lax.platform_dependent(cpu=lambda: tiles(2**20), default=lambda: tiles(2**26))
    else:
      parts = tiles(self.entries_at_once)
    joined = jnp.moveaxis(parts, 0, 1).reshape(len(rows), -1)[:, : self.dim]
    return joined * math.sqrt(size / self.dim)


@dataclasses.dataclass(frozen=True)
class RandomProjection:
  """R of r = ⌈share · P⌉ rows of independent signs ±1/√r; see Compression.

  Inner products are unbiased, with variance (‖u‖² ‖v‖² + ⟨u, v⟩² − 2 Σ_i u_i² v_i²) / r. R is never
  stored: making it takes O(P · r) a call, as does each row. All layers of one shape have one R.

  Reference: Park et al. 2023, TRAK.

  Attributes:
    share: of a layer's numbers P that are kept, in (0, 1].
    seed: of R.
    entries_at_once: of R in memory, 64 MiB by default. R does not depend on it.
  """

  share: float
  seed: int
  entries_at_once: int = 2**24
  in_eigenbasis: ClassVar[bool] = False
  is_costly: ClassVar[bool] = True

  def __post_init__(self):
    _check_share(self.share)
    object.__setattr__(self, "seed", _checked_seed(self.seed))

  @property
  def description(self) -> str:
    return f"projection, {100 * self.share:g} %"

  def compress(self, rows: jax.Array, eigenvalues: Array) -> jax.Array:
    num, key = _num_kept(self.share, eigenvalues.size), self._key(eigenvalues.shape)
    return projected(rows.reshape(len(rows), -1), key, num, rademacher, self.entries_at_once)

  def restore(self, compressed: jax.Array, eigenvalues: Array) -> jax.Array:
    size, num = eigenvalues.size, compressed.shape[1]
    columns = _columns_at_once(size, num, self.entries_at_once)
    words = jnp.arange(-(-size // columns) * columns // _WORD).reshape(-1, columns // _WORD)

    def part(words: jax.Array) -> jax.Array:
      signs = rademacher(self._key(eigenvalues.shape), words, num)
      return jnp.matmul(compressed, signs.T, precision="highest")

    rows = jnp.moveaxis(jax.lax.map(part, words), 0, 1).reshape(len(compressed), -1)
    return (rows[:, :size] / math.sqrt(num)).reshape(-1, *eigenvalues.shape)

  def num_bytes(self, shape: tuple[int, ...]) -> int:
    return 4 * _num_kept(self.share, math.prod(shape))

  def _key(self, shape: tuple[int, ...]) -> jax.Array:
    return stream(self.seed, f"projection of {shape}")


@dataclasses.dataclass(frozen=True)
class Truncation:
  """The ⌈share · P⌉ coordinates of largest eigenvalues Λ, in the eigenbasis; see Compression.

  The rows of R are rows of the identity. The other coordinates come back as zeros. Of equal
  eigenvalues the first are kept.

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
    """Positions of the kept coordinates in the flat matrix, from the largest eigenvalue down."""
    order = jnp.argsort(jnp.asarray(eigenvalues, jnp.float32), axis=None, descending=True)
    return order[: _num_kept(self.share, eigenvalues.size)]


def _num_kept(share: float, size: int) -> int:
  """⌈share · size⌉ of the share as it is written: 0.07 of 100 is 7, though 0.07 * 100 > 7."""
  return math.ceil(fractions.Fraction(str(share)) * size)


def _check_share(share: float) -> None:
  """Raises ValueError unless the share lies in (0, 1]."""
  if not 0 < share <= 1:
    raise ValueError(f"The share of numbers to keep must lie in (0, 1], as 0.1 does; got {share}.")
