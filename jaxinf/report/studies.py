"""The pages of the curvature and the compression study: each one figure and one table."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from jaxinf.evaluation.compression_study import CompressionStudy
from jaxinf.evaluation.curvature_study import CurvatureStudy
from jaxinf.report.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, new_figure, png, tidy
from jaxinf.report.page import Figure, Section, Table, write_page
from jaxinf.report.words import count
from jaxinf.scores.statistics import mean_and_error

# Approximations by colour; their variants are dashed.
_CURVATURES = {"EK-FAC": BLUE, "K-FAC": VERMILION, "diagonal": GREEN}
_DASHES = {"reduce": "--", "empirical": ":", "8 targets": "-."}
# Families of compressions by colour and marker; others are grey dots.
_FAMILIES = {
  "quantised": (BLUE, "o"),
  "bfloat16": (PURPLE, "D"),
  "svd": (VERMILION, "s"),
  "truncation": (GREEN, "^"),
  "projection": (ORANGE, "v"),
}
_TICKS = ((2, 5, 10, 20, 50, 100), (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1))
_FLOOR = 1e-3  # of 1 − r on its logarithmic axis, so that r = 1 has a place


def write_curvature_study(folder: Path, study: CurvatureStudy) -> list[Path]:
  """Writes index.html and curvature-study.png into `folder`, each atomically; the page first."""
  settings, title = study.settings, "How near the curvature is to the exact GGN"
  num_pairs = settings["num_images"] * settings["draws"]
  figure = curvature_figure(study)
  errors, correlations = study.errors.mean(axis=2), study.correlations.mean(axis=2)
  rows = [
    (name, *(f"{e:.2g} / {c:.3f}" for e, c in zip(*pair, strict=True)))
    for name, *pair in zip(study.names, errors, correlations, strict=True)
  ]
  solved = zip(study.residuals.max(axis=1), study.iterations.max(axis=1), strict=True)
  rows.append(("exact: largest residual / iterations", *(f"{r:.0e} / {i:.0f}" for r, i in solved)))
  section = Section(
    title,
    text=[
      f"The exact GGN of {count(settings['num_parameters'])} parameters over {count(num_pairs)} "
      "(example, draw) pairs, inverted by conjugate gradients for the gradients of "
      f"{settings['num_queries']} samples, against approximations of the same pairs. Its largest "
      f"eigenvalue is about {study.largest_eigenvalue:.2g}."
    ],
    figures=[
      Figure(figure, "Relative error and rank correlation over damping, for each approximation")
    ],
    tables=[
      Table(
        header=("λ", *(f"{damping:.0e}" for damping in study.dampings)),
        rows=rows,
        caption="Relative error of (H + λI)⁻¹v / rank correlation of the scores of "
        f"{settings['num_images']} training examples; means over samples.",
      )
    ],
    note="Where the residual of an exact solve is not small, it is no reference at that damping.",
  )
  return write_page(folder, title, [section], {"curvature-study.png": figure})


def write_compression_study(folder: Path, study: CompressionStudy) -> list[Path]:
  """Writes index.html and compression-study.png into `folder`, each atomically; the page first."""
  settings, title = study.settings, "What compressing the query gradients costs"
  figure = compression_figure(study)
  cell = lambda correlations: f"{correlations.mean():.4f} / {correlations.min():.4f}"
  columns = zip(study.names, study.sizes, study.errors, study.pearson, study.spearman, strict=True)
  section = Section(
    title,
    text=[
      f"The gradients of {settings['num_queries']} samples, {count(settings['num_parameters'])} "
      f"numbers each, were preconditioned by {settings['curvature']} curvature at "
      f"λ = {settings['damping']:.0e} and compressed. The scores of {settings['num_images']} "
      "training examples with them are correlated with the scores of the gradients in float32. "
      f"Every gradient is a mean over {settings['draws']} draws."
    ],
    figures=[Figure(figure, "Pearson and rank correlation of scores over size, by compression")],
    tables=[
      Table(
        header=("compression", "size", "‖v̂ − v‖ / ‖v‖", "Pearson / least", "rank / least"),
        rows=[
          (name, f"{100 * size:.3g} %", f"{errors.mean():.2g}", cell(pearson), cell(spearman))
          for name, size, errors, pearson, spearman in columns
        ],
        caption="Means over samples; correlations with the least of them.",
      )
    ],
    note="Size: bytes as kept ÷ bytes in float32. svd keeps a layer's matrix whole where its "
    "factors would be no smaller.",
  )
  return write_page(folder, title, [section], {"compression-study.png": figure})


def curvature_figure(study: CurvatureStudy) -> bytes:
  """PNG: relative error and rank correlation over the dampings, means with standard errors."""
  figure = new_figure(4)
  left, right = figure.subplots(1, 2)
  for axes, values in ((left, study.errors), (right, study.correlations)):
    for name, means, errors in zip(study.names, *mean_and_error(values), strict=True):
      base, _, variant = name.partition(", ")
      axes.errorbar(
        study.dampings,
        means,
        yerr=errors,
        color=_CURVATURES.get(base, GREY),
        linestyle=_DASHES.get(variant, "-"),
        marker="o",
        markersize=3,
        label=name,
        capsize=2,
        linewidth=1.5,
      )
    tidy(axes)
  left.set(xscale="log", yscale="log", xlabel="damping λ", ylabel="relative error of (H + λI)⁻¹v")
  right.set(xscale="log", xlabel="damping λ", ylabel="rank correlation of scores")
  figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
  return png(figure)


def compression_figure(study: CompressionStudy) -> bytes:
  """PNG: Pearson's and the rank correlation over the size, means with standard errors.

  Correlations r are spaced by log(1 − r + 0.001), since most are near 1.
  """
  figure = new_figure(4)
  panels = figure.subplots(1, 2, sharey=True)
  for axes, values, label in (
    (panels[0], study.pearson, "Pearson correlation of scores"),
    (panels[1], study.spearman, "rank correlation of scores"),
  ):
    means, errors = mean_and_error(values)
    for family in dict.fromkeys(map(_family, study.names)):
      _family_line(axes, family, study, means, errors)
    axes.set(xscale="log", xlabel="size, % of float32", ylabel=label)
    axes.set_yscale("function", functions=(_spaced, _correlation))
    lowest = min(-0.02, float(means.min()) - 0.1)
    axes.set(xticks=_TICKS[0], yticks=_TICKS[1], ylim=(lowest, 1 + _FLOOR / 4))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.tick_params(labelleft=True)
    tidy(axes)
  handles = panels[0].get_legend_handles_labels()
  figure.legend(*handles, loc="outside right center", frameon=False)
  return png(figure)


def _family_line(
  axes: Axes, family: str, study: CompressionStudy, means: np.ndarray, errors: np.ndarray
) -> None:
  """A family's variants, from small to large, each with its label."""
  colour, marker = _FAMILIES.get(family, (GREY, "o"))
  members = np.flatnonzero([_family(name) == family for name in study.names])
  members = members[np.unique(study.sizes[members], return_index=True)[1]]  # by size, once each
  sizes = 100 * study.sizes[members]
  axes.errorbar(
    sizes,
    means[members],
    yerr=errors[members],
    color=colour,
    marker=marker,
    markersize=5,
    label=family,
    capsize=2,
    linewidth=1.5,
  )
  for member, size in zip(members, sizes, strict=True):
    text = study.names[member].removeprefix(f"{family}, ")
    if text != family and not text.endswith("%"):  # a share is the size itself
      axes.annotate(
        text,
        (size, means[member]),
        xytext=(-5, 5),
        textcoords="offset points",
        color=colour,
        fontsize=8,
        ha="right",
      )


def _family(name: str) -> str:
  """What a variant's name begins with: "svd" of "svd, rank 5"; integers are one family."""
  return "quantised" if name.startswith("int") else name.partition(", ")[0]


def _spaced(r: np.ndarray) -> np.ndarray:
  return -np.log10(np.maximum(1 - r, -_FLOOR / 2) + _FLOOR)


def _correlation(spaced: np.ndarray) -> np.ndarray:
  """The inverse of `_spaced`."""
  return 1 + _FLOOR - 10 ** (-spaced)
