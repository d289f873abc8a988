"""The figure of a run: each sample, and the training examples that its scores single out."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxinf.report.canvas import BLUE, DPI, GREY, INK, VERMILION, new_canvas, png
from jaxinf.report.pictures import pillow_image
from jaxinf.report.rows import TITLES, Neighbour, Row
from jaxinf.report.words import Unit

COLOURS = {"supporting": BLUE, "opposing": VERMILION, "neutral": GREY}

# Sizes of the figure in inches; a picture is _IMAGE wide.
_IMAGE, _GAP, _CAPTION, _GROUP_GAP, _MARGIN, _TITLE = 0.8, 0.08, 0.42, 0.34, 0.3, 0.5
_LONGEST_TITLE, _NOTE = 1.4, 0.2
_NO_PICTURE = 0.3  # the height of a name in place of a picture
_LONGEST_NAME = 14  # letters of it


class Drawing(Figure):
  """A figure that notebooks show as it is, without pyplot."""

  def _repr_png_(self) -> bytes:
    return png(self)


def attribution_figure(rows: list[Row], unit: Unit, noun: str = "image") -> Drawing:
  """One line a sample: the sample, then its training examples by group, scores below.

  Args:
    rows: samples with their training examples.
    unit: of all scores.
    noun: what a training example is called.
  """
  top_k = len(rows[0].groups["supporting"])
  tall = _height(rows[0].picture)
  group_width = max(top_k * (_IMAGE + _GAP) - _GAP, _LONGEST_TITLE)
  lefts = [_IMAGE + _GROUP_GAP + i * (group_width + _GROUP_GAP) for i in range(len(TITLES))]
  width = lefts[-1] + group_width + 2 * _MARGIN
  step = tall + _CAPTION
  height = len(rows) * step + _TITLE + _NOTE + 2 * _MARGIN

  figure = Drawing(figsize=(width, height), dpi=DPI, facecolor="white")
  new_canvas(figure)
  # One axes, in inches from the top left, y downwards.
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  _title(axes, 0, _IMAGE, "Sample", INK)
  for name, left in zip(TITLES, lefts, strict=True):
    _title(axes, left, group_width, TITLES[name], COLOURS[name])
  for i, row in enumerate(rows):
    top = i * step
    _draw(axes, row.picture, "", left=0, top=top, tall=tall)
    _caption(axes, 0, top + tall, row.id, "#374151")
    for name, left in zip(TITLES, lefts, strict=True):
      for j, neighbour in enumerate(row.groups[name]):
        x = left + j * (_IMAGE + _GAP)
        _draw(axes, neighbour.picture, neighbour.id, left=x, top=top, tall=tall)
        _scores(axes, neighbour, unit, left=x, top=top + tall, colour=COLOURS[name])
  note = _note(unit, noun)
  axes.text(0, len(rows) * step + _NOTE, note, color=GREY, fontsize=8, va="center")
  axes.set_xlim(-_MARGIN, width - _MARGIN)
  axes.set_ylim(height - _MARGIN - _TITLE, -_MARGIN - _TITLE)
  return figure


def _height(picture: np.ndarray | None) -> float:
  return _NO_PICTURE if picture is None else _IMAGE * picture.shape[0] / picture.shape[1]


def _draw(
  axes: Axes, picture: np.ndarray | None, name: str, *, left: float, top: float, tall: float
) -> None:
  """A picture, or the end of a name in its place."""
  if picture is None:
    text = name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
    _caption(axes, left, top + tall / 2, text, INK)
    return
  sharp = picture.shape[1] < _IMAGE * DPI
  axes.imshow(
    np.asarray(pillow_image(picture).convert("RGBA")),
    extent=(left, left + _IMAGE, top + tall, top),
    aspect="auto",
    interpolation="nearest" if sharp else "antialiased",
  )


def _title(axes: Axes, left: float, width: float, text: str, colour: str) -> None:
  axes.plot([left, left + width], [-0.12, -0.12], color=colour, linewidth=1.5)
  axes.text(left, -0.2, text, color=colour, fontsize=11, fontweight="bold", va="bottom")


def _note(unit: Unit, noun: str) -> str:
  power = f"in units of $10^{{{unit.exponent}}}$, " if unit.exponent else ""
  return (
    f"Scores of training {noun}s, {power}± one standard error where there are replicates of draws."
  )


def _caption(axes: Axes, left: float, top: float, text: str, colour: str) -> None:
  axes.text(
    left + _IMAGE / 2,
    top + 0.05,
    text,
    color=colour,
    fontsize=7,
    ha="center",
    va="top",
    parse_math=False,  # ids may hold dollar signs
  )


def _scores(
  axes: Axes, neighbour: Neighbour, unit: Unit, *, left: float, top: float, colour: str
) -> None:
  _caption(axes, left, top, unit.number(neighbour.score), colour)
  _caption(axes, left, top + 0.12, unit.error(neighbour.std_error), GREY)
