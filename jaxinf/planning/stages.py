"""The plan of a run: every stage on trial."""

import logging
import time
from collections.abc import Sequence

import jax

from jaxinf.engine import artifacts, processes
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.resources import measured
from jaxinf.planning.attribution import attribute_cost
from jaxinf.planning.cost import Plan, StageCost
from jaxinf.planning.gradients import try_gradients
from jaxinf.planning.indexing import index_cost
from jaxinf.planning.limits import Limits, limits_here
from jaxinf.planning.passes import curvature_cost, sample_cost, train_cost
from jaxinf.planning.subject import Subject
from jaxinf.planning.trials import Stopwatch
from jaxinf.runs.run import Run, key_of

_LOG = logging.getLogger("jaxinf")


def plan(run: Run, *, watch: Stopwatch | None = None, limits: Limits | None = None) -> Plan:
  """What every stage of a run takes here; needs no trained model and leaves nothing behind.

  Args:
    run: whose workdir may hold finished stages, or nothing.
    watch: takes the times; a `Stopwatch` of the run's devices where None.
    limits: of the machine; found out where None.
  """
  began = time.perf_counter()
  devices = jax.local_devices() if run.devices is None else list(run.devices)
  if limits is None:
    limits = limits_here(run.workdir, devices, run.config.index.reserve_mib * 2**20)
  if watch is None:
    shared = None if limits.host is None else limits.host // len(devices)
    watch = Stopwatch(run.devices, shared if limits.device is None else limits.device)
  subject = Subject(run, watch)
  with measured() as process:
    costs = _costs(subject)
  finished, notes = _finished(run, [cost.stage for cost in costs])
  return Plan(
    costs, len(devices), limits, process["peak_host_mib"] * 2**20, finished,
    time.perf_counter() - began, notes,
  )  # fmt: skip


def _costs(subject: Subject) -> tuple[StageCost, ...]:
  costs = []
  for cost in (train_cost, sample_cost, curvature_cost):
    costs.append(cost(subject))
    _LOG.info("plan: tried the kernels of %s", costs[-1].stage)
  gradients = try_gradients(subject)
  costs.append(attribute_cost(subject, gradients))
  if subject.run.config.curvature.method != "cg":  # which has no eigenbasis to keep rows in
    costs.append(index_cost(subject, gradients))
  return tuple(costs)


def show(run: Run) -> Plan:
  """Prints the plan."""
  found = plan(run)
  if processes.is_primary():
    print(found.table())
  return found


def _finished(run: Run, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Those stages whose results are in the workdir, and sentences on those of other settings."""
  found: list[str] = []
  notes: dict[str, None] = {}  # in order, once: what depends on a stale stage says the same
  for name in names:
    try:
      if artifacts.finished(run.folder(name), key_of(run, name)):
        found.append(name)
    except StaleArtifact as error:
      notes[str(error)] = None
    except ValueError:
      continue  # an input is still to come
  return tuple(found), tuple(notes)
