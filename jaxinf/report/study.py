"""The page of a curvature study: one figure and one table."""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxinf.engine.artifacts import write_bytes
from jaxinf.evaluation.curvature_study import CurvatureStudy

# Okabe and Ito's palette, which the colour-blind tell apart; reduce and empirical are dashed.
_COLOURS = {"EK-FAC": "#0072b2", "K-FAC": "#d55e00", "diagonal": "#009e73", "identity": "#6b7280"}
_STYLES = {"reduce": "--", "empirical": ":", "8 targets": "-."}


def write_study(folder: Path, study: CurvatureStudy) -> list[Path]:
  """Writes index.html and curvature-study.png into `folder`, each atomically; the page first."""
  figure = study_figure(study)
  loader = jinja2.PackageLoader("jaxinf", "report")
  template = jinja2.Environment(loader=loader, autoescape=True).get_template("study.html.j2")
  settings = study.settings
  page = template.render(
    figure="data:image/png;base64," + base64.b64encode(figure).decode(),
    dampings=[f"{damping:.0e}" for damping in study.dampings],
    rows=[
      (name, [_cell(*pair) for pair in zip(errors, correlations, strict=True)])
      for name, errors, correlations in zip(
        study.names, study.errors, study.correlations, strict=True
      )
    ],
    solves=[
      (f"{r.max():.0e}", int(i.max()))
      for r, i in zip(study.residuals, study.iterations, strict=True)
    ],
    largest=f"{study.largest_eigenvalue:.2g}",
    settings=settings,
    num_pairs=settings["num_images"] * settings["draws"],
  )
  folder.mkdir(parents=True, exist_ok=True)
  files = {folder / "index.html": page.encode(), folder / "curvature-study.png": figure}
  for path, content in files.items():
    write_bytes(path, content)
  return list(files)


def study_figure(study: CurvatureStudy) -> bytes:
  """PNG: relative error and rank correlation over the dampings, means with standard errors."""
  figure = Figure(figsize=(10, 4), dpi=110, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  for name, errors, correlations in zip(study.names, study.errors, study.correlations, strict=True):
    base, _, variant = name.partition(", ")
    style = dict(
      color=_COLOURS[base], linestyle=_STYLES.get(variant, "-"), marker="o", markersize=3,
      label=name, capsize=2, linewidth=1.5,
    )  # fmt: skip
    for axes, values in ((left, errors), (right, correlations)):
      error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else None
      axes.errorbar(study.dampings, values.mean(axis=1), yerr=error, **style)
  left.set(xscale="log", yscale="log", xlabel="damping λ", ylabel="relative error of (H + λI)⁻¹v")
  right.set(xscale="log", xlabel="damping λ", ylabel="rank correlation of scores")
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
  figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _cell(errors: np.ndarray, correlations: np.ndarray) -> str:
  return f"{errors.mean():.2g} / {correlations.mean():.3f}"
