"""The stage `measure`: true measurements of the samples by every retrained model.

One artefact a measurement, `measure/<name>/`, that grows with the models: what it holds is never
measured again, and a model whose measurements are all there need not be kept.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxinf.benchmark.retraining import (
  Spec,
  common_key,
  folder,
  load_params,
  model_key,
  subset_name,
)
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.engine import artifacts, processes
from jaxinf.engine.progress import Progress
from jaxinf.engine.resources import measured
from jaxinf.evaluation.lds import Retrained
from jaxinf.evaluation.measuring import Measured
from jaxinf.evaluation.measuring import measure as take_measurements
from jaxinf.runs.run import (
  Run,
  check_measurable,
  content_of_stage,
  load_model,
  own_settings,
)
from jaxinf.runs.sampling import load_samples

_LOG = logging.getLogger("jaxinf")


def measure_models(
  run: Run,
  specs: Sequence[Spec],
  names: Sequence[str],
  stage: str = "measure",
  models: str = "retrain",
) -> None:
  """Measures the samples by the trained models among `specs`, where that is not done yet."""
  if processes.count() > 1:
    raise ValueError("Measuring takes one process: start it alone.")
  check_measurements(run, names)
  todo: dict[tuple[str, ...], list[str]] = {}  # models still to be measured → measurements
  for name in names:
    known = measured_models(run, name, stage)
    absent = tuple(
      spec.name
      for spec in specs
      if spec.name not in known
      and artifacts.finished(folder(run, models) / spec.name, model_key(run, spec))
    )
    if absent:
      todo.setdefault(absent, []).append(name)
  kind = lambda name: measurement_named(name).of
  for absent, wanted in todo.items():
    for _, alike in itertools.groupby(sorted(wanted, key=kind), key=kind):
      _measure(run, absent, {name: measurement_named(name) for name in alike}, stage, models)


def check_measurements(run: Run, names: Sequence[str]) -> None:
  """Raises ValueError unless the process, and the samples, have what these measurements are of."""
  if not names:
    raise ValueError("There are no measurements: name some in measure.measurements.")
  check_measurable(run, names)
  kinds = {measurement_named(name).of for name in names}
  if kinds - {"examples", "trajectories"}:
    raise ValueError("Predicted images are no samples: journey_loss is for journey-trak alone.")
  if "trajectories" in kinds and not run.config.sample.keep_trajectory:
    raise ValueError(
      "Measurements of trajectories need them: set sample.keep_trajectory=True, in a new workdir, "
      "or leave them out of measure.measurements and score.measurements."
    )


def retrained(run: Run, name: str) -> Retrained:
  """The measurements [M, K, Q] of one name; NaN where a model was not measured.

  Raises:
    ValueError: none was.
  """
  config, found = run.config.retrain, _read(run, name, "measure")
  if not len(found["models"]):
    raise ValueError(f"No retrained model was measured by {name} yet: run the stage measure first.")
  names = [
    subset_name(subset, seed)
    for subset in range(config.num_subsets)
    for seed in range(config.num_seeds)
  ]
  values = of_models(run, name, names)
  shape = config.num_subsets, config.num_seeds, -1
  return Retrained(values.reshape(shape), found["query_ids"], name)


def of_models(run: Run, name: str, models: Sequence[str], stage: str = "measure") -> np.ndarray:
  """The measurements [len(models), Q] of one name by those models; NaN where not measured."""
  found = _read(run, name, stage)
  row_of = {model: row for row, model in enumerate(found["models"].tolist())}
  nothing = np.full(found["values"].shape[1], np.nan, np.float32)
  rows = [found["values"][row_of[m]] if m in row_of else nothing for m in models]
  return np.array(rows, np.float32).reshape(len(models), -1)


def measured_models(run: Run, name: str, stage: str = "measure") -> set[str]:
  """The models that were measured by one name."""
  return set(_read(run, name, stage)["models"].tolist())


def measured_everywhere(run: Run, names: Sequence[str]) -> set[str]:
  """The models that all of these measurements hold; none where there are no samples yet."""
  if not artifacts.has_manifest(run.folder("sample")):
    return set()
  return set.intersection(*(measured_models(run, name) for name in names))


def key_of_measurement(run: Run, name: str) -> dict:
  """What one measurement depends on, apart from which models it was taken of."""
  return common_key(run) | {
    "measure": own_settings(run, "measure"),
    "measurement": measurement_named(name).name,
    "samples_content": content_of_stage(run, "sample"),
    "share": run.config.retrain.share,
    "outside_weight": run.config.retrain.outside_weight,
    **({"same_batches": True} if run.config.retrain.same_batches else {}),
    "steps": {"all": run.config.train.steps, "subset": run.config.retrain.steps},
  }


def _measure(
  run: Run, models: Sequence[str], measurements: Mapping[str, Measurement], stage: str, place: str
) -> None:
  """Adds the measurements by `models` to the artefacts."""
  (of,) = {measurement.of for measurement in measurements.values()}
  queries, model, config = load_samples(run, of), load_model(run), run.config.measure
  draws = run.draws(config.draws, config.replicates, config.design)
  compute = run.compute(config.batch_size)
  at_once = run.config.retrain.models_at_once
  with Progress("measure", len(models), "models") as progress:
    for i in range(0, len(models), at_once):
      group = list(models[i : i + at_once])
      with measured() as cost:
        params = [load_params(run, name, place) for name in group]
        params += [params[-1]] * (at_once - len(group))  # so that nothing compiles anew
        found = take_measurements(
          model, params, queries, measurements, draws=draws, compute=compute
        )
      for name, values in found.items():
        _append(run, name, group, values, queries.ids, stage, cost)
      progress.advance(len(group))
  _LOG.info("measure: %s by %d models", ", ".join(measurements), len(models))


def _append(
  run: Run,
  name: str,
  models: Sequence[str],
  found: Measured,
  query_ids: np.ndarray,
  stage: str,
  cost: dict,
) -> None:
  """Adds the measurements of `models` (the first rows of `found`) to an artefact."""
  before = _read(run, name, stage)
  rows = lambda old, new: np.concatenate([old.reshape(-1, *new.shape[1:]), new[: len(models)]])
  arrays = {
    "models": np.concatenate([before["models"], np.array(models)]),
    "values": rows(before["values"], found.values),
    "std_errors": rows(before["std_errors"], found.std_errors),
    "query_ids": query_ids,
  }
  key = key_of_measurement(run, name)
  artifacts.write(_place(run, name, stage), key, arrays, notes={"measurement": name}, cost=cost)


def _read(run: Run, name: str, stage: str) -> Mapping[str, np.ndarray]:
  """The arrays of a measurement so far; StaleArtifact where it was made with other settings."""
  place = _place(run, name, stage)
  if artifacts.finished(place, key_of_measurement(run, name)):
    return artifacts.read(place).arrays
  empty = np.zeros((0, 0), np.float32)
  return {"models": np.array([], "U1"), "values": empty, "std_errors": empty}


def _place(run: Run, name: str, stage: str) -> Path:
  return folder(run, stage) / artifacts.file_name(name)
