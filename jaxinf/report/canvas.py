"""What all figures share: width, colours, plain axes, and PNG bytes."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind tell apart.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
GREY, INK, FAINT = "#6b7280", "#111827", "#e5e7eb"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY)

WIDTH = 10.0  # inches: 1100 pixels, about the width of the page
DPI = 110


def new_figure(height: float) -> Figure:
  """An empty white figure as wide as the page, `height` inches high, laid out without overlaps."""
  figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")
  return new_canvas(figure)


def new_canvas(figure: Figure) -> Figure:
  """The figure, drawn by Agg: without windows, whatever backend the user has chosen."""
  FigureCanvasAgg(figure)
  return figure


def png(figure: Figure) -> bytes:
  """The figure as PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def tidy(axes: Axes, grid: str = "both") -> None:
  """Axes with two spines and faint grid lines along "x", "y", "both" or "none"."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.set_axisbelow(True)
  if grid != "none":
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]


def shades(number: int) -> list[str]:
  """Colours from light to dark for lines in an order, of viridis."""
  return [to_hex(x) for x in matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, number))]


def spread(items: Sequence, columns: int) -> tuple[int, int]:
  """(rows, columns) of a grid for the items with at most that many columns."""
  columns = min(columns, len(items))
  return -(-len(items) // columns), columns
