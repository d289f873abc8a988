"""The plan of a run: every stage rehearsed."""

import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxinf.core.registry import named
from jaxinf.curvature.kinds import ExactGGN
from jaxinf.engine import artifacts, processes
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.resources import measured
from jaxinf.planning.cost import Plan, StageCost
from jaxinf.planning.latents import latent_costs
from jaxinf.planning.limits import Limits, limits_here
from jaxinf.planning.line import attribute_cost, curvature_cost, index_cost, sample_cost, train_cost
from jaxinf.planning.proof import proof_costs
from jaxinf.planning.reduced import Subject
from jaxinf.runs import output
from jaxinf.runs.run import Run, key_of, kind_of_config
from jaxinf.runs.stage import STAGES

_LOG = logging.getLogger("jaxinf")


def plan(
  run: Run,
  line: str = "all",
  *,
  clock: Callable[[], float] = time.perf_counter,
  limits: Limits | None = None,
) -> Plan:
  """What every stage of a run takes here; needs no trained model and leaves nothing behind.

  Args:
    run: whose workdir may hold finished stages, or nothing.
    line: "all", to which the index is added, or "benchmark", the proof by retraining.
    clock: seconds.
    limits: of the machine; found out where None.

  Raises:
    ValueError: an unknown line, or what a stage refuses.
  """
  costs = named({"all": _main_line, "benchmark": _benchmark}, line, "line to plan")
  began = time.perf_counter()
  devices = jax.local_devices() if run.devices is None else list(run.devices)
  if limits is None:
    limits = limits_here(run.workdir, devices, run.config.index.reserve_mib * 2**20)
  shared = None if limits.host is None else limits.host // len(devices)
  with _scratch(run.workdir.absolute()) as folder:
    most = shared if limits.device is None else limits.device
    subject = Subject(run, folder, clock, most)
    _ = subject.sampling_steps, run.model  # what is impossible is refused before anything begins
    with measured() as process:  # of what has few arrays of its own
      found = [*latent_costs(subject), train_cost(subject)]
    for cost in costs(subject):
      _LOG.info("plan: rehearsed %s", cost.stage)
      found.append(cost)
  found = [cost.times(run.config.train.num_models) if _is_of_each(cost) else cost for cost in found]
  finished, notes = finished_stages(run, [cost.stage for cost in found])
  return Plan(
    tuple(found), len(devices), limits, process["peak_host_mib"] * 2**20, finished,
    time.perf_counter() - began, notes,
  )  # fmt: skip


def _is_of_each(cost: StageCost) -> bool:
  """Whether each model takes as much; evaluate scores by each, its few other methods are cheap."""
  return STAGES[cost.stage].models == "each" or cost.stage == "evaluate"


@contextlib.contextmanager
def _scratch(workdir: Path) -> Iterator[Path]:
  """A folder on the disk of the workdir, shared by all processes and thrown away in the end."""
  while not workdir.exists():
    workdir = workdir.parent
  (number,) = processes.of_primary(np.array([secrets.randbelow(2**31)]))
  folder = workdir / f".jaxinf-plan-{number}"
  try:
    folder.mkdir(exist_ok=True)
    yield folder
    processes.wait_for_all("planned")
  finally:
    if processes.is_primary():
      shutil.rmtree(folder, ignore_errors=True)


def _main_line(subject: Subject) -> Iterator[StageCost]:
  yield sample_cost(subject)
  cost, curved = curvature_cost(subject)
  yield cost
  yield attribute_cost(subject, curved)
  if not isinstance(kind_of_config(subject.run.config.curvature), ExactGGN):
    yield index_cost(subject, curved)  # the exact curvature has no eigenbasis to keep rows in


def _benchmark(subject: Subject) -> Iterator[StageCost]:
  yield sample_cost(subject)
  yield from proof_costs(subject)


def show(run: Run, line: str = "all") -> Plan:
  """Prints the plan."""
  found = plan(run, line)
  output.show(run, found.table(), found.as_dict())
  return found


def finished_stages(run: Run, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Those stages whose results are in the workdir, and sentences on those of other settings."""
  found: list[str] = []
  notes: dict[str, None] = {}  # in order, once: what depends on a stale stage says the same
  for name in names:
    try:
      models = run.each_model() if STAGES[name].models == "each" else [run]
      if STAGES[name].kept and all(
        artifacts.finished(model.folder(name), key_of(model, name)) for model in models
      ):
        found.append(name)
    except StaleArtifact as error:
      notes[str(error)] = None
    except ValueError:
      continue  # an input is still to come
  return tuple(found), tuple(notes)
