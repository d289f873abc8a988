"""Pictures of examples: images as they are, series and vectors as lines; PNG; sorted scores as SVG.

An example has a picture where it is [H, W, C] pixels (an image), [L, C] (a series, C lines over its
steps) or [D] (a vector, one line). Latents of other channel counts and volumes have none.
"""

import io

import numpy as np
from PIL import Image, ImageDraw

from jaxinf.report.canvas import PALETTE

# Float pixels lie in [-1, 1]; samplers that do not clip overshoot a little. Latents, whose standard
# deviation is about 1, go further, and would be nonsense as colours.
_BRIGHTEST = 1.5
_PLOT = (168, 112)  # pixels, width and height of a picture made of lines
_OVERSAMPLING = 3  # Pillow draws lines without smoothing; they are drawn larger, then reduced
_THICK = 5  # pixels of the larger drawing
_MOST_POINTS = 500  # of a line


def picture_of(example: np.ndarray) -> np.ndarray | None:
  """uint8 [H, W, C] picture of an example, C from 1 to 4; None where it has none.

  Lines have a scale of their own, from the least to the greatest number of the example. Examples
  with NaN or infinite numbers have no picture.
  """
  example = np.asarray(example)
  if not np.isfinite(example.astype(np.float32)).all():
    return None
  if is_image(example):
    return _pixels(example)
  if example.ndim in (1, 2):
    return _lines(example.astype(np.float32).reshape(len(example), -1))
  return None


def is_image(example: np.ndarray) -> bool:
  """Whether an example is [H, W, C] pixels.

  uint8 has 1 to 4 channels, the second or fourth being alpha; floats have 1, 3 or 4, in [-1, 1].
  """
  if example.ndim != 3:
    return False
  if example.dtype == np.uint8:
    return 1 <= example.shape[2] <= 4
  return example.shape[2] in (1, 3, 4) and bool(np.abs(example).max() <= _BRIGHTEST)


def how_shown(example: np.ndarray) -> str:
  """A sentence on how examples like this one are shown; nothing for images."""
  example = np.asarray(example)
  if is_image(example):
    return ""
  shape = " × ".join(map(str, example.shape)) or "one number"
  if example.ndim == 1:
    return f"The examples are vectors ({shape}): each is drawn as a line, on a scale of its own."
  if example.ndim == 2:
    return (
      f"The examples are series ({shape}): each is drawn as one line for every channel, on a scale "
      "of its own."
    )
  return (
    f"The examples ({shape}) are neither images of 1, 3 or 4 channels nor series or vectors: they "
    "have no picture here and are named by their ids."
  )


def png_bytes(image: np.ndarray) -> bytes:
  """An image [H, W, C] as PNG of its own size.

  uint8 pixels are kept; float pixels x in [-1, 1] become round((x + 1) · 127.5), clipped. One
  channel is grey, three are RGB; two and four have alpha last.
  """
  buffer = io.BytesIO()
  pillow_image(image).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def pillow_image(image: np.ndarray) -> Image.Image:
  """The image [H, W, C] for Pillow, which tells the mode from the shape."""
  if image.ndim != 3 or not 1 <= image.shape[2] <= 4:
    raise ValueError(f"An image must be [H, W, C] with 1 to 4 channels; got shape {image.shape}.")
  image = _pixels(image)
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def sorted_scores_paths(values: np.ndarray, *, width: float, height: float) -> dict[str, str]:
  """SVG paths of the areas between zero and ascending scores [N], and of the zero line.

  Returns:
    "supporting", "opposing" (areas above and below zero) and "zero", in a box width × height.
  """
  num_points = min(len(values), 241)
  picked = values[np.linspace(0, len(values) - 1, num_points).round().astype(int)]
  low, high = min(values[0], 0.0), max(values[-1], 0.0)
  scale = height / ((high - low) or 1.0)
  x = np.linspace(0, width, num_points)
  zero = high * scale

  def area(part: np.ndarray) -> str:
    points = " ".join(f"L{a:.1f} {b:.1f}" for a, b in zip(x, (high - part) * scale, strict=True))
    return f"M0 {zero:.1f} {points} L{width:.1f} {zero:.1f} Z"

  return {
    "supporting": area(np.maximum(picked, 0)),
    "opposing": area(np.minimum(picked, 0)),
    "zero": f"M0 {zero:.1f} H{width:.1f}",
  }


def _pixels(image: np.ndarray) -> np.ndarray:
  if image.dtype == np.uint8:
    return image
  return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def _lines(series: np.ndarray) -> np.ndarray:
  """uint8 [112, 168, 3]: a line for every channel of a series [L, C] on white."""
  width, height = (_OVERSAMPLING * size for size in _PLOT)
  margin = 4 * _OVERSAMPLING
  if len(series) == 1:
    series = np.repeat(series, 2, axis=0)  # one step is a level line
  picked = np.linspace(0, len(series) - 1, min(len(series), _MOST_POINTS)).round().astype(int)
  low, high = float(series.min()), float(series.max())
  heights = (high - series[picked]) / (high - low) if high > low else 0.5 + 0 * series[picked]
  x = margin + np.linspace(0, 1, len(picked)) * (width - 2 * margin)
  y = margin + heights * (height - 2 * margin)
  picture = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(picture)
  for channel in range(series.shape[1]):
    points = list(zip(x.tolist(), y[:, channel].tolist(), strict=True))
    draw.line(points, PALETTE[channel % len(PALETTE)], width=_THICK, joint="curve")
  return np.asarray(picture.resize(_PLOT, Image.Resampling.LANCZOS))
