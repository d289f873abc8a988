"""What the figures of a proof share: width, colours, plain axes, and PNG bytes."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GREY, INK, FAINT = "#6b7280", "#111827", "#e5e7eb"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, "#e69f00", GREY)

WIDTH = 10.0  # inches: 1100 pixels, about the width of the page
_DPI = 110


def new_figure(height: float, width: float = WIDTH) -> Figure:
  """An empty white figure of that size in inches, laid out without overlaps."""
  figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
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


def percent(mean: float, error: float | None = None) -> str:
  """A share in % with one decimal, as `41.2 ± 1.0`; a true minus sign."""
  if not np.isfinite(mean):
    return "×"
  text = f"{100 * mean:.1f}".replace("-", "−")
  return text if error is None or not np.isfinite(error) else f"{text} ± {100 * error:.1f}"


def mean_and_error(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
  """Means and standard errors std(ddof=1) / √n along an axis; NaN errors of one value."""
  num = values.shape[axis]
  means = values.mean(axis=axis)
  if num < 2:
    return means, np.full(np.shape(means), np.nan)
  return means, values.std(axis=axis, ddof=1) / num**0.5


def spread(items: Sequence, columns: int) -> tuple[int, int]:
  """(rows, columns) of a grid for the items with at most that many columns."""
  columns = min(columns, len(items))
  return -(-len(items) // columns), columns
