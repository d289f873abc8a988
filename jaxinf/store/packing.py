"""Compressed gradients of all layers side by side: a few wide arrays instead of many narrow ones.

A compressed layer is a pytree of leaves with leading axis B. The pytrees of all layers are alike
but for the sizes of leaves. Leaf k of all layers, flattened and laid side by side, makes one array
[B, W_k].
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression.compression import Compression
from jaxinf.core.types import Array, Matrices, PyTree


# Compared by identity, because mappings have no hash and compiled kernels are cached by packing.
@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
  """Where every layer's compressed leaves lie.

  Two of the same compression and shapes are equal, as all else follows from these.

  Attributes:
    compression: of the rows.
    shapes: layer name → ((groups,) d_out, d_in).
    leaves: layer name → the shapes of its leaves without B.
    dtypes: of each leaf, the same for all layers.
    structures: layer name → structure of its pytree.
  """

  compression: Compression
  shapes: Mapping[str, tuple[int, ...]]
  leaves: Mapping[str, tuple[tuple[int, ...], ...]]
  dtypes: tuple[np.dtype, ...]
  structures: Mapping[str, Any]

  @classmethod
  def of(cls, compression: Compression, shapes: Mapping[str, tuple[int, ...]]) -> "Packing":
    """The packing of layers with these matrices; ValueError where their leaves are not alike."""
    found: dict[str, PyTree] = {}
    for name, shape in shapes.items():
      rows = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
      found[name] = jax.eval_shape(
        compression.compress, rows, jax.ShapeDtypeStruct(shape, jnp.float32)
      )
    kinds = {tuple(leaf.dtype for leaf in jax.tree.leaves(tree)) for tree in found.values()}
    if len(kinds) != 1:
      raise ValueError(
        f"{compression.description} keeps some layers otherwise than others, so that they do not "
        "fit side by side: take int4, int8, int16, bfloat16, truncation or None."
      )
    return cls(
      compression=compression,
      shapes=dict(shapes),
      leaves={n: tuple(leaf.shape[1:] for leaf in jax.tree.leaves(t)) for n, t in found.items()},
      dtypes=tuple(np.dtype(dtype) for dtype in kinds.pop()),
      structures={name: jax.tree.structure(tree) for name, tree in found.items()},
    )

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Packing) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)

  @functools.cached_property
  def _key(self) -> tuple:
    return self.compression, tuple(self.shapes.items())

  @property
  def widths(self) -> tuple[int, ...]:
    """W_k of each array."""
    sizes = zip(
      *([int(np.prod(s)) for s in shapes] for shapes in self.leaves.values()), strict=True
    )
    return tuple(map(sum, sizes))

  @property
  def row_bytes(self) -> int:
    """Bytes of one row in all arrays."""
    pairs = zip(self.widths, self.dtypes, strict=True)
    return sum(width * dtype.itemsize for width, dtype in pairs)

  def columns(self, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The columns [begin, end) of each array that hold the layers `names`, and perhaps others."""
    spans = [self._spans[name] for name in names]
    return tuple(
      (min(b for b, _ in leaf), max(e for _, e in leaf)) for leaf in zip(*spans, strict=True)
    )

  def pack(self, rows: Matrices, eigenvalues: Mapping[str, Array]) -> list[jax.Array]:
    """The arrays [B, W_k] of rows [B, (groups,) d_out, d_in] of each layer, compressed."""
    for name, shape in self.shapes.items():
      chex.assert_shape(rows[name], (None, *shape))
    leaves = [
      [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(compressed)]
      for compressed in (
        self.compression.compress(rows[name], eigenvalues[name]) for name in self.shapes
      )
    ]
    return [jnp.concatenate(parts, axis=1) for parts in zip(*leaves, strict=True)]

  def unpack(
    self, arrays: Sequence[Array], eigenvalues: Mapping[str, Array], names: Sequence[str]
  ) -> Matrices:
    """The restored rows of layers `names`, from the `columns` of the arrays that hold them."""
    columns = self.columns(names)
    for array, (begin, end) in zip(arrays, columns, strict=True):
      chex.assert_shape(array, (None, end - begin))
    begins = [begin for begin, _ in columns]
    restored = {}
    for name in names:
      cut = [
        array[:, begin - offset : end - offset].reshape(-1, *shape)
        for array, (begin, end), offset, shape in zip(
          arrays, self._spans[name], begins, self.leaves[name], strict=True
        )
      ]
      compressed = jax.tree.unflatten(self.structures[name], cut)
      restored[name] = self.compression.restore(compressed, eigenvalues[name])
    return restored

  @functools.cached_property
  def _spans(self) -> dict[str, tuple[tuple[int, int], ...]]:
    """Layer name → its columns [begin, end) in each array."""
    ends = [0] * len(self.dtypes)
    spans = {}
    for name, shapes in self.leaves.items():
      begins = ends
      ends = [end + int(np.prod(shape)) for end, shape in zip(ends, shapes, strict=True)]
      spans[name] = tuple(zip(begins, ends, strict=True))
    return spans
