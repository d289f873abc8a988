"""Examples: queries and training sets alike, and the only place where inputs are checked."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.core.arrays import as_array, blocks, converted, is_floating, read_rows
from jaxinf.core.augmentation import Augmentation, ConditioningDropout, Constants
from jaxinf.core.moments import LatentForm, Moments
from jaxinf.core.random import example_numbers
from jaxinf.core.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Examples:
  """What a model was trained on, or what is to be explained.

  Attributes:
    data: [N, …] pixels [N, H, W, C] (uint8, which is mapped to [-1, 1], or floating-point numbers
      as the model takes them), latents, series [N, L, C], vectors [N, D] or volumes. Measurements
      of sampling trajectories take [N, K, …], K states each. Any array that gives rows: NumPy's, a
      memory map, zarr's or h5py's. It is read a few rows at a time and never copied as a whole.
      Or `Moments` of latents.
    ids: [N] different integers in [0, 2³²) or strings, which random keys follow: an example keeps
      its draws whatever else is beside it. 0 … N − 1 where None.
    conditioning: pytree of arrays [N, …], what the model is also given, such as labels [N] or text
      embeddings [N, L, E]; None where it takes nothing else.
    groups: [N] what each example belongs to, such as an artist or a class; `Scores.by_group` sums
      over them.
    random_flip: whether training mirrored images left to right at random. It belongs to training
      examples; queries are measured as they are.
    conditioning_dropout: the share of draws in which training left the conditioning out, as it does
      for classifier-free guidance; likewise of training examples only.
    null_conditioning: one row of the conditioning, what the model was given instead.

  Raises:
    ValueError: data are no array [N, …] of finite numbers, or the rest does not fit them.

  Examples:
    >>> pixels = np.zeros((3, 8, 8, 1), np.uint8)
    >>> train = Examples(pixels, ids=["cat", "dog", "fox"], groups=["ada", "ben", "ada"])
    >>> train
    Examples(3 × 8 × 8 × 1 uint8)
    >>> train.take(np.array([2])).ids.tolist()
    ['fox']
    >>> Examples(pixels.astype(np.int64))
    Traceback (most recent call last):
      ...
    ValueError: Data must be uint8 pixels or floating-point numbers; got int64. ...
  """

  data: Any
  ids: Any = None
  conditioning: PyTree = None
  groups: Any = None
  random_flip: bool = False
  conditioning_dropout: float = 0.0
  null_conditioning: PyTree = None

  def __post_init__(self):
    set_field = lambda name, value: object.__setattr__(self, name, value)
    set_field("data", checked_data(self.data))
    set_field("ids", checked_ids(self.ids, len(self)))
    set_field("conditioning", checked_conditioning(self.conditioning, len(self)))
    if self.groups is not None:
      groups = np.asarray(self.groups)
      if groups.shape != (len(self),):
        raise ValueError(
          f"groups must say of each of the {len(self)} examples whose it is; got {groups.shape}."
        )
      set_field("groups", groups)
    if self.random_flip:
      self._check_flips()
    set_field("null_conditioning", self._checked_null())

  def __len__(self) -> int:
    return self.data.shape[0]

  def __repr__(self) -> str:
    shape = " × ".join(map(str, (len(self), *self.shape)))
    given = "" if self.conditioning is None else ", with conditioning"
    kind = "moments" if self.latents else np.dtype(self.data.dtype)
    return f"Examples({shape} {kind}{given})"

  @property
  def latents(self) -> LatentForm | None:
    """How rows become latents where the data are `Moments`; None otherwise."""
    return self.data.form if isinstance(self.data, Moments) else None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of an example: of its latent, where the data are moments."""
    return self.augmentation.shape(tuple(self.data.shape[1:]))

  @functools.cached_property
  def augmentation(self) -> Augmentation:
    """What each draw does to an example."""
    dropout = None
    if self.conditioning_dropout:
      null = jax.tree.map(
        lambda x, struct: np.asarray(x, struct.dtype),
        self.null_conditioning,
        self.conditioning_structs,
      )
      dropout = ConditioningDropout(float(self.conditioning_dropout), Constants(null))
    return Augmentation(bool(self.random_flip), self.latents, dropout)

  @functools.cached_property
  def numbers(self) -> np.ndarray:
    """[N] uint32 numbers that stand for the ids in random keys."""
    return example_numbers(self.ids)

  def take(self, rows: np.ndarray) -> "Examples":
    """The examples with these row numbers, in memory."""
    rows = np.asarray(rows)
    data = read_rows(self.data, rows)
    return Examples(
      data if self.latents is None else Moments(data, **dataclasses.asdict(self.latents)),
      self.ids[rows],
      jax.tree.map(lambda leaf: read_rows(leaf, rows), self.conditioning),
      None if self.groups is None else self.groups[rows],
      self.random_flip,
      self.conditioning_dropout,
      self.null_conditioning,
    )

  def arrays(self, name: str) -> dict[str, Any]:
    """What results depend on, by names that begin with `name`, for a fingerprint."""
    leaves = jax.tree.leaves(self.conditioning)
    found = {f"{name}_data": self.data, f"{name}_ids": self.ids}
    found |= {f"{name}_conditioning_{i}": leaf for i, leaf in enumerate(leaves)}
    found |= {f"{name}_flips": np.ones(1, bool)} if self.random_flip else {}
    if self.latents is not None:
      found[f"{name}_latents"] = np.array(dataclasses.astuple(self.latents), np.float64)
    if self.conditioning_dropout:
      nulls = jax.tree.leaves(self.null_conditioning)
      found[f"{name}_dropout"] = np.array([self.conditioning_dropout])
      found |= {f"{name}_null_{i}": np.asarray(null)[None] for i, null in enumerate(nulls)}
    return found

  @property
  def conditioning_structs(self) -> PyTree:
    """Shape and dtype of a row of each conditioning array."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(tuple(x.shape[1:]), np.dtype(x.dtype).newbyteorder("=")),
      self.conditioning,
    )

  def _check_flips(self) -> None:
    shape = tuple(self.data.shape)
    if self.latents is None and len(shape) != 4:
      raise ValueError(
        f"random_flip mirrors images [N, H, W, C]; the data have shape {shape}. Leave it out."
      )
    if self.latents is not None and shape[1] == 1:
      raise ValueError(
        "random_flip mirrors pixels before they are encoded: the moments of the mirror images are "
        "missing. Encode these too (Moments.of(…, mirrored=…)), or leave random_flip out."
      )

  def _checked_null(self) -> PyTree:
    """The null conditioning as a pytree of arrays; ValueError unless it and the dropout fit."""
    rate, null = self.conditioning_dropout, self.null_conditioning
    if not (isinstance(rate, int | float) and 0 <= rate < 1):
      raise ValueError(f"conditioning_dropout must be a share in [0, 1); got {rate!r}.")
    if null is None:
      if rate:
        raise ValueError(
          "conditioning_dropout needs null_conditioning: one row of what the model is given where "
          "the conditioning is left out."
        )
      return None
    null = jax.tree.map(np.asarray, null)
    rows = jax.tree.map(lambda x: x[None], null)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.bool_), null)
    own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.bool_), self.conditioning_structs)
    if structs != own:
      raise ValueError(
        "null_conditioning must be like one row of the conditioning; got rows "
        f"{jax.tree.map(np.shape, null)}, and {self.conditioning_structs} of the conditioning."
      )
    checked_conditioning(rows, 1, "null_conditioning")
    return null


def check_alike(queries: Examples, train: Examples, axes: int = 0) -> None:
  """Raises ValueError unless queries and training examples are inputs of the same network.

  Args:
    queries, train: both.
    axes: how many axes queries have more, for states of trajectories.
  """
  if queries.shape[axes:] != train.shape:
    raise ValueError(
      f"Queries of shape {queries.shape} do not match training examples of shape "
      f"{train.shape}" + (", which have several states each." if axes else ".")
    )
  ours, theirs = queries.conditioning_structs, train.conditioning_structs
  if ours != theirs:
    raise ValueError(
      "The conditioning of queries and of training examples must be None or pytrees of one form, "
      f"the same in shape and type of every row; got rows {ours} and {theirs}."
    )
  check_queries(queries)


def check_queries(queries: Examples) -> None:
  """Raises ValueError where queries have what belongs to training."""
  if queries.latents is not None:
    raise ValueError(
      "A query is measured as it is: give its latents, such as the scaled mode of its posterior, "
      "and no moments."
    )
  for name in ("random_flip", "conditioning_dropout"):
    if getattr(queries, name):
      raise ValueError(f"A query is measured as it is: leave {name} out of the queries.")


def checked_data(data: Any) -> Any:
  """Data as an array [N, …] of uint8 or finite floating-point numbers; ValueError otherwise."""
  data = as_array(data)
  shape, dtype = tuple(data.shape), np.dtype(data.dtype)
  if len(shape) < 2 or 0 in shape:
    raise ValueError(
      "Examples need data [N, …], one row an example and at least one number in it; got shape "
      f"{shape}. A single image needs a first axis: image[None]."
    )
  if dtype != np.uint8 and not is_floating(dtype):
    raise ValueError(
      f"Data must be uint8 pixels or floating-point numbers; got {dtype}. Cast pixels in 0…255 "
      "with .astype('uint8'), and other numbers with .astype('float32')."
    )
  if dtype == np.uint8 and len(shape) == 4 and shape[1] in (1, 3) and shape[3] > 4:
    raise ValueError(
      f"Images are [N, H, W, C]; those of shape {shape} seem to have their channels first. Turn "
      "them with .transpose(0, 2, 3, 1)."
    )
  if dtype != np.uint8:
    _check_finite(data, "Data")
  return data


def checked_ids(ids: Any, num: int, name: str = "ids") -> np.ndarray:
  """`num` different ids, 0 … num − 1 where None; ValueError that calls them `name` otherwise."""
  if ids is None:
    return np.arange(num)
  kinds = {"text" if isinstance(i, str) else "numbers" for i in _plain(ids)}
  if len(kinds) > 1:
    raise ValueError(f"{name} must all be integers or all be strings; got both.")
  ids = np.asarray(ids)
  if ids.shape != (num,):
    raise ValueError(f"{name} must be {num} different ids, one an example; got shape {ids.shape}.")
  example_numbers(ids)
  values, counts = np.unique(ids, return_counts=True)
  if len(values) < num:
    repeated = [repr(value) for value in values[counts > 1].tolist()]
    some = ", ".join(repeated[:3]) + (", …" if len(repeated) > 3 else "")
    raise ValueError(f"{name} must be different; got more than once: {some}.")
  return ids


def checked_conditioning(conditioning: PyTree, num: int, name: str = "conditioning") -> PyTree:
  """Conditioning as arrays [num, …] of numbers; None stays None.

  Integers must fit in 32 bits, as JAX keeps them.

  Raises:
    ValueError: calls it `name`; a leaf has another leading axis than `num`, is not of numbers, or
      not finite, or has integers beyond 32 bits; or there are no leaves.
  """
  if conditioning is not None and not jax.tree.leaves(conditioning):
    raise ValueError(f"{name} holds no arrays: pass None for a model without conditioning.")
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _checked_leaf(leaf, num, name + jax.tree_util.keystr(path)), conditioning
  )


def _checked_leaf(leaf: Any, num: int, name: str) -> Any:
  leaf = as_array(leaf)
  shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
  if shape[:1] != (num,):
    raise ValueError(
      f"{name} must be an array with one row for each of the {num} examples; got shape {shape}."
    )
  if is_floating(dtype):
    _check_finite(leaf, name)
    kept = np.dtype(np.float32) if dtype.itemsize == 8 else dtype.newbyteorder("=")
  elif dtype.kind in "biu":
    kept = dtype.newbyteorder("=") if dtype.itemsize <= 4 else np.dtype(np.int32)
    if kept != dtype and not all(np.array_equal(x.astype(kept), x) for x in blocks(leaf)):
      raise ValueError(f"{name} has integers that do not fit {kept}.")
  else:
    raise ValueError(f"{name} must hold numbers or booleans; got {dtype}.")
  return leaf if kept == dtype else converted(leaf, kept)


def _check_finite(array: Any, name: str) -> None:
  row = 0
  for block in blocks(array):
    with np.errstate(over="ignore"):  # too large for float32 is not finite
      single = block.reshape(len(block), -1).astype(np.float32)
    bad = ~np.isfinite(single).all(axis=1)
    if bad.any():
      raise ValueError(f"{name} must be finite; row {row + int(np.argmax(bad))} is not.")
    row += len(block)


def _plain(ids: Any) -> Sequence[Any]:
  """The ids as Python objects, where they are no array of one type."""
  return ids if isinstance(ids, list | tuple) else ()
