"""The page of a compression study: one figure and one table."""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxinf.engine.artifacts import write_bytes
from jaxinf.evaluation.compression_study import CompressionStudy

# Families, in Okabe and Ito's palette, which the colour-blind tell apart; others are grey.
_STYLES = {
  "quantised": ("#0072b2", "o"),
  "bfloat16": ("#cc79a7", "D"),
  "svd": ("#d55e00", "s"),
  "truncation": ("#009e73", "^"),
  "projection": ("#e69f00", "v"),
}
_TICKS = ((2, 5, 10, 20, 50, 100), (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1))
_FLOOR = 1e-3  # of 1 − r on its logarithmic axis, so that r = 1 has a place


def write_compression_study(folder: Path, study: CompressionStudy) -> list[Path]:
  """Writes index.html and compression-study.png into `folder`, each atomically; the page first."""
  figure = compression_figure(study)
  loader = jinja2.PackageLoader("jaxinf", "report")
  template = jinja2.Environment(loader=loader, autoescape=True).get_template("compression.html.j2")
  page = template.render(
    figure="data:image/png;base64," + base64.b64encode(figure).decode(),
    settings=study.settings,
    damping=f"{study.settings['damping']:.0e}",
    rows=[
      (name, f"{100 * size:.3g} %", f"{errors.mean():.2g}", _cell(pearson), _cell(spearman))
      for name, size, errors, pearson, spearman in zip(
        study.names, study.sizes, study.errors, study.pearson, study.spearman, strict=True
      )
    ],
  )
  folder.mkdir(parents=True, exist_ok=True)
  files = {folder / "index.html": page.encode(), folder / "compression-study.png": figure}
  for path, content in files.items():
    write_bytes(path, content)
  return list(files)


def compression_figure(study: CompressionStudy) -> bytes:
  """PNG: Pearson's and the rank correlation over the size, means with standard errors.

  Correlations r are spaced by log(1 − r + 0.001), since most are near 1.
  """
  figure = Figure(figsize=(10, 4), dpi=110, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 2, sharey=True)
  _draw(panels[0], study, study.pearson, "Pearson correlation of scores")
  _draw(panels[1], study, study.spearman, "rank correlation of scores")
  handles = panels[0].get_legend_handles_labels()
  figure.legend(*handles, loc="outside right center", frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _draw(axes: Axes, study: CompressionStudy, values: np.ndarray, label: str) -> None:
  """One line a family through its variants [V, Q], from small to large."""
  families = np.array([_family(name) for name in study.names])
  num_queries = values.shape[1]
  for family in dict.fromkeys(families):
    members = np.flatnonzero(families == family)
    members = members[np.unique(study.sizes[members], return_index=True)[1]]  # by size, once each
    colour, marker = _STYLES.get(family, ("#6b7280", "o"))
    sizes, means = 100 * study.sizes[members], values[members].mean(axis=1)
    error = values[members].std(axis=1, ddof=1) / num_queries**0.5 if num_queries > 1 else None
    axes.errorbar(
      sizes, means, yerr=error, color=colour, marker=marker, markersize=5, label=family, capsize=2,
      linewidth=1.5,
    )  # fmt: skip
    for member, size, mean in zip(members, sizes, means, strict=True):
      text = study.names[member].removeprefix(f"{family}, ")
      if text != family and not text.endswith("%"):  # a share is the size itself
        axes.annotate(
          text, (size, mean), xytext=(-5, 5), textcoords="offset points", color=colour, fontsize=8,
          ha="right",
        )  # fmt: skip
  axes.set(xscale="log", xlabel="size, % of float32", ylabel=label)
  axes.set_yscale("function", functions=(_spaced, _correlation))
  lowest = min(-0.02, float(values.mean(axis=1).min()) - 0.1)
  axes.set(xticks=_TICKS[0], yticks=_TICKS[1], ylim=(lowest, 1 + _FLOOR / 4))
  axes.xaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_major_formatter("{x:g}")
  axes.minorticks_off()
  axes.tick_params(labelleft=True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e5e7eb", linewidth=0.6)


def _spaced(r: np.ndarray) -> np.ndarray:
  return -np.log10(np.maximum(1 - r, -_FLOOR / 2) + _FLOOR)


def _correlation(spaced: np.ndarray) -> np.ndarray:
  """The inverse of `_spaced`."""
  return 1 + _FLOOR - 10 ** (-spaced)


def _family(name: str) -> str:
  """What a variant's name begins with: "svd" of "svd, rank 5"; integers are one family."""
  return "quantised" if name.startswith("int") else name.partition(", ")[0]


def _cell(correlations: np.ndarray) -> str:
  return f"{correlations.mean():.4f} / {correlations.min():.4f}"
