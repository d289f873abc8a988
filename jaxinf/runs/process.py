"""The diffusion process that a config describes."""

import dataclasses
from collections.abc import Callable

from jaxinf.core.registry import named
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import SCHEDULES, Schedule
from jaxinf.runs.sections import DiffusionConfig


def process_of(section: DiffusionConfig) -> Process:
  """The process of the section `diffusion`.

  Raises:
    ValueError: unknown names, a field is set that is of other predictions, or fields that do not
      fit together. The fields of the schedule are left alone where time is continuous, so that a
      config can change its prediction and nothing else.
  """
  make = named(_PROCESSES, section.prediction, "diffusion.prediction")
  for field in dataclasses.fields(section):
    readers = _READERS.get(field.name, tuple(_PROCESSES))
    if section.prediction not in readers and getattr(section, field.name) != field.default:
      raise ValueError(
        f"diffusion.{field.name} is read where diffusion.prediction is {' or '.join(readers)}; "
        f"it is {section.prediction}."
      )
  return make(section)


def _schedule(section: DiffusionConfig) -> Schedule:
  make = named(SCHEDULES, section.schedule, "diffusion.schedule")
  schedule = make(section.num_steps, section.beta_start, section.beta_end)
  return schedule.with_zero_terminal_snr() if section.zero_terminal_snr else schedule


_PROCESSES: dict[str, Callable[[DiffusionConfig], Process]] = {
  "epsilon": lambda section: Process.epsilon(_schedule(section), section.weight),
  "sample": lambda section: Process.sample(_schedule(section), section.weight),
  "v": lambda section: Process.v(_schedule(section), section.weight),
  "flow": lambda section: Process.flow(section.time, shift=section.shift, weight=section.weight),
  "edm": lambda section: Process.edm(section.sigma_data),
}

# Field → the predictions that read it; the others refuse it, but at its default.
_READERS = {
  "zero_terminal_snr": ("epsilon", "sample", "v"),
  "weight": ("epsilon", "sample", "v", "flow"),
  "time": ("flow",),
  "shift": ("flow",),
  "sigma_data": ("edm",),
}
