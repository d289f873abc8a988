"""The diffusion process that a config describes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxinf.core.registry import named
from jaxinf.diffusion.loss_weights import WEIGHTS, Table, Weight
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import SCHEDULES, Schedule
from jaxinf.diffusion.times import FLOW_LAWS, LogitNormal
from jaxinf.runs.sections import DiffusionConfig


def process_of(section: DiffusionConfig) -> Process:
  """The process of the section `diffusion`.

  Raises:
    ValueError: unknown names, a field is set that is of other predictions, or fields that do not
      fit together. The fields of the schedule are left alone where time is continuous, so that a
      config can change its prediction and nothing else.
  """
  make = named(_PROCESSES, section.prediction, "diffusion.prediction")
  for name, readers in _READERS.items():
    _check_unset(section, name, "prediction", readers)
  return make(section)


def _schedule(section: DiffusionConfig) -> Schedule:
  if section.schedule in _TABLES:
    _check_table(section.table, section.num_steps, "table", f"schedule {section.schedule}")
    schedule = _TABLES[section.schedule](section.table)
  else:
    _check_unset(section, "table", "schedule", tuple(_TABLES))
    make = named({**SCHEDULES, **_TABLES}, section.schedule, "diffusion.schedule")
    schedule = make(section.num_steps, section.beta_start, section.beta_end)
  return schedule.with_zero_terminal_snr() if section.zero_terminal_snr else schedule


def _weight(section: DiffusionConfig) -> Weight | None:
  if section.weight != "table":
    _check_unset(section, "weight_table", "weight", ("table",))
  if section.weight not in WEIGHTS:
    _check_unset(section, "weight_gamma", "weight", tuple(WEIGHTS))
  if section.weight is None:
    return None
  if section.weight == "table":
    _check_table(section.weight_table, section.num_steps, "weight_table", "weight table")
    return Table(section.weight_table)
  known: dict[str, type[Any]] = {**WEIGHTS, "table": Table}
  return named(known, section.weight, "diffusion.weight")(**_given(gamma=section.weight_gamma))


def _flow(section: DiffusionConfig) -> Process:
  law = named(FLOW_LAWS, section.time, "diffusion.time")
  if law is not LogitNormal:
    for name in ("time_mean", "time_std"):
      _check_unset(section, name, "time", ("logit_normal",))
  time = law(**_given(mean=section.time_mean, std=section.time_std))
  return Process.flow(time, shift=section.shift, weight=_weight(section))


def _edm(section: DiffusionConfig) -> Process:
  normal = _given(p_mean=section.time_mean, p_std=section.time_std)
  return Process.edm(section.sigma_data, raw=section.raw, **normal)


def _given(**values: float | None) -> dict[str, float]:
  """The values that are set; the others keep their defaults."""
  return {name: value for name, value in values.items() if value is not None}


def _check_unset(
  section: DiffusionConfig, name: str, choice: str, readers: tuple[str, ...]
) -> None:
  """ValueError where `name` is set and `choice` is none of those that read it."""
  field = next(field for field in dataclasses.fields(section) if field.name == name)
  chosen = getattr(section, choice)
  if chosen not in readers and getattr(section, name) != field.default:
    raise ValueError(
      f"diffusion.{name} is read where diffusion.{choice} is {' or '.join(readers)}; it is "
      f"{chosen}."
    )


def _check_table(table: tuple[float, ...], num_steps: int, name: str, reader: str) -> None:
  if len(table) != num_steps:
    raise ValueError(
      f"diffusion.{reader} needs diffusion.{name} with {num_steps} numbers, one for each of "
      f"diffusion.num_steps; it has {len(table)}."
    )


_TABLES: dict[str, Callable[..., Schedule]] = {
  "betas": Schedule.from_betas,
  "alpha_bars": Schedule.from_alpha_bars,
}

_PROCESSES: dict[str, Callable[[DiffusionConfig], Process]] = {
  "epsilon": lambda section: Process.epsilon(_schedule(section), _weight(section)),
  "sample": lambda section: Process.sample(_schedule(section), _weight(section)),
  "v": lambda section: Process.v(_schedule(section), _weight(section)),
  "flow": _flow,
  "edm": _edm,
}

# Field → the predictions that read it; the others refuse it, but at its default.
_DISCRETE = ("epsilon", "sample", "v")
_READERS = {
  "table": _DISCRETE,
  "zero_terminal_snr": _DISCRETE,
  "weight": (*_DISCRETE, "flow"),
  "weight_gamma": (*_DISCRETE, "flow"),
  "weight_table": _DISCRETE,
  "time": ("flow",),
  "time_mean": ("flow", "edm"),
  "time_std": ("flow", "edm"),
  "shift": ("flow",),
  "sigma_data": ("edm",),
  "raw": ("edm",),
}
