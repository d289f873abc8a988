"""Figures of how well methods do: LDS bars, damping sweeps and counterfactual bars.

Pure functions from numbers to PNG. LDS come as shares and are drawn in %.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from jaxinf.report.canvas import (
  BLUE,
  FAINT,
  GREEN,
  GREY,
  INK,
  PALETTE,
  VERMILION,
  new_figure,
  png,
  shades,
  tidy,
)
from jaxinf.report.words import percent, with_error

# Group of rows → its colour, in the order they stand from the top.
GROUPS = {
  "gradient of the measurement": BLUE,
  "gradient of another measurement": VERMILION,
  "no gradients": GREY,
  "exact retraining": GREEN,
}
_ROW, _HEAD = 0.27, 0.75  # inches
_DASHES = ("-", "--", ":")


@dataclasses.dataclass(frozen=True)
class Bar:
  """A method in a panel: LDS and standard errors over queries.

  Attributes:
    label: its name.
    group: one of GROUPS.
    default: (mean, error) at the default damping, or of a method that has none.
    best: the same at the damping that is best on this benchmark; None: it has none.
  """

  label: str
  group: str
  default: tuple[float, float]
  best: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class BarPanel:
  """Methods on one true measurement.

  Attributes:
    title: what was measured of the retrained models.
    bars: the methods, in any order.
    ceiling: (estimate, low, high) of the LDS of perfect scores; None: not known.
  """

  title: str
  bars: Sequence[Bar]
  ceiling: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class SweepPanel:
  """LDS over dampings.

  Attributes:
    title: of the panel.
    dampings: [L] ascending.
    lines: label → (means [L], errors [L]); NaN means are drawn as crosses at the foot.
    default: the damping recommended without a benchmark; None: not marked.
  """

  title: str
  dampings: np.ndarray
  lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
  default: float | None = None


def bars_figure(panels: Sequence[BarPanel]) -> bytes:
  """Hollow markers: default dampings; filled: best on the benchmark; one panel below another."""
  rows = [_ordered(panel.bars) for panel in panels]
  heights = [_HEAD + _ROW * (bars[-1][0] + 1) for bars in rows]
  figure = new_figure(sum(heights) + 0.45)
  grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
  for axes, panel, bars in zip(grid[:, 0], panels, rows, strict=True):
    _bar_panel(axes, panel, bars)
  grid[-1, 0].set_xlabel("LDS: rank correlation with retrained models, %")
  figure.legend(handles=_bar_legend(panels), loc="outside lower center", ncols=3, frameon=False)
  return png(figure)


def sweeps_figure(
  grid: Sequence[Sequence[SweepPanel]], *, legend: str, ordered: bool = False
) -> bytes:
  """LDS against damping, a line for each of a panel's settings.

  Args:
    grid: rows of panels, which share their axis of LDS.
    legend: what the lines' labels are.
    ordered: the lines go from less to more, so that colours do.
  """
  figure = new_figure(0.75 + 2.7 * len(grid))
  axes_grid = figure.subplots(
    len(grid), max(map(len, grid)), squeeze=False, sharex="col", sharey="row"
  )
  names = list(dict.fromkeys(name for row in grid for panel in row for name in panel.lines))
  colours: Sequence[str] = shades(len(names)) if ordered else PALETTE
  looks = {
    name: dict(color=colours[i % len(colours)], linestyle="-" if ordered else _DASHES[i % 3])
    for i, name in enumerate(names)
  }
  for row_of_axes, row in zip(axes_grid, grid, strict=True):
    row_of_axes[0].set_ylabel("LDS, %")
    for axes in row_of_axes[len(row) :]:
      axes.set_visible(False)
    for axes, panel in zip(row_of_axes, row, strict=False):
      _sweep_panel(axes, panel, looks)
  for axes in axes_grid[-1]:
    axes.set_xlabel("damping λ")
  handles = [Line2D([], [], marker="o", ms=4, label=name, **looks[name]) for name in names]  # type: ignore[arg-type]
  if any(np.isnan(m).any() for row in grid for p in row for m, _ in p.lines.values()):
    handles.append(Line2D([], [], color=GREY, marker="x", ls="none", label="NaN"))
  figure.legend(
    handles=handles, title=legend, loc="outside upper center", ncols=len(handles), frameon=False
  )
  return png(figure)


def counterfactual_figure(
  change: np.ndarray,
  means: np.ndarray,
  errors: np.ndarray,
  *,
  methods: Sequence[str],
  shares: Sequence[float],
  measurement: str,
) -> bytes:
  """Mean change ± standard error over samples, which are the dots; groups of bars by share.

  Args:
    change: [methods, shares, samples], means over seeds.
    means, errors: [methods, shares] over samples; NaN errors are not drawn.
    methods, shares: along these axes.
    measurement: what changed.
  """
  figure = new_figure(4.2)
  axes = figure.subplots()
  width = 0.8 / len(methods)
  power = math.floor(math.log10(np.abs(change).max() or 1.0))
  power = 0 if -2 <= power < 3 else power
  change, means, errors = (values / 10.0**power for values in (change, means, errors))
  for i, method in enumerate(methods):
    x = np.arange(len(shares)) + (i - (len(methods) - 1) / 2) * width
    colour = GREY if method == "random" else PALETTE[i % (len(PALETTE) - 1)]
    axes.bar(x, means[i], 0.9 * width, color=colour, alpha=0.85, label=method)
    axes.errorbar(x, means[i], yerr=errors[i], fmt="none", ecolor=INK, capsize=3, linewidth=1.2)
    dots = np.broadcast_to(x[:, None], change[i].shape)
    jitter = np.linspace(-0.2, 0.2, change.shape[2]) * width
    axes.scatter(dots + jitter, change[i], s=9, color=INK, alpha=0.5, linewidths=0, zorder=3)
    for place, mean, error in zip(x, means[i], errors[i], strict=True):
      axes.annotate(
        with_error(mean, error, ".2f").replace(" ±", "\n±"),
        (place, max(mean + np.nan_to_num(error), 0)),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=INK,
        bbox=dict(facecolor="white", alpha=0.75, edgecolor="none", pad=0.5),
        zorder=4,
      )
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.margins(y=0.15)
  labels = [f"{100 * share:g} % of the images removed" for share in shares]
  axes.set_xticks(range(len(shares)), labels)
  unit = f", in units of $10^{{{power}}}$" if power else ""
  axes.set_ylabel(f"change of {measurement}{unit}")
  tidy(axes, "y")
  figure.legend(loc="outside upper center", ncols=len(methods), frameon=False)
  return png(figure)


def _ordered(bars: Sequence[Bar]) -> list[tuple[float, Bar]]:
  """(position, bar) group by group, the best first, with half a row between groups."""
  found, place = [], 0.0
  for group in GROUPS:
    members = [bar for bar in bars if bar.group == group]
    for bar in sorted(members, key=lambda bar: -(bar.best or bar.default)[0]):
      found.append((place, bar))
      place += 1
    place += 0.5 * bool(members)
  return found


def _bar_panel(axes: Axes, panel: BarPanel, bars: Sequence[tuple[float, Bar]]) -> None:
  for place, bar in bars:
    colour = GROUPS[bar.group]
    shown = bar.best or bar.default
    axes.barh(place, 100 * shown[0], 0.72, color=colour, alpha=0.16, linewidth=0)
    for value, filled in ((bar.default, bar.best is None), (bar.best, True)):
      if value is not None:
        mean, error = (100 * x for x in value)
        axes.errorbar(
          mean,
          place,
          xerr=None if np.isnan(error) else error,
          color=colour,
          marker="o",
          markersize=6,
          markerfacecolor=colour if filled else "white",
          capsize=2.5,
          linewidth=1.3,
        )
    texts = [(percent(*shown), INK, 75)]
    if bar.best is not None:
      texts.append((f"({percent(*bar.default)})", GREY, 150))
    for text, ink, points in texts:
      axes.annotate(
        text,
        (1, place),
        xytext=(points, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        ha="right",
        color=ink,
        fontsize=9,
        annotation_clip=False,
      )
  if panel.ceiling is not None:
    middle, low, high = (100 * x for x in panel.ceiling)
    axes.axvspan(low, high, color=FAINT, linewidth=0, zorder=0)
    axes.axvline(middle, color=INK, linestyle="--", linewidth=1)
  axes.axvline(0, color=INK, linewidth=0.8)
  axes.set_yticks([place for place, _ in bars], [bar.label for _, bar in bars])
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(bars[-1][0] + 0.6, -0.6)
  axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
  tidy(axes, "x")


def _bar_legend(panels: Sequence[BarPanel]) -> list[Line2D]:
  bars = [bar for panel in panels for bar in panel.bars]
  found = []
  if any(bar.best for bar in bars):
    faces = {"damping best on this benchmark": INK, "(default damping)": "white"}
    found = [
      Line2D([], [], color=INK, marker="o", ls="none", markerfacecolor=face, label=label)
      for label, face in faces.items()
    ]
  found += [
    Line2D([], [], color=colour, linewidth=5, alpha=0.6, label=group)
    for group, colour in GROUPS.items()
    if any(bar.group == group for bar in bars)
  ]
  if any(panel.ceiling for panel in panels):
    found.append(
      Line2D([], [], color=INK, ls="--", lw=1, label="ceiling: perfect scores (95 % interval)")
    )
  return found


def _sweep_panel(axes: Axes, panel: SweepPanel, looks: Mapping[str, Mapping[str, str]]) -> None:
  if panel.default is not None:
    axes.axvline(panel.default, color=GREY, linestyle=":", linewidth=1)
  crossed = 0
  for name, (means, errors) in panel.lines.items():
    colour, errors = looks[name]["color"], np.nan_to_num(errors)
    axes.plot(panel.dampings, 100 * means, marker="o", markersize=3.5, lw=1.6, **looks[name])  # type: ignore[arg-type]
    axes.fill_between(
      panel.dampings,
      100 * (means - errors),
      100 * (means + errors),
      color=colour,
      alpha=0.18,
      linewidth=0,
    )
    lost = panel.dampings[np.isnan(means)]
    if len(lost):
      axes.plot(
        lost,
        np.full(len(lost), 0.03 + 0.05 * crossed),
        color=colour,
        marker="x",
        ls="none",
        transform=axes.get_xaxis_transform(),
        markersize=6,
      )
      crossed += 1
  axes.axhline(0, color=INK, linewidth=0.8)
  axes.set_xscale("log")
  axes.yaxis.set_major_formatter(ScalarFormatter())
  axes.set_title(panel.title, loc="left", fontsize=10)
  tidy(axes)
