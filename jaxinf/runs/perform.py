"""Performing a stage of a run by its name: one life cycle for all that are kept."""

import pkgutil
from collections.abc import Sequence
from typing import Any

from jaxinf.core.registry import named
from jaxinf.engine import artifacts, processes
from jaxinf.runs.latents import preparations
from jaxinf.runs.run import Run, check_attributable, check_conditioning, key_of
from jaxinf.runs.stage import STAGES, hint


def perform(run: Run, name: str, *words: str) -> Any:
  """Does a stage, and returns its artefact where it is kept: a finished one is reused.

  Args:
    run: the experiment.
    name: of STAGES. Those of each model are done for one after another, and the first's artefact is
      returned.
    words: that follow the name, as in `study lds`.

  Raises:
    ValueError: an unknown name, or what the stage refuses; StaleArtifact where the folder holds the
      result of other settings or inputs.
  """
  stage = named(STAGES, name, "stage")
  check_attributable(run, _measurements(run, (name, *stage.steps)))
  check_conditioning(run)
  if not stage.does:
    return [perform(run, step) for step in steps_of(run, name)][-1]
  if stage.models == "each" and run.config.train.num_models != 1:
    first, *_ = [perform(model, name, *words) for model in run.each_model()]
    return first
  if not stage.kept:
    return stage.function(run, *words)
  if run.devices is not None and processes.count() > 1:
    raise ValueError("Several processes use all their devices: leave the run's devices None.")
  _ = run.model  # fields that do not fit it are refused before anything begins
  folder = run.folder(name)
  artifact = artifacts.cached(
    folder,
    key_of(run, name),
    lambda: stage.function(run),
    label=f"{name}, model {run.model_number}" if run.model_number else name,
    alone=stage.alone,
    anew=stage.anew,
    then=hint(name).format(folder=folder.absolute()),
  )
  if stage.shows and processes.is_primary():
    print(pkgutil.resolve_name(stage.shows)(artifact))
  return artifact


def steps_of(run: Run, name: str) -> tuple[str, ...]:
  """The stages that a line is made of, for this run: those of latents come before train."""
  return (*preparations(run), *STAGES[name].steps)


def _measurements(run: Run, names: Sequence[str]) -> list[str]:
  """What the sections of these stages say is to be attributed, those with one measurement."""
  sections = [getattr(run.config, section) for name in names if (section := STAGES[name].section)]
  return [section.measurement for section in sections if hasattr(section, "measurement")]
