"""Pictures as PNG, made when they are first asked for and kept in memory."""

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxinf.core.arrays import read_rows
from jaxinf.explorer.findings import NotFound
from jaxinf.report.pictures import picture_of, pillow_image

THUMBNAIL = 128  # pixels, the longest side
_KEPT = 4096  # thumbnails in memory: some 20 KB each at most
_KEPT_WHOLE = 32


class Thumbnails:
  """The pictures of several arrays.

  Args:
    arrays: kind of picture → examples [n, …].
  """

  def __init__(self, arrays: Mapping[str, Any]):
    self._arrays = arrays
    self.small = functools.lru_cache(_KEPT)(functools.partial(self._png, THUMBNAIL))
    self.whole = functools.lru_cache(_KEPT_WHOLE)(functools.partial(self._png, None))

  def _png(self, side: int | None, kind: str, position: int) -> bytes:
    """PNG of one example, at most `side` pixels wide and high; NotFound where it has none."""
    array = self._arrays.get(kind)
    if array is None or not 0 <= position < len(array):
      raise NotFound(f"There is no {kind} picture {position}.")
    picture = picture_of(read_rows(array, np.array([position]))[0])
    if picture is None:
      raise NotFound("These examples have no pictures: they are named by their ids.")
    return png_of(picture, side)


def png_of(picture: np.ndarray, side: int | None) -> bytes:
  """PNG of a picture uint8 [H, W, C], made smaller where a side is longer than `side` pixels."""
  image = pillow_image(picture)
  if side is not None and max(image.size) > side:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()
