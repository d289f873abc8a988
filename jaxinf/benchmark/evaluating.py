"""The stage `evaluate`: how well the scores of every method predict every true measurement.

It is derived in minutes from what the other stages keep, and made anew where these have changed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.benchmark.measuring import check_measurements, key_of_measurement, retrained
from jaxinf.benchmark.retraining import folder, subsets_of
from jaxinf.benchmark.scoring import Row, check_rows, rows_of, score_key, scored
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.evaluation.comparison import DampingLDS, damping_lds
from jaxinf.evaluation.lds import LDS, Retrained, lds, p_text, percent_range
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.runs.run import Run
from jaxinf.scores.scores import Scores

_NO_SIGNAL = (
  "Models of one subset may differ as much as those of different ones: no method can be judged. "
  "Retrain with more seeds, for more steps, or on more subsets."
)

REFERENCE = "influence"  # p-values are of differences from this method, where it is there


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
  for target, table in artifact.notes["tables"].items():
    print(table_text(target, table))


def evaluate_key(run: Run) -> dict:
  """What the tables depend on: settings of all scores, and the measurements that are there."""
  return {
    "scores": {row.name: score_key(run, row) for row in rows_of(run)},
    "measured": measured_key(run),
    "num_resamples": run.config.evaluate.num_resamples,
  }


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
  sweeps = {name: scored(run, row) for name, row in rows.items()}
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
  sweeps: Mapping[str, Sequence[Scores]],
  truth: Retrained,
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """A dict a row for the table, and per row its LDS by query and its predictions."""
  subsets = subsets_of(run)
  options: dict[str, Any] = dict(
    seed=run.config.seed, num_resamples=run.config.evaluate.num_resamples
  )
  defaults: dict[str, LDS] = {}
  bests: dict[str, DampingLDS] = {}
  for name, row in rows.items():
    if row.kind.default_damping is None:
      (scores,) = sweeps[name]
      defaults[name] = lds(scores, subsets, truth, **options)
      continue
    bests[name] = damping_lds(
      sweeps[name], subsets, truth, default=row.kind.default_damping, **options
    )
    defaults[name] = bests[name].default
  references = [f"{REFERENCE}, {truth.measurement}", *(n for n in rows if n.startswith(REFERENCE))]
  reference = next((name for name in references if name in rows), next(iter(rows)))
  entries, arrays = [], {}
  for name, row in rows.items():
    entry = dataclasses.asdict(row) | {"name": name, "reference": reference}
    entry["default"] = _summary(defaults[name], defaults[reference], row.kind.default_damping)
    if name in bests:
      best = bests[name]
      entry["best"] = _summary(best.best_on_benchmark, defaults[reference], best.best_damping)
      entry["dampings"] = best.dampings.tolist()
      entry["sweep"] = best.means.tolist()
      entry["sweep_errors"] = best.std_errors.tolist()
    entries.append(entry)
    arrays[f"{name}/per query"] = defaults[name].per_query.astype(np.float32)
  return entries, arrays


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
  return "\n".join(lines)


def _cells(summary: Mapping[str, Any]) -> str:
  cell = p_text(summary["p_value"])
  return f"{_score(summary):>14}{percent_range(summary['interval']):>16}{cell:>9}"


def _score(summary: Mapping[str, Any]) -> str:
  return f"{100 * summary['mean']:.1f} ± {100 * summary['std_error']:.1f}"
