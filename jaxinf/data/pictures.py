"""Image files as one array of pixels: from a folder or a tar, decoded at once or when asked for.

A file is never trusted: it is decoded by the four formats of `SUFFIXES` alone, whatever its name,
within Pillow's limit on pixels, and one that cannot be read is an error with its name.
"""

import collections
import io
import logging
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxinf.core.arrays import Rows, fits_memory
from jaxinf.data.dataset import some
from jaxinf.data.resizing import resized

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_GREY_MODES = ("1", "L", "LA", "La")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP_MODES = ("I", "F")  # and "I;16", …: more than eight bits a channel
_MOST_NAMED = 20  # files in a warning
_LOG = logging.getLogger("jaxinf")


class Files(Protocol):
  """Where image files lie."""

  def read(self, name: str) -> bytes:
    """The content of one file."""
    ...

  def where(self, name: str) -> str:
    """What messages call the file."""
    ...


class FolderFiles:
  """Files under a folder; a name is a path within it, with slashes."""

  def __init__(self, root: pathlib.Path):
    self._root = root

  def read(self, name: str) -> bytes:
    return (self._root / name).read_bytes()

  def where(self, name: str) -> str:
    return str(self._root / name)


class DamagedImage(ValueError):
  """An image that cannot be read, with its name; `data.skip_damaged` leaves such images out."""


class Pictures(Rows):
  """Image files as an array [N, H, W, C] of uint8, of which a row is decoded when asked for.

  Args:
    files: where they lie.
    names: [N] of them.
    image_size: they are resized to it, where not None.
    row_shape: (H, W, C) of each; grey images become RGB where C is 3.
  """

  def __init__(
    self,
    files: Files,
    names: Sequence[str],
    *,
    image_size: int | None,
    row_shape: tuple[int, int, int],
  ):
    self._files, self._names, self._image_size = files, names, image_size
    self.shape, self.dtype = (len(names), *row_shape), np.dtype(np.uint8)

  def read(self, rows: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), *self.shape[1:]), np.uint8)
    for n, row in enumerate(rows):
      found[n] = self.image(row)
    return found

  def image(self, row: int) -> np.ndarray:
    """Pixels [H, W, 1] of a grey image, or [H, W, 3]; ValueError if its size is not (H, W)."""
    image = read_image(self._files, self._names[row], self._image_size)
    if image.shape[:2] != self.shape[1:3]:
      raise ValueError(
        f"{self._files.where(self._names[row])}: expected {_size(self.shape[1:3])} pixels as in "
        f"{self._names[0]}, got {_size(image.shape)}. Set data.image_size to crop and resize all "
        "images to one size."
      )
    return image


def read_pictures(
  files: Files, names: Sequence[str], *, image_size: int | None, channels: int | None = None
) -> Any:
  """Images [N, H, W, C], uint8: in memory up to 1 GiB; of more, rows are decoded when asked for.

  Args:
    files: where they lie.
    names: [N] of them, at least one.
    image_size: they are resized to it; None: as they are, all of one size.
    channels: C; None: 1 if all are grey, else 3. Then all are decoded once, to know it.

  Raises:
    ValueError: an image is damaged (DamagedImage), deeper than eight bits, partly transparent or of
      another size than the first. Where rows are decoded when asked for, it comes then.
  """
  size = read_image(files, names[0], image_size).shape[:2]
  rows = Pictures(files, names, image_size=image_size, row_shape=(*size, channels or 3))
  in_memory = fits_memory(rows.shape, rows.dtype)
  if channels is not None:
    return rows[:] if in_memory else rows
  images, most = [], 1
  for row in range(len(names)):
    image = rows.image(row)
    most = max(most, image.shape[2])
    images += [image] if in_memory else []
  if in_memory:
    return np.stack([np.broadcast_to(image, (*size, most)) for image in images])
  return Pictures(files, names, image_size=image_size, row_shape=(*size, most))


def readable(files: Files, names: Sequence[str], where: str) -> list[str]:
  """Those of the images that are not damaged, in their order; a warning names the others.

  Raises:
    ValueError: all are damaged, or one is refused for another reason.
  """
  kept, damaged, error = [], [], None
  for name in names:
    try:
      read_image(files, name, None)
      kept.append(name)
    except DamagedImage as found:
      damaged.append(name)
      error = found
  if not kept:
    raise ValueError(f"{where}: none of {len(names)} images can be read; the last: {error}")
  if damaged:
    _LOG.warning(
      "%s: %d of %d images cannot be read and are left out: %s",
      where, len(damaged), len(names), some(damaged, _MOST_NAMED),
    )  # fmt: skip
  return kept


def image_names(names: Iterable[str], where: str) -> list[str]:
  """Those of the file names, sorted, that are of images; a warning counts the others by suffix."""
  of_images, others = [], collections.Counter[str]()
  for name in names:
    suffix = pathlib.PurePosixPath(name).suffix.lower()
    if suffix in SUFFIXES:
      of_images.append(name)
    else:
      others[suffix or "without suffix"] += 1
  if others:
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    _LOG.warning(
      "%s: %d files are not read (%s): images are %s.",
      where, others.total(), counts, ", ".join(SUFFIXES),
    )  # fmt: skip
  return sorted(of_images)


def read_image(files: Files, name: str, image_size: int | None) -> np.ndarray:
  """Pixels [H, W, C] of one file, uint8: C = 1 for grey images, 3 for others.

  Raises:
    ValueError: the image is damaged (DamagedImage), deeper than eight bits or partly transparent.
  """
  where = files.where(name)
  image = _opened(files, name)
  if image.mode.startswith(_DEEP_MODES):
    raise ValueError(
      f"{where}: expected 8 bits a channel, got mode {image.mode!r}. Convert the file to 8 bits."
    )
  may_be_transparent = image.mode in _ALPHA_MODES or "transparency" in image.info
  if may_be_transparent and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
    raise ValueError(
      f"{where}: expected an opaque image, got transparent pixels. Flatten it onto a background."
    )
  pixels = np.asarray(image.convert("L" if image.mode in _GREY_MODES else "RGB"))
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  return pixels if image_size is None else resized(pixels[None], image_size)[0]


def _opened(files: Files, name: str) -> Image.Image:
  """One image, upright as viewers show it, with all of its pixels."""
  where = files.where(name)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(files.read(name)), formats=_FORMATS) as file:
        return ImageOps.exif_transpose(file)
  except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
    raise DamagedImage(
      f"{where}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against "
      f"decompression bombs, got: {error} Shrink or remove the file, or leave it out with "
      "data.skip_damaged."
    ) from error
  except Exception as error:  # Pillow's decoders raise many types
    unknown = isinstance(error, UnidentifiedImageError)  # whose text is of an object in memory
    reason = f"none of {', '.join(_FORMATS)}" if unknown else str(error) or repr(error)
    raise DamagedImage(
      f"{where}: expected a readable image, got: {reason}. Mend or remove the file, or leave it "
      "out with data.skip_damaged."
    ) from error


def _size(shape: Sequence[int]) -> str:
  return f"{shape[1]} × {shape[0]}"
