"""Samples made anew of the same noise by retrained models: one artefact that grows with them.

A row is (model, number of the sample). What is there is never made again, and a model whose samples
are all there need not be kept.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxinf.benchmark.retraining import common_key, folder, load_params
from jaxinf.engine import artifacts, processes
from jaxinf.engine.progress import Progress
from jaxinf.engine.resources import measured
from jaxinf.runs.run import Run, content_of_stage, own_settings
from jaxinf.runs.sampling import regenerated

_PLACE = "counterfactual/samples"


class Wanted(NamedTuple):
  """Samples that are to be there."""

  numbers: tuple[int, ...]  # of samples
  models: str  # the stage in whose folder the model lies


def regenerate(run: Run, wanted: Mapping[str, Wanted]) -> None:
  """Makes the samples by trained models (by name) where they are not there yet."""
  if processes.count() > 1:
    raise ValueError("Samples of retrained models are made by one process: start it alone.")
  missing, have = unfinished(run, wanted), _rows(_read(run))
  with Progress("samples by retrained models", len(missing), "models") as progress:
    for model in sorted(missing):
      asked = wanted[model]
      numbers = np.array([n for n in asked.numbers if (model, n) not in have])
      with measured() as cost:
        pictures = regenerated(run, load_params(run, model, asked.models), numbers)
      _append(run, model, numbers, pictures, cost)
      progress.advance(1)


def unfinished(run: Run, wanted: Mapping[str, Wanted]) -> set[str]:
  """The models of which not all samples that are wanted are there."""
  have = _rows(_read(run)) if wanted else {}
  lacks = lambda model, asked: any((model, number) not in have for number in asked.numbers)
  return {model for model, asked in wanted.items() if lacks(model, asked)}


def pictures_of(run: Run, pairs: Sequence[tuple[str, int]]) -> np.ndarray:
  """[len(pairs), …] the samples of these (model, number of the sample), as the data are."""
  found = _read(run)
  have = _rows(found)
  return found["pictures"][[have[pair] for pair in pairs]]


def _append(
  run: Run, model: str, numbers: np.ndarray, pictures: np.ndarray, cost: Mapping[str, float]
) -> None:
  before = _read(run)
  new = {"models": np.array([model] * len(numbers)), "numbers": numbers, "pictures": pictures}
  joined = lambda name: np.concatenate([before[name], new[name]]) if before else new[name]
  arrays = {name: joined(name) for name in new}
  artifacts.write(folder(run, _PLACE), _key(run), arrays, notes={}, cost=cost)


def _read(run: Run) -> Mapping[str, np.ndarray]:
  """The arrays so far, empty where there are none; StaleArtifact where of other settings."""
  place = folder(run, _PLACE)
  return artifacts.read(place).arrays if artifacts.finished(place, _key(run)) else {}


def _rows(found: Mapping[str, np.ndarray]) -> dict[tuple[str, int], int]:
  """(model, number of the sample) → row."""
  if not found:
    return {}
  pairs = zip(found["models"].tolist(), found["numbers"].tolist(), strict=True)
  return {pair: row for row, pair in enumerate(pairs)}


def _key(run: Run) -> dict:
  """What the samples depend on, apart from which models and samples they are."""
  return common_key(run) | {
    "sample": own_settings(run, "sample"),
    "samples_content": content_of_stage(run, "sample"),
    "steps": run.config.train.steps,
  }
