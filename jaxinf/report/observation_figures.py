"""Figures of what retrained models do: heatmaps, predicted against actual changes, weights.

Pure functions from numbers to PNG.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxinf.report.canvas import FAINT, INK, PALETTE, VERMILION, new_figure, png, spread, tidy
from jaxinf.report.words import number


@dataclasses.dataclass(frozen=True)
class Heatmap:
  """A table of numbers as colours, with each number in its cell.

  Attributes:
    title: of the panel.
    values: [R, C].
    rows, columns: their labels.
    row_axis, column_axis: what these are.
    unit: how a number is written, such as ".1f".
    limits: numbers of the first and the last colour; None: colours diverge from 0.
    split: draw a line before this column; None: nowhere.
  """

  title: str
  values: np.ndarray
  rows: Sequence[str]
  columns: Sequence[str]
  row_axis: str
  column_axis: str
  unit: str = ".1f"
  limits: tuple[float, float] | None = None
  split: int | None = None


@dataclasses.dataclass(frozen=True)
class ChangePanel:
  """Predicted and actual changes of a measurement.

  Attributes:
    title: of the panel, with its numbers.
    predicted, actual: [M, Q], of M subsets and Q samples.
    line: (slope, intercept) of the line that is drawn.
  """

  title: str
  predicted: np.ndarray
  actual: np.ndarray
  line: tuple[float, float]


def heatmaps_figure(maps: Sequence[Heatmap], *, columns: int = 1) -> bytes:
  """Heatmaps in a grid with that many columns."""
  shape = spread(maps, columns)
  tallest = max(len(heatmap.rows) for heatmap in maps)
  figure = new_figure(shape[0] * (1.3 + 0.34 * tallest))
  grid = figure.subplots(*shape, squeeze=False).ravel()
  for axes in grid[len(maps) :]:
    axes.set_visible(False)
  for axes, heatmap in zip(grid, maps, strict=False):
    _heatmap(axes, heatmap)
  return png(figure)


def changes_figure(panels: Sequence[ChangePanel], *, columns: int = 2) -> bytes:
  """Actual against predicted change of each sample (its colour) without each subset's images."""
  shape = spread(panels, columns)
  figure = new_figure(3.9 * shape[0])
  grid = figure.subplots(*shape, squeeze=False).ravel()
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  for axes, panel in zip(grid, panels, strict=False):
    # Samples by their mean change, so that neighbours in colour are neighbours in height.
    ranks = np.argsort(np.argsort(panel.actual.mean(axis=0)))
    axes.scatter(
      panel.predicted.ravel(),
      panel.actual.ravel(),
      c=np.tile(ranks, len(panel.actual)),
      cmap="viridis",
      s=5,
      alpha=0.45,
      linewidths=0,
      rasterized=True,
    )
    ends = np.array([panel.predicted.min(), panel.predicted.max()])
    axes.plot(ends, panel.line[0] * ends + panel.line[1], color=VERMILION, linewidth=1.5)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="predicted change", ylabel="actual change")
    axes.locator_params(nbins=6)
    axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    axes.set_title(panel.title, loc="left", fontsize=10)
    tidy(axes)
  return png(figure)


def weights_figure(weights: Mapping[str, np.ndarray]) -> bytes:
  """Name → weights [T] of the timesteps' losses, on log axes; the timestep counts from 1."""
  figure = new_figure(4.2)
  axes = figure.subplots()
  for i, (name, values) in enumerate(weights.items()):
    shown = np.where(values > 0, values, np.nan)
    axes.plot(
      np.arange(1, len(values) + 1),
      shown,
      label=name,
      linewidth=1.8,
      color=INK if i == 0 else PALETTE[i - 1],
      linestyle=("--", "-", "-", ":")[i % 4],
    )
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="timestep t, from 1",
    ylabel="weight of $\\ell_t$",
  )
  tidy(axes)
  figure.legend(loc="outside upper center", ncols=len(weights), frameon=False)
  return png(figure)


def _heatmap(axes: Axes, heatmap: Heatmap) -> None:
  largest = np.abs(heatmap.values[np.isfinite(heatmap.values)]).max(initial=1e-9)
  low, high = heatmap.limits or (-largest, largest)
  colours = "cividis" if heatmap.limits else "RdBu_r"
  image = axes.imshow(heatmap.values, cmap=colours, vmin=low, vmax=high, aspect="auto")
  for (row, column), value in np.ndenumerate(heatmap.values):
    red, green, blue, _ = image.cmap(image.norm(value))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    axes.text(
      column,
      row,
      number(value, heatmap.unit),
      ha="center",
      va="center",
      fontsize=8,
      color="white" if dark else INK,
    )
  axes.set_xticks(range(len(heatmap.columns)), heatmap.columns, fontsize=9)
  axes.set_yticks(range(len(heatmap.rows)), heatmap.rows, fontsize=9)
  axes.tick_params(length=0)
  axes.set(xlabel=heatmap.column_axis, ylabel=heatmap.row_axis)
  axes.set_title(heatmap.title, loc="left", fontsize=10.5, fontweight="bold")
  axes.spines[:].set_visible(False)
  if heatmap.split is not None:
    axes.axvline(heatmap.split - 0.5, color="white", linewidth=4)
  bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
  bar.outline.set_edgecolor(FAINT)  # type: ignore[operator]
