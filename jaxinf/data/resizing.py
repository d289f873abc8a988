"""Images at another size, in one way for every data set."""

from typing import Any

import numpy as np
from PIL import Image


def resized(images: Any, size: int) -> Any:
  """Images [N, H, W, C] as [N, size, size, C], of the same dtype.

  Their central square is taken. Where its side is a multiple k · size, a pixel is the mean of k × k
  pixels, computed in float32 and for uint8 rounded to the nearest, halves to even. Otherwise, and
  where images become larger, uint8 is resized by Lanczos' filter, and floating-point numbers by the
  bilinear one, which does not leave their range. Images that have the size stay as they are, on
  disk if they lie there.

  Raises:
    ValueError: data that are no images [N, H, W, C].
  """
  if len(images.shape) != 4:
    raise ValueError(
      f"data.image_size resizes images [N, H, W, C]; the data have shape {tuple(images.shape)}. "
      "Set it to None."
    )
  height, width = images.shape[1:3]
  if height == width == size:
    return images
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = np.asarray(images)[:, top : top + side, left : left + side]
  return _averaged(square, size) if side % size == 0 else _interpolated(square, size)


def _averaged(square: np.ndarray, size: int) -> np.ndarray:
  """Means of k × k pixels of images [N, k · size, k · size, C]."""
  num, side, _, channels = square.shape
  k = side // size
  # Rows first, then columns: each sum runs over what lies together in memory.
  rows = square.reshape(num, size, k, side * channels).sum(axis=2, dtype=np.float32)
  means = rows.reshape(num, size, size, k, channels).sum(axis=3) / np.float32(k * k)
  return (np.round(means) if square.dtype == np.uint8 else means).astype(square.dtype)


def _interpolated(square: np.ndarray, size: int) -> np.ndarray:
  """Images [N, S, S, C] by Pillow's filters, channel by channel."""
  exact = square.dtype == np.uint8
  kind = Image.Resampling.LANCZOS if exact else Image.Resampling.BILINEAR
  found = np.empty((len(square), size, size, square.shape[3]), square.dtype)
  for n, image in enumerate(square):
    for c in range(image.shape[2]):
      channel = image[..., c] if exact else image[..., c].astype(np.float32)
      found[n, ..., c] = np.asarray(Image.fromarray(channel).resize((size, size), kind))
  return found
