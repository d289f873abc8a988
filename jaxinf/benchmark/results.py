"""Which results a proof by retraining has under a config, and what each of them depends on."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxinf.benchmark.counterfactuals import counterfactual_key
from jaxinf.benchmark.evaluating import evaluate_key
from jaxinf.benchmark.measuring import key_of_measurement
from jaxinf.benchmark.retraining import folder, model_key, subset_specs
from jaxinf.benchmark.scoring import models_of, rows_of, score_key
from jaxinf.engine.artifacts import file_name
from jaxinf.runs.run import Run


def proof_results(run: Run) -> Iterator[tuple[Path, Callable[[], dict[str, Any]]]]:
  """Folder and key of every result; a key raises ValueError where an input of it is not there."""
  for spec in subset_specs(run):
    yield folder(run, "retrain") / spec.name, partial(model_key, run, spec)
  for name in run.config.measure.measurements:
    yield folder(run, "measure") / file_name(name), partial(key_of_measurement, run, name)
  for row in rows_of(run):
    for model in models_of(run, row):
      yield model.folder("score") / file_name(row.name), partial(score_key, model, row)
  yield folder(run, "evaluate"), partial(evaluate_key, run)
  yield run.folder("counterfactual"), partial(counterfactual_key, run)
