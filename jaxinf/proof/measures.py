"""The stage `measure`: true measurements of the samples by every retrained model.

One artefact a measurement, `measure/<name>/`, that grows with the models: what it holds is never
measured again, and a model whose measurements are all there need not be kept.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from jaxinf import artifacts, hosts
from jaxinf.config import as_dict
from jaxinf.costs import measured
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.evaluation.lds import Retrained
from jaxinf.evaluation.measuring import Measuring
from jaxinf.progress import Progress
from jaxinf.proof.models import Spec, common_key, folder, load_params, model_key, subset_name
from jaxinf.random import example_numbers
from jaxinf.runs import Run, load_samples, load_task, samples_content
from jaxinf.serving import draw_design

_LOG = logging.getLogger("jaxinf")


def measure_models(
  run: Run, specs: Sequence[Spec], names: Sequence[str], stage: str = "measure",
  models: str = "retrain",
) -> None:  # fmt: skip
  """Measures the samples by the trained models among `specs`, where that is not done yet."""
  if hosts.count() > 1:
    raise ValueError("Measuring takes one process: start it by itself.")
  todo: dict[tuple[str, ...], list[str]] = {}  # models still to be measured → measurements
  for name in names:
    known = set(_read(run, name, stage)["models"])
    absent = tuple(spec.name for spec in specs if spec.name not in known)
    absent = tuple(
      spec.name
      for spec in specs
      if spec.name in absent
      and artifacts.finished(folder(run, models) / spec.name, model_key(run, spec))
    )
    if absent:
      todo.setdefault(absent, []).append(name)
  for absent, wanted in todo.items():
    of = lambda name: measurement_named(name).of
    for _, alike in itertools.groupby(sorted(wanted, key=of), key=of):
      _measure(run, absent, {name: measurement_named(name) for name in alike}, stage, models)


def retrained(run: Run, name: str, num_subsets: int, num_seeds: int) -> Retrained:
  """The measurements [M, K, Q] of one name; NaN where a model was not measured."""
  found = _read(run, name, "measure")
  row_of = {model: row for row, model in enumerate(found["models"].tolist())}
  values = np.full((num_subsets, num_seeds, found["values"].shape[1]), np.nan, np.float32)
  for subset, seed in itertools.product(range(num_subsets), range(num_seeds)):
    if (row := row_of.get(subset_name(subset, seed))) is not None:
      values[subset, seed] = found["values"][row]
  return Retrained(values, found["query_ids"], name)


def of_models(run: Run, name: str, models: Sequence[str], stage: str = "measure") -> np.ndarray:
  """The measurements [len(models), Q] of one name by those models; NaN where not measured."""
  found = _read(run, name, stage)
  row_of = {model: row for row, model in enumerate(found["models"].tolist())}
  nothing = np.full(found["values"].shape[1], np.nan, np.float32)
  rows = [found["values"][row_of[m]] if m in row_of else nothing for m in models]
  return np.array(rows, np.float32).reshape(len(models), -1)


def measured_everywhere(run: Run, names: Sequence[str]) -> set[str]:
  """The models that all of these measurements hold."""
  return set.intersection(*(set(_read(run, name, "measure")["models"]) for name in names))


def key_of_measurement(run: Run, name: str) -> dict:
  """What one measurement depends on, apart from which models it was taken of."""
  config = as_dict(run.config.measure)
  own = {field: config[field] for field in ("draws", "draw_groups", "design")}
  return common_key(run) | {
    "measure": own,
    "measurement": name,
    "samples_content": samples_content(run, measurement_named(name).of),
    "share": run.config.retrain.share,
    "outside_weight": run.config.retrain.outside_weight,
    "steps": {"all": run.config.train.steps, "subset": run.config.retrain.steps},
  }


def _measure(
  run: Run, models: Sequence[str], measurements: Mapping[str, Measurement], stage: str, place: str
) -> None:
  """Adds the measurements by `models` to the artefacts."""
  config, task = run.config.measure, load_task(run)
  samples = load_samples(run)
  (of,) = {measurement.of for measurement in measurements.values()}
  if of not in samples:
    raise ValueError(
      f"{', '.join(measurements)} needs the samples' trajectories, which are not there: sample "
      "with sample.keep_trajectory=True in a new workdir, or leave it out of measure.measurements."
    )
  measuring = Measuring(
    task.apply_fn, task.schedule, samples[of], example_numbers(samples["ids"]), measurements,
    draws=config.draws, draw_groups=config.draw_groups, design=draw_design(config.design),
    seed=run.config.seed, batch_size=config.batch_size, devices=run.devices,
  )  # fmt: skip
  at_once = run.config.retrain.models_at_once
  with Progress("measure", len(models), "models") as progress:
    for i in range(0, len(models), at_once):
      group = list(models[i : i + at_once])
      with measured() as cost:
        params = [load_params(run, name, place) for name in group]
        params += [params[-1]] * (at_once - len(group))  # so that nothing compiles anew
        found = measuring(params)
      for name, values in found.items():
        _append(run, name, group, values.values, values.std_errors, samples["ids"], stage, cost)
      progress.advance(len(group))
  _LOG.info("measure: %s by %d models", ", ".join(measurements), len(models))


def _append(run, name, models, values, std_errors, query_ids, stage, cost) -> None:
  """Adds rows of measurements to an artefact."""
  before = _read(run, name, stage)
  rows = lambda old, new: np.concatenate([old.reshape(-1, *new.shape[1:]), new[: len(models)]])
  arrays = {
    "models": np.concatenate([before["models"], np.array(models)]),
    "values": rows(before["values"], values),
    "std_errors": rows(before["std_errors"], std_errors),
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


def _place(run: Run, name: str, stage: str):
  return folder(run, stage) / artifacts.file_name(name)
