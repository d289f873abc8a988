"""A data set: images, the ids under which their scores are reported, and what goes with them.

Loaders (the other modules of this package) make one `Dataset` from a `DataConfig`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxinf.core.arrays import blocks, chosen, fingerprint
from jaxinf.core.checks import checked_count, checked_seed
from jaxinf.core.examples import Examples, checked_conditioning, checked_data, checked_ids

# Fields of DataConfig that only some loaders read, with the values that ask for nothing.
_OPTIONS = {"data_dir": None, "path": None, "skip_damaged": False}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data set; the config's section `data`."""

  name: str = "cifar10"  # one of jaxinf.data.DATASETS
  data_dir: str | None = None  # TFDS folder; None: TFDS's default
  path: str | None = None  # .npz file, image folder or tar, for data sets from files of one's own
  image_size: int | None = None  # images are cropped and resized to it; None: as they are
  skip_damaged: bool = False  # images that cannot be read are left out, and named in a warning
  conditioning: tuple[str, ...] = ()  # what models are also given: labels, text
  captions: str | None = None  # file or folder of captions and their embeddings
  num_examples: int | None = None  # a seeded subset of that many; None: all
  seed: int = 0  # of subsets


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """N labelled or unlabelled images with stable ids, checked when it is made.

  Attributes:
    name: what reports call the data set.
    images: [N, …], as the data of `Examples`: pixels, latents, series, vectors or volumes, in
      memory or on disk.
    ids: [N] unique strings; an example keeps its id whatever else is loaded beside it.
    labels: [N] integers, or None.
    label_names: name of each label 0, 1, …; empty where labels have no names.
    random_flip: whether training may mirror images left to right.
    conditioning: name → array [N, …] of numbers, what a model is also given of each example; None
      where it is given nothing else.
    captions: [N] strings that reports show, or None.

  Raises:
    ValueError: anything above does not hold.
  """

  name: str
  images: Any
  ids: np.ndarray
  labels: np.ndarray | None = None
  label_names: tuple[str, ...] = ()
  random_flip: bool = False
  conditioning: Mapping[str, Any] | None = None
  captions: np.ndarray | None = None

  def __post_init__(self):
    object.__setattr__(self, "images", checked_data(self.images))
    if self.ids is None or np.asarray(self.ids).dtype.kind != "U":
      raise ValueError(
        f"ids must be strings, one an example; got {getattr(self.ids, 'dtype', type(self.ids))}. "
        "Convert with np.array([str(i) for i in ids])."
      )
    checked_ids(self.ids, len(self))
    if self.labels is not None:
      _check_labels(self.labels, self.label_names, len(self))
    if self.conditioning is not None:
      given = checked_conditioning(dict(self.conditioning), len(self))
      object.__setattr__(self, "conditioning", given)
    if self.captions is not None:
      _check_captions(self.captions, len(self))

  @functools.cached_property
  def examples(self) -> Examples:
    """The training examples; their groups are the labels."""
    return Examples(self.images, self.ids, self.conditioning, self.labels, self.random_flip)

  def __len__(self) -> int:
    return self.images.shape[0]

  @property
  def image_shape(self) -> tuple[int, ...]:
    """The shape of an example, (H, W, C) of images."""
    return tuple(self.images.shape[1:])

  @functools.cached_property
  def is_pixels(self) -> bool:
    """Whether the data are pixels: uint8, or images [N, H, W, C] of numbers in [-1, 1].

    Up to 1.001, because that is the next float16 above 1.
    """
    if self.images.dtype == np.uint8:
      return True
    return len(self.images.shape) == 4 and all(abs(x).max() <= 1.001 for x in blocks(self.images))

  def take(self, indices: Iterable[int] | np.ndarray) -> "Dataset":
    """The examples at `indices`, in that order; each in [0, N) and named at most once.

    Arrays on disk of which more than 1 GiB is taken stay there.
    """
    indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
    if indices.ndim != 1 or len(indices) == 0 or indices.dtype.kind not in "iu":
      raise ValueError(
        "indices must be a non-empty list of integers; "
        f"got shape {indices.shape}, dtype {indices.dtype}. Use np.flatnonzero on a mask."
      )
    if indices.min() < 0 or indices.max() >= len(self):
      raise ValueError(
        f"indices must lie in 0…{len(self) - 1}; got {indices.min()}…{indices.max()}."
      )
    given = self.conditioning
    return dataclasses.replace(
      self,
      images=chosen(self.images, indices),
      ids=self.ids[indices],
      labels=None if self.labels is None else self.labels[indices],
      conditioning=given and {name: chosen(array, indices) for name, array in given.items()},
      captions=None if self.captions is None else self.captions[indices],
    )

  def positions(self, ids: Iterable[str]) -> np.ndarray:
    """[len(ids)] integers: where the examples with these ids stand; unknown ids are an error."""
    position_of = {example_id: n for n, example_id in enumerate(self.ids.tolist())}
    ids = list(ids)
    unknown = [example_id for example_id in ids if example_id not in position_of]
    if unknown:
      raise ValueError(
        f"{len(unknown)} of {len(ids)} ids are not in data set {self.name!r}: {some(unknown)}. "
        f"Its ids look like {some(self.ids)}."
      )
    return np.array([position_of[example_id] for example_id in ids], np.int64)

  def select(self, ids: Iterable[str]) -> "Dataset":
    """The examples with these ids, in that order; unknown ids are an error."""
    return self.take(self.positions(ids))

  def sample(self, num_examples: int, seed: int) -> "Dataset":
    """A random subset with the labels' proportions; ValueError unless 1 ≤ num_examples ≤ N."""
    num_examples, seed = checked_count(num_examples, "num_examples"), checked_seed(seed)
    if num_examples > len(self):
      raise ValueError(
        f"num_examples must lie in 1…{len(self)}, the size of data set {self.name!r}; "
        f"got {num_examples}."
      )
    return self.take(
      stratified_positions(self.ids, self.labels, num_examples=num_examples, seed=seed)
    )

  def fingerprint(self) -> str:
    """Hex SHA-256 of pixels, shape, dtype and ids, in order, and of conditioning if there is any.

    Name, labels and captions are not part of it.
    """
    header = [self.images.shape, np.dtype(self.images.dtype).str, self.ids.tolist()]
    digest = hashlib.sha256(json.dumps(header).encode())
    for block in blocks(self.images):
      digest.update(block.tobytes())
    if self.conditioning is not None:
      digest.update(fingerprint(self.conditioning).encode())
    return digest.hexdigest()


def stratified_positions(
  ids: np.ndarray, labels: np.ndarray | None, *, num_examples: int, seed: int
) -> np.ndarray:
  """Positions [num_examples], ascending, of a random subset with the labels' proportions.

  Within a class examples are ordered by SHA-256(seed, id). Classes share the places by
  Sainte-Laguë's rule: the r-th of the n examples of a class (r from 0) has the turn (r + ½) / n,
  and the earliest turns win. So the subset does not depend on the order of the examples or the
  version of a random generator, and a larger subset of the same seed contains a smaller one.

  Args:
    ids: [N] unique strings.
    labels: [N] integers; None: one class.
    num_examples: 1 to N.
    seed: of the order within classes.
  """
  digests = [hashlib.sha256(json.dumps([seed, i]).encode()).digest() for i in ids.tolist()]
  shuffled = np.array(sorted(range(len(ids)), key=digests.__getitem__))
  classes = np.zeros(len(ids), int) if labels is None else labels[shuffled]
  turns = np.empty(len(ids))
  for label in np.unique(classes):
    members = np.flatnonzero(classes == label)
    turns[members] = (np.arange(len(members)) + 0.5) / len(members)
  return np.sort(shuffled[np.argsort(turns, kind="stable")[:num_examples]])


def check_options(config: DataConfig, *, reads: tuple[str, ...] = ()) -> None:
  """Raises ValueError if an option is set that the loader of `config.name` does not read."""
  unread = [f for f, unset in _OPTIONS.items() if f not in reads and getattr(config, f) != unset]
  if unread:
    raise ValueError(
      f"data set {config.name!r} does not read data.{', data.'.join(unread)}; "
      f"got {', '.join(repr(getattr(config, f)) for f in unread)}. "
      f"Set to {', '.join(repr(_OPTIONS[f]) for f in unread)}, or check data.name."
    )


def _check_labels(labels: np.ndarray, label_names: tuple[str, ...], num_images: int) -> None:
  is_integer = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
  if not is_integer or labels.shape != (num_images,):
    raise ValueError(
      f"labels must be a NumPy array of {num_images} integers, one an image, or None; "
      f"got shape {np.shape(labels)}, {getattr(labels, 'dtype', type(labels).__name__)}. "
      "Number the classes 0, 1, … and name them in label_names."
    )
  if label_names and (labels.min() < 0 or labels.max() >= len(label_names)):
    raise ValueError(
      f"labels must lie in 0…{len(label_names) - 1}, as there are {len(label_names)} label_names; "
      f"got {labels.min()}…{labels.max()}: labels without a class. Name all classes, or mend them."
    )


def _check_captions(captions: np.ndarray, num_images: int) -> None:
  kind = getattr(getattr(captions, "dtype", None), "kind", type(captions).__name__)
  if kind != "U" or captions.shape != (num_images,):
    raise ValueError(
      f"captions must be a NumPy array of {num_images} strings, one an image, or None; "
      f"got shape {np.shape(captions)}, {getattr(captions, 'dtype', kind)}. Use np.array(list)."
    )


def some(ids: Iterable[str], limit: int = 3) -> str:
  """The first few ids, for a message."""
  ids = [str(example_id) for example_id in ids]
  return ", ".join(map(repr, ids[:limit])) + ", …" * (len(ids) > limit)
