"""An image of the user's own: read with distrust, scored from the store, one at a time.

A file is never trusted: its size in bytes and in pixels is limited before it is decoded, and it is
decoded by the formats of data sets alone (jaxinf/data/pictures.py).
"""

import collections
import dataclasses
import functools
import io
import logging
import math
import secrets
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jaxinf.core.damping import damping_named
from jaxinf.data.dataset import Dataset
from jaxinf.data.pictures import DamagedImage, read_image
from jaxinf.data.resizing import resized
from jaxinf.engine.progress import watched
from jaxinf.runs.run import Run, check_classes
from jaxinf.runs.serving import opened_stores, scores_of_images
from jaxinf.scores.scores import Scores
from jaxinf.store.store import Store

MOST_BYTES = 16 * 2**20  # of a file
MOST_PIXELS = 2**24  # 4,096 × 4,096: 50 MB decoded
_KEPT = 8  # answers in memory, so that going back finds them
_LONGEST_NAME = 100
_STEPS = {"query gradients": "gradients of the image", "store": "products with the store"}
_LOG = logging.getLogger("jaxinf")

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


class Busy(ValueError):
  """Another image is being scored."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is asked about an image.

  Attributes:
    name: of the file, as it is shown.
    label: the number of its class, of models that are given labels; None of others.
    damping: λ, or ρ where the config's is relative; None: the config's.
  """

  name: str
  label: int | None = None
  damping: float | None = None

  def __post_init__(self):
    if self.damping is not None and not 0 < self.damping < math.inf:
      raise ValueError(f"damping must be a positive, finite number; got {self.damping}.")


class StoreScorer:
  """Scores images by the store of a run, which is opened when it is first asked.

  Args:
    run: with a store.
  """

  def __init__(self, run: Run):
    self._run = run

  @property
  def needs_label(self) -> bool:
    """Whether the model is given a label of each image."""
    return self._run.num_classes is not None

  @property
  def damping(self) -> float:
    """The config's."""
    return self._run.config.query.damping

  def image_of(self, content: bytes) -> np.ndarray:
    """uint8 [H, W, C] pixels of an image file, as the model takes them.

    Raises:
      ValueError: the file is no sound image, or the data set is not of images of this kind.
    """
    given = self._run.dataset.conditioning or {}
    if "text" in given:
      raise ValueError(
        "This model is also given text of each image, whose embedding no upload has: score such "
        "images with the stage query and --images=FILE.npz, which may hold it."
      )
    if not self._run.dataset.is_pixels:
      raise ValueError("This run is not of images: score its like with the stage query.")
    return fitted(picture_in(content), self._run.dataset.image_shape)

  def scores(self, image: np.ndarray, asked: Asked, tell: Tell) -> Scores:
    """Scores [1, N] of the store's examples for an image that `image_of` gave.

    Raises:
      ValueError: the label is none of the model's classes, or the store is not this model's.
    """
    conditioning = None
    if self.needs_label:
      if asked.label is None:
        raise ValueError("This model is given a label of each image: choose one for the upload.")
      labels = np.array([asked.label], np.int32)
      check_classes(labels, self._run.dataset, "the upload")
      conditioning = {"labels": labels}
    images = Dataset("upload", image[None], np.array([asked.name]), conditioning=conditioning)
    tell("opening the store", 0, 0)
    stores, config = self._stores, self._run.config.query
    damping = config.damping if asked.damping is None else asked.damping
    tell("compiling", 0, 0)
    with watched(lambda label, done, total, _: tell(_STEPS.get(label, label), done, total)):
      return scores_of_images(stores, images, damping=damping_named(config.damping_kind, damping))

  @functools.cached_property
  def _stores(self) -> list[tuple[Run, Store]]:
    return opened_stores(self._run)


def picture_in(content: bytes) -> np.ndarray:
  """uint8 [H, W, C] pixels of an image file: C = 1 for grey images, 3 for others.

  Raises:
    ValueError: it is too large, damaged, of another format, deeper than 8 bits or transparent.
  """
  if len(content) > MOST_BYTES:
    raise ValueError(f"An upload has at most {MOST_BYTES // 2**20} MiB; got {len(content)} bytes.")
  width, height = _size_of(content)
  if width * height > MOST_PIXELS:
    raise ValueError(
      f"An upload has at most {MOST_PIXELS:,} pixels; this one has {width:,} × {height:,}. Shrink "
      "it first."
    )
  try:
    return read_image(_Upload(content), "", None)
  except DamagedImage as error:
    raise ValueError("The upload is damaged and cannot be decoded: send it again.") from error


def _size_of(content: bytes) -> tuple[int, int]:
  """(width, height) that an image file says it has, without decoding it."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
      with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "BMP")) as file:
        return file.size
  except Image.DecompressionBombError as error:
    raise ValueError(f"An upload has at most {MOST_PIXELS:,} pixels: shrink it first.") from error
  except Exception as error:  # Pillow's decoders raise many types
    raise ValueError(
      "The upload is no image that can be read: send a PNG, JPEG, WebP or BMP file."
    ) from error


def fitted(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A picture cropped, resized and made grey or coloured, as images of a shape (H, W, C) are.

  Raises:
    ValueError: the shape is of no grey or coloured square, and the picture has another one.
  """
  height, width, channels = shape
  if channels == 3 and picture.shape[2] == 1:
    picture = np.repeat(picture, 3, axis=2)
  elif channels == 1 and picture.shape[2] == 3:
    picture = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
  if picture.shape[:2] != (height, width) and height == width:
    picture = resized(picture[None], height)[0]
  if picture.shape != shape:
    raise ValueError(
      f"The model is of images {shape}; the upload is {picture.shape}. Send one of that size."
    )
  return picture


@dataclasses.dataclass
class Upload:
  """An image that was asked about, and how far its answer is.

  Attributes:
    asked: about it.
    image: uint8 [H, W, C].
    state: running, done or failed.
    step: what is being done, or what went wrong.
    done, total: of this step; total 0 where it cannot be counted.
    began: the time, in seconds of time.monotonic.
    seconds: it took; 0 while it runs.
    scores: [1, N], once they are there.
  """

  asked: Asked
  image: np.ndarray
  state: str = "running"
  step: str = "waiting"
  done: int = 0
  total: int = 0
  began: float = dataclasses.field(default_factory=time.monotonic)
  seconds: float = 0.0
  scores: Scores | None = None


class Uploads:
  """Uploads by number, of which one is scored at a time, in a thread of its own.

  Args:
    scorer: what scores them.
  """

  def __init__(self, scorer: Any):
    self._scorer, self._lock = scorer, threading.Lock()
    self._found: collections.OrderedDict[str, Upload] = collections.OrderedDict()

  def begin(self, content: bytes, asked: Asked) -> str:
    """Begins to score an image file; returns the name of the upload.

    Raises:
      Busy: another one is being scored.
      ValueError: the file is refused.
    """
    with self._lock:
      if any(upload.state == "running" for upload in self._found.values()):
        raise Busy("Another image is being scored: wait until it is done.")
      asked = dataclasses.replace(asked, name=asked.name[:_LONGEST_NAME] or "upload")
      upload = Upload(asked, self._scorer.image_of(content))
      name = secrets.token_hex(8)
      self._found[name] = upload
      while len(self._found) > _KEPT:
        self._found.popitem(last=False)
    threading.Thread(target=self._score, args=(upload,), daemon=True).start()
    return name

  def get(self, name: str) -> Upload | None:
    """The upload of that name, None where it is forgotten."""
    return self._found.get(name)

  def _score(self, upload: Upload) -> None:
    def tell(step: str, done: int, total: int) -> None:
      upload.step, upload.done, upload.total = step, done, total

    try:
      upload.scores = self._scorer.scores(upload.image, upload.asked, tell)
      upload.state, upload.step = "done", "done"
    except ValueError as error:
      upload.state, upload.step = "failed", str(error)
    except Exception:
      _LOG.exception("explore: an upload could not be scored")
      upload.state, upload.step = "failed", "It could not be scored: see the terminal of jaxinf."
    upload.seconds = time.monotonic() - upload.began


@dataclasses.dataclass(frozen=True)
class _Upload:
  """The one file that is there."""

  content: bytes

  def read(self, name: str) -> bytes:
    return self.content

  def where(self, name: str) -> str:
    return "The upload"
