"""LDS bars (paper, Fig. 2 and 20) and counterfactual bars (Fig. 3), from what other stages left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.attribution.methods import method_named
from jaxinf.benchmark.counterfactuals import counterfactual_key
from jaxinf.benchmark.evaluating import evaluate_key
from jaxinf.benchmark.figures.common import Numbers, plain_name
from jaxinf.benchmark.retraining import folder
from jaxinf.engine import artifacts
from jaxinf.report.method_figures import GROUPS, Bar, BarPanel
from jaxinf.report.words import percent
from jaxinf.runs.run import Run
from jaxinf.scores.statistics import mean_and_error

OWN, OTHER, NO_GRADIENTS, ORACLE = GROUPS
HEADER = ("true measurement", "method", "default, %", "best on benchmark, %", "its damping")
READING = (
  "Linear datamodelling score: rank correlation, over random subsets of the training images, of "
  "predicted changes of a sample's measurement with those of retrained models; means over samples "
  "± standard error. Filled: the damping that is best on this benchmark; hollow and in brackets: "
  "the default one, which needs no benchmark. "
)


def lds(run: Run) -> Numbers:
  """LDS of every method on every true measurement of images."""
  artifact = _evaluated(run)
  tables = {name: t for name, t in artifact.notes["tables"].items() if name != "trajectory"}
  return _of_tables(artifact, tables, "How well each method predicts retraining")


def trajectory(run: Run) -> Numbers:
  """LDS of every method on the probability of the sampling trajectories."""
  artifact = _evaluated(run)
  if "trajectory" not in artifact.notes["tables"]:
    raise ValueError(
      "The stage evaluate has no table for trajectory: add it to measure.measurements (samples "
      "need sample.keep_trajectory), and run measure and evaluate."
    )
  tables = {"trajectory": artifact.notes["tables"]["trajectory"]}
  title = "How well each method predicts the probability of a sampling trajectory"
  return _of_tables(artifact, tables, title)


def counterfactual(run: Run) -> Numbers:
  """Changes of samples' measurements by models without each method's most supporting images."""
  artifact = _finished(run.folder("counterfactual"), counterfactual_key(run), "counterfactual")
  methods, shares, measurement = (
    artifact.notes[name] for name in ("methods", "shares", "measurement")
  )
  seeds = artifact.arrays["change"].shape[3]
  change = artifact.arrays["change"].mean(axis=3, dtype=np.float64)
  means, errors = mean_and_error(change)
  cells = _cells(change)
  caption = (
    f"Change of a sample's {measurement} when a model is trained anew without the images that a "
    "method calls most supporting for it, against the model of all images with the same training "
    "seed and as many steps. Bars: means over samples ± standard error; dots: single samples. "
  )
  best = int(np.argmax(means[:, -1]))
  largest = f"Without {100 * shares[-1]:g} % of the images"
  caption += f"{largest}, {methods[best]} changes it most, by {cells[best][-1]}"
  if "random" in methods:
    caption += f"; as many random images by {cells[methods.index('random')][-1]}"
  rows = [(method, *row) for method, row in zip(methods, cells, strict=True)]
  for metric in run.config.counterfactual.metrics:
    of_samples = _cells(artifact.arrays[metric].mean(axis=3, dtype=np.float64))
    rows += [(f"{method}: {metric}", *r) for method, r in zip(methods, of_samples, strict=True)]
  return Numbers(
    title=f"Retraining without the top influences: change of {measurement}",
    caption=caption + ".",
    shown=dict(
      change=change,
      means=means,
      errors=errors,
      methods=methods,
      shares=shares,
      measurement=measurement,
    ),
    arrays={"change": change, "means": means, "errors": errors},
    header=("removed", *(f"{100 * share:g} %" for share in shares)),
    rows=rows,
    made=f"{change.shape[2]} samples, {seeds} training seed{'s' * (seeds > 1)} each.",
    inputs={"counterfactual_content": artifact.content},
    notes=dict(methods=methods, shares=shares),
  )


def _cells(values: np.ndarray) -> list[list[str]]:
  """Mean ± standard error over samples of values [methods, shares, samples]."""
  return [
    [f"{mean:.3g} ± {error:.2g}" for mean, error in zip(*pair, strict=True)]
    for pair in zip(*mean_and_error(values), strict=True)
  ]


def _evaluated(run: Run) -> artifacts.Artifact:
  return _finished(folder(run, "evaluate"), evaluate_key(run), "evaluate")


def _finished(place: Path, key: Mapping[str, Any], stage: str) -> artifacts.Artifact:
  """What a stage left; StaleArtifact where it is of other settings, ValueError where it is none."""
  try:
    there = artifacts.finished(place, key)
  except artifacts.StaleArtifact as error:
    raise artifacts.StaleArtifact(
      f"{error}\nOr run the stage {stage}: it makes them anew."
    ) from error
  if not there:
    raise ValueError(f"{place} holds no finished result: run the stage {stage} first.")
  return artifacts.read(place)


def _of_tables(artifact: artifacts.Artifact, tables: Mapping[str, Any], title: str) -> Numbers:
  """The bars of tables that the stage `evaluate` made."""
  panels = [_panel(target, table) for target, table in tables.items()]
  rows, arrays = [], {}
  for (target, table), panel in zip(tables.items(), panels, strict=True):
    entries = [*table["entries"], *[{"name": ORACLE}] * bool(table["oracle"])]
    for entry, bar in zip(entries, panel.bars, strict=True):
      damping = f"{entry['best']['damping']:.0e}" if "best" in entry else "–"
      best = percent(*bar.best) if bar.best else "–"
      rows.append((target, bar.label, percent(*bar.default), best, damping))
      points = [bar.default, *[bar.best or bar.default] * (bar.group != ORACLE)]
      arrays[f"{target}/{entry['name']}"] = np.array(points)
  findings = [
    f"{target}: {_finding(panel.bars)}" for target, panel in zip(tables, panels, strict=True)
  ]
  table = next(iter(tables.values()))
  made = f"{table['num_models']} models of {table['num_subsets']} subsets"
  return Numbers(
    title=title,
    caption=READING + " ".join(findings),
    shown={"panels": panels},
    arrays=arrays,
    header=HEADER,
    rows=rows,
    made=f"{made}; {table['num_queries']} samples.",
    inputs={"evaluate_content": artifact.content},
    notes={"groups": {panel.title: {b.label: b.group for b in panel.bars} for panel in panels}},
  )


def _panel(target: str, table: Mapping[str, Any]) -> BarPanel:
  """The bars of one table, the oracle last, where there is one."""
  bars, ceiling = [_bar(entry, target) for entry in table["entries"]], None
  if oracle := table["oracle"]:
    bars.append(Bar(ORACLE, ORACLE, (oracle["mean"], oracle["std_error"])))
    ceiling = (table["ceiling"]["ceiling"], *table["ceiling"]["interval"])
  return BarPanel(f"true measurement: {target}", bars, ceiling)


def _bar(entry: Mapping[str, Any], target: str) -> Bar:
  """A row of the table, with the group that it stands in."""
  method = method_named(entry["method"])
  label = entry["method"]
  if method.measures:
    group = OWN if entry["measurement"] == target else OTHER
    label += "" if group == OWN else f" (m. {plain_name(entry['measurement'])})"
  else:
    group = NO_GRADIENTS if method.default_damping is None else OTHER
  pair = lambda summary: (summary["mean"], summary["std_error"])
  return Bar(label, group, pair(entry["default"]), pair(entry["best"]) if "best" in entry else None)


def _finding(bars: Sequence[Bar]) -> str:
  """The best method at default dampings, and the oracle."""
  methods = [bar for bar in bars if bar.group != ORACLE]
  best = max(methods, key=lambda bar: bar.default[0])
  text = f"best at default dampings is {best.label} with {percent(*best.default)} %"
  at_best = lambda bar: bar.best or bar.default
  top = max(methods, key=lambda bar: at_best(bar)[0])
  if top.best is not None:
    text += f", tuned on the benchmark {top.label} with {percent(*top.best)} %"
  for oracle in (bar for bar in bars if bar.group == ORACLE):
    text += f"; one retrained model more reaches {percent(*oracle.default)} %"
  return text + "."
