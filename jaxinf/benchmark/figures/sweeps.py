"""LDS by Hessian (paper, Fig. 4), by damping and draws (7–10) and by precision (21)."""

import dataclasses
from typing import Any

import numpy as np

from jaxinf.attribution.methods import method_named
from jaxinf.benchmark.figures.bars import HEADER, OWN, READING
from jaxinf.benchmark.figures.common import (
  Numbers,
  Truth,
  dampings_of,
  image_measurements,
  truth_of,
)
from jaxinf.benchmark.figures.rounded import HALVES, RoundedRow
from jaxinf.benchmark.scoring import Row, row_of, scored
from jaxinf.report.method_figures import Bar, BarPanel, SweepPanel
from jaxinf.report.words import percent
from jaxinf.runs.run import Run

Line = tuple[np.ndarray, np.ndarray, np.ndarray]  # dampings, LDS and standard errors, each [L]
Lines = dict[tuple[str, str, str], Line]  # (row, line's label, target) → line


def hessian(run: Run) -> Numbers:
  """LDS of influence functions with each approximation of the Hessian."""
  config, curvature = run.config.study, run.config.curvature
  target = config.measurement
  truth = truth_of(run, [target])
  bars, arrays, rows = [], {}, []
  for name in config.approximations:
    row = row_of(name, target)
    dampings, means, errors = _line(truth, run, row, target)
    default = dampings.tolist().index(row.kind.default_damping)
    best = int(np.argmax(means)) if row.kind.sweeps else default
    points = [(float(means[i]), float(errors[i])) for i in (default, best)]
    label = name
    if name == "influence":
      label = f"influence: {curvature.kind} {curvature.approx}, {curvature.fisher}"
    bars.append(Bar(label, OWN, points[0], points[1] if row.kind.sweeps else None))
    arrays[name] = np.stack([dampings, means, errors])
    tuned = (percent(*points[1]), f"{dampings[best]:.0e}") if row.kind.sweeps else ("–", "–")
    rows.append((target, label, percent(*points[0]), *tuned))
  order = sorted(bars, key=lambda bar: -bar.default[0])
  caption = READING + (
    "The same gradients with other approximations of the Hessian: the Fisher of sampled targets "
    "(mc) or the empirical one, with Kronecker factors over positions (expand) or over sums of "
    "them (reduce), in its diagonal, or none (identity). At default dampings, from the best: "
    + ", ".join(f"{bar.label} {percent(bar.default[0])} %" for bar in order)
    + "."
  )
  return Numbers(
    title=f"Approximations of the Hessian, for {target}",
    caption=caption,
    shown={"panels": [BarPanel(f"true measurement: {target}", bars)]},
    arrays=arrays,
    header=HEADER,
    rows=rows,
    made=truth.made(),
    inputs=truth.inputs(),
  )


def damping(run: Run) -> Numbers:
  """LDS over dampings, with more and more draws in all gradients."""
  config, targets = run.config.study, image_measurements(run)
  rows = [row_of(method, config.measurement) for method in config.methods]
  truth = truth_of(run, targets)
  found: Lines = {
    (row.name, f"{draws}", target): _line(truth, with_draws(run, draws), row, target)
    for draws in sorted(config.draws)
    for row in rows
    for target in targets
  }
  parts = []
  for row in rows:
    ends = min(config.draws), max(config.draws)
    few, many = (_range(found[row.name, f"{draws}", targets[0]]) for draws in ends)
    parts.append(f"{row.name} {many} (with the fewest draws {few})")
  caption = (
    "Draws are those of each training image's and of each sample's gradient; the curvature is "
    "always the run's own. Dotted: the default damping; shaded: ± one standard error over "
    f"samples. Least … greatest LDS over dampings for {targets[0]} with the most draws: "
    + "; ".join(parts)
    + "."
  )
  return _over_dampings(
    truth,
    found,
    title="What damping and the number of draws do to the LDS",
    caption=caption,
    legend="draws of (t, ε) for each gradient",
    ordered=True,
  )


def half_precision(run: Run) -> Numbers:
  """LDS over dampings where features or gradients have half precision."""
  config = run.config.study
  truth = truth_of(run, [config.measurement])
  found: Lines = {}
  for method in config.methods:
    found |= _precisions(run, truth, method, config.measurement)
  parts = [f"{name} in {precision} {_range(line)}" for (name, precision, _), line in found.items()]
  caption = (
    "TRAK and D-TRAK: features, their Gram matrix with its damping, its inverse (taken in "
    "float32, scaled to a mean magnitude of one) and all products with it are rounded to the "
    "half precision, as traker does; sums within a product are in float32. Influence: the "
    "network's products in training gradients and the preconditioned queries are bfloat16, or "
    "these queries alone are compressed as in score.compression; the curvature is float32. "
    "Crosses: scores that are not finite. Least … greatest LDS over dampings: "
    + "; ".join(parts)
    + "."
  )
  return _over_dampings(
    truth, found, title="What half precision does to the LDS", caption=caption, legend="precision"
  )


def _precisions(run: Run, truth: Truth, method: str, target: str) -> Lines:
  """A method as the run computes it, in float32, and in its half precisions."""
  row, whole, found = row_of(method, target), run, {}
  compression = run.config.score.compression
  if "compression" in row.kind.reads and compression is not None:
    whole = _with_scores(run, "float32", compression=None)
    found[row.name, f"{compression} queries", target] = _line(truth, run, row, target)
  found[row.name, "float32", target] = _line(truth, whole, row, target)
  for precision in HALVES.get(method, ()):
    rounded = RoundedRow(method, row.measurement, precision)
    found[row.name, precision, target] = _line(truth, run, rounded, target)
  return found


def with_draws(run: Run, draws: int) -> Run:
  """The run with that many draws in every gradient of the scores, kept in a folder of its own."""
  return _with_scores(
    run, f"draws-{draws}", draws=draws, query_draws=draws, replicates=1, query_replicates=1
  )


def _with_scores(run: Run, folder: str, **settings: Any) -> Run:
  """The run with other settings of scores, which are kept in a folder within the run's."""
  return dataclasses.replace(
    run,
    config=dataclasses.replace(run.config, score=dataclasses.replace(run.config.score, **settings)),
    folders={**run.folders, "score": run.folder("score") / folder},
  )


def _line(truth: Truth, run: Run, row: Row, target: str) -> Line:
  if row.kind.default_damping is None:
    raise ValueError(f"The method {row.method} has no damping: leave it out of config.study.")
  sweep = scored(run, row)
  order = np.argsort(dampings_of(sweep))
  means, errors = truth.sweep(sweep, target)
  return dampings_of(sweep)[order], means[order], errors[order]


def _over_dampings(
  truth: Truth, found: Lines, *, title: str, caption: str, legend: str, ordered: bool = False
) -> Numbers:
  """A grid of panels, one a target and row of scores; `legend` is what the lines differ in."""
  names, _, targets = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
  rows = [
    (f"{name} → {target}", label, f"{damping:.0e}", percent(mean, error))
    for (name, label, target), line in found.items()
    for damping, mean, error in zip(*line, strict=True)
  ]
  grid = [[_panel(found, name, target) for name in names] for target in targets]
  return Numbers(
    title=title,
    caption=caption,
    shown=dict(grid=grid, legend=legend, ordered=ordered),
    arrays={"/".join(key): np.stack(line) for key, line in found.items()},
    header=("method → true measurement", legend, "λ", "LDS, %"),
    rows=rows,
    made=truth.made(),
    inputs=truth.inputs(),
  )


def _panel(found: Lines, name: str, target: str) -> SweepPanel:
  lines = {label: line for (row, label, of), line in found.items() if (row, of) == (name, target)}
  default = method_named(name.partition(",")[0]).default_damping
  dampings = next(iter(lines.values()))[0]
  return SweepPanel(
    f"{name} → true {target}", dampings, {k: line[1:] for k, line in lines.items()}, default
  )


def _range(line: Line) -> str:
  """Least … greatest LDS of a line, in %, of those that are numbers."""
  means = line[1][np.isfinite(line[1])]
  return f"{percent(means.min())} … {percent(means.max())} %" if len(means) else "×"
