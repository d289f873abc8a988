"""The stage `truth`, which keeps a finished proof to judge anyone's scores by, and the judging.

What it leaves in workdir/truth/ is what `load_truth` reads: the truths of the package are copies of
such folders. Scores of our own methods are computed where they are not there yet. Of each the truth
keeps what it predicted, and not the scores.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.benchmark.evaluating import REFERENCE, measured_key
from jaxinf.benchmark.measuring import check_measurements, retrained
from jaxinf.benchmark.retraining import folder, subsets_of
from jaxinf.benchmark.scoring import (
  Row,
  check_rows,
  cost_of,
  rows_of,
  score_key,
  scored,
  sweep_of,
)
from jaxinf.data.subsets import Subsets
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.evaluation import truths
from jaxinf.evaluation.lds import (
  LDS,
  Retrained,
  lds,
  ordered_predictions,
  predicted_and_measured,
)
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.evaluation.truths import load_truth
from jaxinf.runs.config import as_dict
from jaxinf.runs.run import Run, scores_of
from jaxinf.runs.sampling import load_samples
from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import spearman
from jaxinf.scores.sweep import Sweep

ALL = "all"  # in place of a name: every truth of the package
_SECTIONS = ("data", "model", "train", "sample", "retrain", "measure", "curvature", "score")
# Where files lie is different wherever a truth is read.
_PLACES = ("data.data_dir", "data.path", "data.captions", "sample.conditioning", "score.clip")


def truth(run: Run) -> None:
  """Keeps what retraining said and what our methods predicted; prints their tables.

  Methods that take a gradient take that of the first of score.measurements.

  Raises:
    ValueError: a measurement was taken of no model yet, no method is influence, or what `scored`
      raises.
  """
  rows = _rows(run)
  check_measurements(run, run.config.measure.measurements)
  check_rows(run)
  place = folder(run, "truth")
  scores = {row.name: score_key(run, row) for row in rows}
  key = {"scores": scores, "measured": measured_key(run)}
  artifacts.cached(place, key, lambda: _made(run, rows), label="truth", anew=True)
  print(_leaderboards(place))


def judged(name: str, scores: Path | None) -> str:
  """What a truth says of scores in a file or folder; without any, how our own methods do.

  Args:
    name: of a truth, or the folder of one; "all": every truth of the package.
    scores: an .npz file as `Scores.load` takes it, the folder that the stage `attribute` left, or
      one of those in score/ that `evaluate` left.

  Raises:
    ValueError: an unknown name, or scores that the truth cannot judge.
  """
  if scores is None:
    return "\n\n".join(map(_leaderboards, truths.truths() if name == ALL else (name,)))
  found, sweep = load_truth(name), read_scores(scores)
  evaluations = (found.evaluate(sweep, m, name=scores.stem) for m in found.retrained)
  return "\n\n".join([found.summary(), *(one.table() for one in evaluations)])


def read_scores(path: Path) -> Sweep:
  """Scores from a file or folder; those of a proof's method are at several dampings.

  Raises:
    ValueError: there is nothing at the path, or no scores.
  """
  path = path.expanduser()
  if not path.is_dir():
    return Sweep((Scores.load(path),))
  artifact = artifacts.read(path)
  if not {"query_ids", "train_ids"} <= set(artifact.arrays):
    raise ValueError(
      f"{path} holds no scores. Give the folder of the stage attribute, one of those in score/ "
      "that the stage evaluate left, or an .npz file."
    )
  return sweep_of(artifact) if "values" in artifact.arrays else Sweep((scores_of(artifact),))


def _leaderboards(name: str | Path) -> str:
  found = load_truth(name)
  return "\n\n".join([found.summary(), *(found.leaderboard(m) for m in found.retrained)])


def _rows(run: Run) -> list[Row]:
  """Our methods, with the gradient of one measurement, influence first."""
  first = run.config.score.measurements[:1]
  rows = [row for row in rows_of(run) if row.measurement in (None, *first)]
  ordered = sorted(rows, key=lambda row: row.method != REFERENCE)
  if ordered[0].method != REFERENCE:
    raise ValueError(f"Tests of a truth are against {REFERENCE}: add it to score.methods.")
  return ordered


def _made(run: Run, rows: Sequence[Row]) -> Outcome:
  """The arrays and notes of a truth."""
  subsets, samples = subsets_of(run), load_samples(run)
  measured = {name: retrained(run, name) for name in run.config.measure.measurements}
  given: Any = samples.conditioning or {}
  arrays: dict[str, np.ndarray] = {
    "membership": np.packbits(subsets.membership, axis=1),
    "train_ids": subsets.train_ids,
    "query_ids": np.asarray(samples.ids),
    "samples": np.asarray(samples.data),
    **{truths.GIVEN + name: np.asarray(array) for name, array in given.items()},
    **{truths.VALUES + name: one.values for name, one in measured.items()},
  }
  params = artifacts.read(run.folder("train")).arrays
  arrays |= {truths.PARAMS + name: array for name, array in params.items()}
  references: list[dict[str, Any]] = []
  standard: dict[str, LDS] = {}
  for row in rows:
    for scores, notes in _chosen(row, scored(run, row), subsets, measured):
      found = {name: lds(scores, subsets, one) for name, one in measured.items()}
      predicted = ordered_predictions(scores, subsets, measured[next(iter(measured))])
      arrays[f"{truths.PREDICTED}{len(references):03d}"] = predicted.astype(np.float32)
      tests = {name: truths.summary_of(one, standard.get(name)) for name, one in found.items()}
      references.append({"name": row.name, **notes, "lds": tests, "cost": cost_of(run, row)})
      standard = standard or found
  notes = {"references": references, **_notes(run, measured)}
  return arrays, notes, f"{len(measured)} measurements and {len(references)} predictions"


def _chosen(
  row: Row, sweep: Sweep, subsets: Subsets, measured: Mapping[str, Retrained]
) -> list[tuple[Scores, dict[str, Any]]]:
  """The scores of a row at its default damping, and where others predict a measurement best."""
  default = row.kind.default_damping
  if default is None or not row.kind.sweeps:  # damping does not change their order
    return [(sweep[0], {"damping": None, "best_for": (), "default": True})]
  best_for: dict[float, list[str]] = {default: []}
  for name, one in measured.items():
    means = [spearman(*predicted_and_measured(x, subsets, one), axis=0).mean() for x in sweep]
    best_for.setdefault(float(sweep.dampings[np.argmax(means)]), []).append(name)
  return [
    (sweep.at(damping), {"damping": damping, "best_for": best, "default": damping == default})
    for damping, best in best_for.items()
  ]


def _notes(run: Run, measured: Mapping[str, Retrained]) -> dict[str, Any]:
  """What is to be known of the run, and how far any method could come."""
  sections = {name: as_dict(getattr(run.config, name)) for name in _SECTIONS}
  for place in _PLACES:
    section, field = place.split(".")
    del sections[section][field]
  return {
    "settings": {"seed": run.config.seed, **sections},
    "process": run.process.settings,
    "num_classes": run.num_classes,
    "data_content": run.data_content,
    "limits": {name: _limits(one) for name, one in measured.items()},
  }


def _limits(measured: Retrained) -> dict[str, Any]:
  """Exact retraining and the noise ceiling; None where no two seeds share two subsets."""
  try:
    oracle, ceiling = retraining_lds(measured), noise_ceiling(measured)
  except ValueError:
    return {"oracle": None, "ceiling": None}
  found = {"ceiling": ceiling.ceiling, "interval": ceiling.interval}
  return {"oracle": truths.summary_of(oracle), "ceiling": found}
