"""The stage `evaluate`: how well the scores of every method predict every true measurement.

It is derived in minutes from what the other stages keep, and made anew where these have changed.
Scores are read in several ways: of one model or as means over several, as they are or with negative
ones discounted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.benchmark.measuring import check_measurements, key_of_measurement, retrained
from jaxinf.benchmark.retraining import folder, subsets_of
from jaxinf.benchmark.scoring import (
  Row,
  check_rows,
  has_scores,
  models_of,
  rows_of,
  score_key,
  scored,
)
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.evaluation.comparison import DampingLDS, damping_lds
from jaxinf.evaluation.lds import LDS, Retrained, lds, p_text, percent_range
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.runs.output import show
from jaxinf.runs.run import Run
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import NEGATIVE_WEIGHT
from jaxinf.scores.sweep import Sweep

_NO_SIGNAL = (
  "Models of one subset may differ as much as those of different ones: no method can be judged. "
  "Retrain with more seeds, for more steps, or on more subsets."
)

REFERENCE = "influence"  # p-values are of differences from this method, where it is there


@dataclasses.dataclass(frozen=True)
class Readout:
  """A way to predict from scores; the first of all is that of one model's scores as they are.

  Attributes:
    num_models: whose mean is taken.
    negative_weight: of negative scores.
  """

  num_models: int = 1
  negative_weight: float = 1.0

  @property
  def name(self) -> str:
    """In a few words, as a column's head."""
    weight, plain = self.negative_weight, self.negative_weight == 1
    if self.num_models == 1:
      return "as they are" if plain else f"negative × {weight:g}"
    return f"{self.num_models} models" + ("" if plain else f", × {weight:g}")


_NUM_MODELS = (1, 2, 4)  # whose means are judged, beside that of all models


def readouts_of(run: Run) -> tuple[Readout, ...]:
  """As many models as there are, each number of them with both weights of negative scores."""
  total = run.config.train.num_models
  numbers = sorted({num for num in (*_NUM_MODELS, total) if num <= total})
  return tuple(Readout(num, weight) for num in numbers for weight in (1.0, NEGATIVE_WEIGHT))


def evaluate(run: Run) -> None:
  """Scores by every method, and their LDS against every true measurement; prints the tables.

  Tables that are there already, of the same scores and measurements, are printed again.

  Raises:
    ValueError: a measurement was taken of no model yet, or what `scored` raises.
  """
  config = run.config
  check_measurements(run, (*config.measure.measurements, *config.score.measurements))
  check_rows(run)
  artifact = artifacts.cached(
    folder(run, "evaluate"),
    evaluate_key(run),
    lambda: _evaluated(run),
    label="evaluate",
    anew=True,
  )
  tables = artifact.notes["tables"]
  texts = (table_text(target, table) for target, table in tables.items())
  show(run, "\n".join(texts), {"tables": tables})


def evaluate_key(run: Run) -> dict:
  """What the tables depend on: settings of all scores, and the measurements that are there.

  Tables from before there were readouts stay valid, without them, where their scores are gone:
  otherwise results that are kept without scores would be made anew for hours.
  """
  rows = rows_of(run)
  before = {
    "scores": {row.name: score_key(run, row) for row in rows},
    "measured": measured_key(run),
    "num_resamples": run.config.evaluate.num_resamples,
  }
  if run.config.train.num_models > 1:
    before["models"] = {
      row.name: [score_key(model, row) for model in models_of(run, row)[1:]] for row in rows
    }
  kept = artifacts.holds(folder(run, "evaluate"), before)
  if kept and not all(has_scores(run, row) for row in rows):
    return before
  return before | {"readouts": [dataclasses.asdict(readout) for readout in readouts_of(run)]}


def measured_key(run: Run) -> dict:
  """Which measurements there are, of which models."""
  return {
    name: {"key": key_of_measurement(run, name), "content": _content(retrained(run, name))}
    for name in run.config.measure.measurements
  }


def _content(truth: Retrained) -> str:
  return artifacts.fingerprint({"values": truth.values, "query_ids": truth.query_ids})


def _evaluated(run: Run) -> Outcome:
  """A table for each true measurement."""
  rows = {row.name: row for row in rows_of(run)}
  sweeps = {
    name: [scored(model, row) for model in models_of(run, row)] for name, row in rows.items()
  }
  arrays: dict[str, np.ndarray] = {}
  tables: dict[str, Any] = {}
  for target in run.config.measure.measurements:
    truth = retrained(run, target)
    entries, found = _entries(run, rows, sweeps, truth)
    tables[target] = {
      "entries": entries,
      "num_models": int(truth.trained.sum()),
      "num_subsets": len(truth.kept),
      "num_queries": len(truth.query_ids),
      **_oracle(truth, run),
    }
    arrays |= {f"{target}/{name}": values for name, values in found.items()}
  return arrays, {"tables": tables}, f"tables of {len(rows)} rows"


def _entries(
  run: Run,
  rows: Mapping[str, Row],
  sweeps: Mapping[str, Sequence[Sweep]],
  truth: Retrained,
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """A dict a row for the table, and per row its LDS by query."""
  readouts = readouts_of(run)
  found = {
    name: {
      readout.name: _judged(run, row, _mean(sweeps[name], readout.num_models), truth, readout)
      for readout in readouts
      if readout.num_models <= len(sweeps[name])
    }
    for name, row in rows.items()
  }
  of_any = (name for name, row in rows.items() if row.method == REFERENCE)
  references = [f"{REFERENCE}, {truth.measurement}", *of_any]
  reference = next((name for name in references if name in rows), next(iter(rows)))
  own = readouts[0].name
  against = found[reference][own].default
  entries, arrays = [], {}
  for name, row in rows.items():
    first = found[name][own]
    entry = dataclasses.asdict(row) | {"name": name, "reference": reference}
    entry |= first.summaries(against)
    if first.sweep is not None:
      entry["dampings"] = first.sweep.dampings.tolist()
      entry["sweep"] = first.sweep.means.tolist()
      entry["sweep_errors"] = first.sweep.std_errors.tolist()
    entry["readouts"] = {n: judged.summaries(against) for n, judged in found[name].items()}
    entries.append(entry)
    arrays[f"{name}/per query"] = first.default.per_query.astype(np.float32)
  return entries, arrays


@dataclasses.dataclass(frozen=True)
class _Judged:
  """The LDS of one row in one readout: at its default, and over dampings where it has any."""

  default: LDS
  sweep: DampingLDS | None = None

  def summaries(self, against: LDS) -> dict[str, Any]:
    """Of "default", and of "best" on the benchmark; p-values are of differences from `against`."""
    if self.sweep is None:
      return {"default": _summary(self.default, against, None)}
    best = self.sweep.best_on_benchmark
    return {
      "default": _summary(self.default, against, self.sweep.default_damping),
      "best": _summary(best, against, self.sweep.best_damping),
    }


def _mean(sweeps: Sequence[Sweep], num: int) -> Sweep:
  """The mean over the first models, at every damping."""
  return Sweep(map(mean_scores, zip(*sweeps[:num], strict=True)))


def _judged(run: Run, row: Row, sweep: Sweep, truth: Retrained, readout: Readout) -> _Judged:
  options: dict[str, Any] = dict(
    negative_weight=readout.negative_weight,
    seed=run.config.seed,
    num_resamples=run.config.evaluate.num_resamples,
  )
  subsets, default = subsets_of(run), row.kind.default_damping
  if default is None:
    (scores,) = sweep
    return _Judged(lds(scores, subsets, truth, **options))
  found = damping_lds(sweep, subsets, truth, default=default, **options)
  return _Judged(found.default, found)


def _summary(found: LDS, reference: LDS, damping: float | None) -> dict[str, Any]:
  test = None if found is reference else found.against(reference)
  return {
    "damping": damping,
    "mean": found.mean,
    "std_error": found.std_error,
    "interval": found.interval,
    "interval_both": found.interval_both,
    "p_value": None if test is None else test.p_value,
  }


def _oracle(truth: Retrained, run: Run) -> dict[str, Any]:
  """Exact retraining and the noise ceiling, where there are two seeds."""
  if truth.values.shape[1] < 2:
    return {"oracle": None, "ceiling": None}
  found = retraining_lds(
    truth, seed=run.config.seed, num_resamples=run.config.evaluate.num_resamples
  )
  ceiling = noise_ceiling(
    truth, seed=run.config.seed, num_resamples=run.config.evaluate.num_resamples
  )
  return {"oracle": _summary(found, found, None), "ceiling": dataclasses.asdict(ceiling)}


def table_text(target: str, table: Mapping[str, Any]) -> str:
  """The table of one true measurement as aligned text, in %."""
  entries = table["entries"]
  width = max(26, *(len(entry["name"]) for entry in entries))
  head = f"{'method, gradient of':<{width}}{'default':>14}{'over subsets':>16}{'p':>9}"
  lines = [
    f"\nLDS (%) for {target}: {table['num_models']} models of {table['num_subsets']} subsets, "
    f"{table['num_queries']} samples; p against {entries[0]['reference']} at its default",
    f"{head}{'best on benchmark':>20}{'its damping':>13}",
  ]
  for entry in entries:
    line = f"{entry['name']:<{width}}{_cells(entry['default'])}"
    if best := entry.get("best"):
      line += f"{_score(best):>20}{best['damping']:>13.0e}"
    lines.append(line)
  if table["oracle"]:
    lines.append(f"{'exact retraining (oracle)':<{width}}{_cells(table['oracle'])}")
    ceiling = table["ceiling"]
    cell = f"{100 * ceiling['ceiling']:.1f}"
    lines.append(
      f"{'ceiling (perfect scores)':<{width}}{cell:>14}{percent_range(ceiling['interval']):>16}"
    )
    if ceiling["interval"][0] <= 0:
      lines.append(_NO_SIGNAL)
  if "readouts" in entries[0]:
    lines += _readout_lines(entries, width)
  return "\n".join(lines)


def _readout_lines(entries: Sequence[Mapping[str, Any]], width: int) -> list[str]:
  """A row a method and a column a readout: at the default damping, in brackets at the best."""
  names = list(dict.fromkeys(name for entry in entries for name in entry["readouts"]))
  heads = "".join(f"{name:>21}" for name in names)
  lines = [f"{'scores, default (best)':<{width}}{heads}"]
  for entry in entries:
    cells = []
    for name in names:
      found = entry["readouts"].get(name)  # of one model where the row sees none
      best = f" ({100 * found['best']['mean']:.1f})" if found and "best" in found else ""
      cells.append(f"{_score(found['default'])}{best}" if found else "–")
    lines.append(f"{entry['name']:<{width}}" + "".join(f"{cell:>21}" for cell in cells))
  return lines


def _cells(summary: Mapping[str, Any]) -> str:
  cell = p_text(summary["p_value"])
  return f"{_score(summary):>14}{percent_range(summary['interval']):>16}{cell:>9}"


def _score(summary: Mapping[str, Any]) -> str:
  return f"{100 * summary['mean']:.1f} ± {100 * summary['std_error']:.1f}"
