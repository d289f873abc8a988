"""A data set in memory: images, and the ids under which their scores are reported.

Loaders (the other modules of this package) make one `Dataset` from a `DataConfig`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

import numpy as np

# Fields of DataConfig that only some loaders read.
_OPTIONS = ("data_dir", "path", "image_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data set; the config's section `data`."""

  name: str = "cifar10"  # one of jaxinf.data.DATASETS
  data_dir: str | None = None  # TFDS folder; None: TFDS's default
  path: str | None = None  # .npz file or image folder, for `arrays` and `folder`
  image_size: int | None = None  # `folder` crops and resizes to it; None: images as they are
  num_examples: int | None = None  # a seeded subset of that many; None: all
  seed: int = 0  # of subsets


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """N labelled or unlabelled images with stable ids, checked when it is made.

  Attributes:
    name: what reports call the data set.
    images: [N, H, W, C] with 1 to 4 channels, uint8 in 0…255 or float32 in [-1, 1].
    ids: [N] unique strings; an example keeps its id whatever else is loaded beside it.
    labels: [N] integers, or None.
    label_names: name of each label 0, 1, …; empty where labels have no names.
    random_flip: whether training may mirror images left to right.

  Raises:
    ValueError: anything above does not hold.
  """

  name: str
  images: np.ndarray
  ids: np.ndarray
  labels: np.ndarray | None = None
  label_names: tuple[str, ...] = ()
  random_flip: bool = False

  def __post_init__(self):
    _check_images(self.images)
    _check_ids(self.ids, len(self.images))
    if self.labels is not None:
      _check_labels(self.labels, self.label_names, len(self.images))

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    height, width, channels = self.images.shape[1:]
    return height, width, channels

  def take(self, indices: Iterable[int] | np.ndarray) -> "Dataset":
    """The examples at `indices`, in that order; each in [0, N) and named at most once."""
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
    return dataclasses.replace(
      self,
      images=self.images[indices],
      ids=self.ids[indices],
      labels=None if self.labels is None else self.labels[indices],
    )

  def positions(self, ids: Iterable[str]) -> np.ndarray:
    """[len(ids)] integers: where the examples with these ids stand; unknown ids are an error."""
    position_of = {example_id: n for n, example_id in enumerate(self.ids.tolist())}
    ids = list(ids)
    unknown = [example_id for example_id in ids if example_id not in position_of]
    if unknown:
      raise ValueError(
        f"{len(unknown)} of {len(ids)} ids are not in data set {self.name!r}: {_some(unknown)}. "
        f"Its ids look like {_some(self.ids)}."
      )
    return np.array([position_of[example_id] for example_id in ids], np.int64)

  def select(self, ids: Iterable[str]) -> "Dataset":
    """The examples with these ids, in that order; unknown ids are an error."""
    return self.take(self.positions(ids))

  def sample(self, num_examples: int, seed: int) -> "Dataset":
    """A random subset with the labels' proportions; ValueError unless 1 ≤ num_examples ≤ N."""
    if not 1 <= num_examples <= len(self):
      raise ValueError(
        f"The number of examples must lie in 1…{len(self)}, the size of data set {self.name!r}; "
        f"got {num_examples}."
      )
    return self.take(
      stratified_positions(self.ids, self.labels, num_examples=num_examples, seed=seed)
    )

  def float_images(self, indices: Iterable[int] | np.ndarray | None = None) -> np.ndarray:
    """A float32 copy [n, H, W, C] in [-1, 1] of all images, or of those at `indices`.

    uint8 values x become x / 127.5 − 1.
    """
    chosen = self if indices is None else self.take(indices)
    images = chosen.images.astype(np.float32)
    if self.images.dtype == np.uint8:
      images /= np.float32(127.5)  # in place: a float copy of CIFAR-10 is 0.6 GB
      images -= np.float32(1)
    return images

  def fingerprint(self) -> str:
    """Hex SHA-256 of pixels, shape, dtype and ids, in order; name and labels are not part of it."""
    header = [self.images.shape, self.images.dtype.str, self.ids.tolist()]
    digest = hashlib.sha256(json.dumps(header).encode())
    digest.update(np.ascontiguousarray(self.images).data.cast("B"))
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
  unread = [f for f in _OPTIONS if f not in reads and getattr(config, f) is not None]
  if unread:
    raise ValueError(
      f"data set {config.name!r} does not read data.{', data.'.join(unread)}; "
      f"got {', '.join(repr(getattr(config, f)) for f in unread)}. Set to None, or check data.name."
    )


def _check_images(images: np.ndarray) -> None:
  if not isinstance(images, np.ndarray) or images.ndim != 4:
    raise ValueError(
      "images must be a NumPy array [N, H, W, C]; "
      f"got {type(images).__name__} of shape {np.shape(images)}. "
      "Give one-channel images a last axis with images[..., None]."
    )
  if images.dtype not in (np.uint8, np.float32):
    raise ValueError(
      f"images must be uint8 in 0…255 or float32 in [-1, 1]; got {images.dtype}. "
      "Bring them into one of these ranges, then convert with images.astype(np.float32)."
    )
  if images.size == 0:
    raise ValueError(f"images must hold at least one image and pixel; got shape {images.shape}.")
  if images.shape[3] > 4:
    raise ValueError(
      f"images must be [N, H, W, C] with 1 to 4 channels; got shape {images.shape}. "
      "Move the channels last with images.transpose(0, 2, 3, 1)."
    )
  if images.dtype == np.float32:
    low, high = images.min(), images.max()  # NaN where any pixel is
    if not np.isfinite([low, high]).all():
      raise ValueError("images must be finite; got NaN or infinite pixels. Mend or drop them.")
    if low < -1 or high > 1:
      raise ValueError(
        f"float32 images must lie in [-1, 1]; got {low:g}…{high:g}. "
        "Rescale them (2 * x - 1 for 0…1, x / 127.5 - 1 for 0…255) or pass uint8."
      )


def _check_ids(ids: np.ndarray, num_images: int) -> None:
  if not isinstance(ids, np.ndarray) or ids.dtype.kind != "U" or ids.shape != (num_images,):
    raise ValueError(
      f"ids must be a NumPy array of {num_images} strings, one an image; "
      f"got shape {np.shape(ids)}, {getattr(ids, 'dtype', type(ids).__name__)}. "
      "Convert with np.array([str(i) for i in ids])."
    )
  values, counts = np.unique(ids, return_counts=True)
  if len(values) < len(ids):
    repeated = _some(values[counts > 1])
    raise ValueError(f"ids must be unique; got {repeated} more than once. Rename or drop them.")


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
      f"got {labels.min()}…{labels.max()}."
    )


def _some(ids: Iterable[str], limit: int = 3) -> str:
  """The first few ids, for a message."""
  ids = [str(example_id) for example_id in ids]
  return ", ".join(map(repr, ids[:limit])) + ", …" * (len(ids) > limit)
