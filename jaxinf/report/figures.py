"""Pictures of a report: the attribution figure, images as PNG, and sorted scores as SVG."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from jaxinf.report.rows import Neighbour, Row, Unit

TITLES = {
  "supporting": "Most supporting",
  "opposing": "Most opposing",
  "neutral": "Most neutral",
}
# Blue and vermilion of Okabe and Ito's palette, which the colour-blind tell apart; grey.
COLOURS = {"supporting": "#0072b2", "opposing": "#d55e00", "neutral": "#6b7280"}

_DPI = 110
# Sizes of the figure in inches; an image is 1 × 1 of them times _IMAGE.
_IMAGE, _GAP, _CAPTION, _GROUP_GAP, _MARGIN, _TITLE = 0.8, 0.08, 0.42, 0.34, 0.3, 0.5
_LONGEST_TITLE, _NOTE = 1.4, 0.2


def png_bytes(image: np.ndarray) -> bytes:
  """An image [H, W, C] as PNG of its own size.

  uint8 pixels are kept; float pixels x in [-1, 1] become round((x + 1) · 127.5), clipped. One
  channel is grey, three are RGB; two and four have alpha last.
  """
  buffer = io.BytesIO()
  _picture(image).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def attribution_figure(rows: list[Row], unit: Unit) -> bytes:
  """PNG of one line a sample: the sample, then its training images by group, scores below."""
  names = list(TITLES)
  top_k = len(rows[0].groups[names[0]])
  height_of, width_of = rows[0].image.shape[:2]
  tall = _IMAGE * height_of / width_of
  group_width = max(top_k * (_IMAGE + _GAP) - _GAP, _LONGEST_TITLE)
  lefts = [_IMAGE + _GROUP_GAP + i * (group_width + _GROUP_GAP) for i in range(len(names))]
  width = lefts[-1] + group_width + 2 * _MARGIN
  step = tall + _CAPTION
  height = len(rows) * step + _TITLE + _NOTE + 2 * _MARGIN

  figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
  FigureCanvasAgg(figure)
  # One axes, in inches from the top left, y downwards.
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  _title(axes, 0, _IMAGE, "Sample", "#111827")
  for name, left in zip(names, lefts, strict=True):
    _title(axes, left, group_width, TITLES[name], COLOURS[name])
  for i, row in enumerate(rows):
    top = i * step
    _draw(axes, row.image, left=0, top=top, tall=tall)
    _caption(axes, 0, top + tall, row.id, "#374151")
    for name, left in zip(names, lefts, strict=True):
      for j, neighbour in enumerate(row.groups[name]):
        x = left + j * (_IMAGE + _GAP)
        _draw(axes, neighbour.image, left=x, top=top, tall=tall)
        _scores(axes, neighbour, unit, left=x, top=top + tall, colour=COLOURS[name])
  axes.text(0, len(rows) * step + _NOTE, _note(unit), color="#6b7280", fontsize=8, va="center")
  axes.set_xlim(-_MARGIN, width - _MARGIN)
  axes.set_ylim(height - _MARGIN - _TITLE, -_MARGIN - _TITLE)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


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


def _picture(image: np.ndarray) -> Image.Image:
  """The image [H, W, C] for Pillow, which tells the mode from the shape."""
  if image.ndim != 3 or not 1 <= image.shape[2] <= 4:
    raise ValueError(f"An image must be [H, W, C] with 1 to 4 channels; got shape {image.shape}.")
  if image.dtype != np.uint8:
    image = np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _draw(axes: Axes, image: np.ndarray, *, left: float, top: float, tall: float) -> None:
  sharp = image.shape[1] < _IMAGE * _DPI
  axes.imshow(
    np.asarray(_picture(image).convert("RGBA")),
    extent=(left, left + _IMAGE, top + tall, top),
    aspect="auto",
    interpolation="nearest" if sharp else "antialiased",
  )


def _title(axes: Axes, left: float, width: float, text: str, colour: str) -> None:
  axes.plot([left, left + width], [-0.12, -0.12], color=colour, linewidth=1.5)
  axes.text(left, -0.2, text, color=colour, fontsize=11, fontweight="bold", va="bottom")


def _note(unit: Unit) -> str:
  power = f"in units of $10^{{{unit.exponent}}}$, " if unit.exponent else ""
  return f"Scores of training images, {power}± one standard error where there are groups of draws."


def _caption(axes: Axes, left: float, top: float, text: str, colour: str) -> None:
  axes.text(left + _IMAGE / 2, top + 0.05, text, color=colour, fontsize=7, ha="center", va="top")


def _scores(
  axes: Axes, neighbour: Neighbour, unit: Unit, *, left: float, top: float, colour: str
) -> None:
  _caption(axes, left, top, unit.number(neighbour.score), colour)
  _caption(axes, left, top + 0.12, unit.error(neighbour.std_error), "#6b7280")
