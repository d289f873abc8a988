"""Figures of the benchmark: what is drawn where, and that each is a PNG of the page's width."""

import io

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from jaxinf.report import method_figures, observation_figures
from jaxinf.report.method_figures import GROUPS, Bar, BarPanel, SweepPanel
from jaxinf.report.observation_figures import ChangePanel, Heatmap
from jaxinf.scores.statistics import mean_and_error

OWN, OTHER, NO_GRADIENTS, ORACLE = GROUPS
BARS = [
  Bar("pixel", NO_GRADIENTS, (0.12, 0.01)),
  Bar("weak", OWN, (0.20, 0.02), (0.25, 0.02)),
  Bar("strong", OWN, (0.10, 0.02), (0.45, 0.02)),
  Bar("stand-in", OTHER, (0.5, 0.02), (0.6, 0.02)),
  Bar("exact retraining", ORACLE, (0.7, np.nan)),
]
DAMPINGS = np.array([1e-8, 1e-4, 1.0])
SWEEP = SweepPanel(
  "trak", DAMPINGS, {"float32": (np.array([0.1, 0.2, 0.3]), np.full(3, 0.01)),
                     "float16": (np.array([np.nan, 0.1, 0.3]), np.full(3, 0.01))}, 1e-8,
)  # fmt: skip
MAP = Heatmap("map", np.array([[50.0, -20.0], [0.0, np.nan]]), "ab", "cd", "true", "gradient")
CHANGES = ChangePanel("loss", np.array([[-1.0, 1.0], [2.0, 0.0]]), np.ones((2, 2)), (0.5, 0.25))
CHANGE = np.array([[[2e-4, 4e-4], [3e-4, 5e-4]], [[1e-4, -1e-4], [0.0, 0.0]]])

FIGURES = {
  "bars": lambda: method_figures.bars_figure([BarPanel("loss", BARS, (0.9, 0.8, 0.95))]),
  "sweeps": lambda: method_figures.sweeps_figure([[SWEEP, SWEEP]], legend="precision"),
  "counterfactual": lambda: method_figures.counterfactual_figure(
    CHANGE, *mean_and_error(CHANGE), methods=["influence", "random"], shares=[0.02, 0.1],
    measurement="loss",
  ),
  "heatmaps": lambda: observation_figures.heatmaps_figure([MAP]),
  "changes": lambda: observation_figures.changes_figure([CHANGES]),
  "weights": lambda: observation_figures.weights_figure(
    {"loss": np.ones(10), "elbo": np.arange(10.0)}
  ),
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
  """Name → the figure itself, in place of its PNG."""

  def figure(name):
    for module in (method_figures, observation_figures):
      monkeypatch.setattr(module, "png", lambda figure: figure)
    return FIGURES[name]()

  return figure


def texts(axes):
  return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_as_wide_as_the_page_and_the_same_each_time(name):
  first, second = FIGURES[name](), FIGURES[name]()
  assert Image.open(io.BytesIO(first)).width == 1100
  assert first == second


def test_groups_stand_apart_with_their_best_first(drawn):
  axes = drawn("bars").axes[0]
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ["strong", "weak", "stand-in", "pixel", "exact retraining"]
  assert np.diff(axes.get_yticks()).tolist() == [1, 1.5, 1.5, 1.5]
  assert axes.get_ylim()[0] > axes.get_ylim()[1]  # from the top down


def test_markers_are_hollow_at_the_default_and_filled_at_the_best(drawn):
  axes = drawn("bars").axes[0]
  found = {
    (round(line.get_xdata()[0], 6), matplotlib.colors.to_hex(line.get_markerfacecolor()))
    for line in axes.lines
    if line.get_marker() == "o"
  }
  expected = set()
  for bar in BARS:
    values = [bar.default] if bar.best is None else [bar.best]
    expected |= {(round(100 * mean, 6), GROUPS[bar.group]) for mean, _ in values}
    if bar.best is not None:
      expected.add((round(100 * bar.default[0], 6), "#ffffff"))
  assert found == expected
  assert texts(axes)[:2] == ["45.0 ± 2.0", "(10.0 ± 2.0)"]
  assert texts(axes)[-1] == "70.0"  # no standard error: none is written


def test_scores_that_are_not_numbers_are_crosses_at_their_dampings(drawn):
  figure = drawn("sweeps")
  crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
  (cross,) = crosses
  assert cross.get_xdata().tolist() == [1e-8]
  assert "NaN" in [text.get_text() for text in figure.legends[0].texts]


def test_counterfactual_bars_are_means_over_samples_in_one_unit(drawn):
  axes = drawn("counterfactual").axes[0]
  heights = [patch.get_height() for patch in axes.patches]
  np.testing.assert_allclose(heights, [3, 4, 0, 0], atol=1e-12)  # influence, then random
  assert axes.get_ylabel() == "change of loss, in units of $10^{-4}$"
  # Standard errors of two samples: half their difference.
  assert texts(axes)[:3] == ["3.00\n± 1.00", "4.00\n± 1.00", "0.00\n± 1.00"]


def test_heatmaps_diverge_from_zero_and_write_every_number(drawn):
  axes, _ = drawn("heatmaps").axes
  assert axes.images[0].get_clim() == (-50, 50)
  assert texts(axes) == ["50.0", "−20.0", "0.0", "×"]


def test_changes_show_every_pair_and_their_line(drawn):
  axes = drawn("changes").axes[0]
  assert axes.collections[0].get_offsets().tolist() == [[-1, 1], [1, 1], [2, 1], [0, 1]]
  line = axes.lines[0]
  assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([-1, 2], [-0.25, 1.25])


def test_weights_of_zero_are_left_out_of_log_axes(drawn):
  axes = drawn("weights").axes[0]
  assert axes.lines[1].get_xdata()[0] == 1  # timesteps count from 1 where axes are logarithmic
  assert np.isnan(axes.lines[1].get_ydata()[0]) and axes.lines[1].get_ydata()[1] == 1
