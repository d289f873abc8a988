"""What training, sampling and curvature take."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.types import PyTree
from jaxinf.curvature.decompose import DECOMPOSERS
from jaxinf.curvature.eigenbasis import eigh_on_device, eigh_on_host
from jaxinf.curvature.fit import Fit, partition
from jaxinf.curvature.targets import checked_targets
from jaxinf.diffusion import sampler
from jaxinf.diffusion.schedule import SCHEDULES
from jaxinf.networks import training
from jaxinf.planning.cost import StageCost
from jaxinf.planning.subject import Subject, mapped_program, one_device, random_basis
from jaxinf.planning.trials import Call, Program, Trial, added, num_bytes, num_operations, times

_TRIAL_STEPS = 10  # of sampling
_TIMED_ROWS = 640  # factors up to this size are decomposed, larger ones extrapolated


def train_cost(subject: Subject) -> StageCost:
  """Steps, and the state that they change: parameters, their EMA, and two moments of Adam."""
  run, config = subject.run, subject.run.config.train
  dataset, seed = run.dataset, run.config.seed
  begin = lambda: training.init_state(run.model, dataset.image_shape, config, seed)
  params = subject.task.params
  state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(begin))
  state = state.replace(params=params, ema_params=params)
  sums, update = training.train_step(
    run.model, run.schedule, config, random_flip=dataset.random_flip, seed=seed
  )
  num = engine.num_step_devices(run.devices)
  size = math.ceil(config.batch_size / num) * num

  def batch(number: int) -> training.TrainRows:
    places = np.arange(size)
    images = dataset.images[(number * size + places) % len(dataset)]
    mask = (places < config.batch_size).astype(np.float32)
    rows = training.TrainRows(images, places.astype(np.uint32), mask)
    return engine.shard_of_step(rows, run.devices)

  step = engine.parallel_step(sums, update, run.devices)
  trial = subject.watch.program(Program(step, state, batch, carried=True))
  beginning = subject.watch.call(begin, repeats=0).first
  each = num_operations(
    lambda state, rows: update(state, sums(state, rows)), state, one_device(batch(0))
  )
  saves = math.ceil(config.steps / config.checkpoint_every)
  state_bytes, written = num_bytes(state), subject.params_bytes
  return StageCost(
    "train", config.steps, "steps",
    operations=times(each, config.steps * len(subject.devices)),
    seconds={
      "compiling": trial.compiling + beginning,
      "batches": times(trial.batch, config.steps),
      "disk": (saves * state_bytes + written) / subject.disk_rate,
    },
    device={"state": state_bytes, "gradients": subject.params_bytes, "workspace": trial.workspace},
    host={"images": subject.images_bytes, "state": state_bytes},
    disk={"checkpoints": min(2, saves) * state_bytes, "parameters": written},
  )  # fmt: skip


def sample_cost(subject: Subject) -> StageCost:
  """Samples, by a few steps of the sampler on a short schedule."""
  run, config = subject.run, subject.run.config.sample
  task, shape, section = subject.task, run.dataset.image_shape, run.config.diffusion
  steps = section.num_steps if config.num_steps is None else config.num_steps
  tried = min(steps, _TRIAL_STEPS)
  short = SCHEDULES[section.schedule](tried, section.beta_start, section.beta_end)
  how: dict[str, Any] = dict(sampler=config.sampler, keep_trajectory=config.keep_trajectory)

  def kernel(params, batch):
    keys = fold_in_each(stream(run.config.seed, "sample"), batch.ids)
    images, states = sampler.sample(task.apply_fn, params, short, keys, shape, **how)
    return images if states is None else (images, jnp.moveaxis(states, 0, 1))

  def in_full(params, keys):
    return sampler.sample(
      task.apply_fn, params, task.schedule, keys, shape, num_steps=config.num_steps, **how
    )

  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.num_samples))
  written = num_bytes(jax.eval_shape(in_full, task.params, keys))  # refuses impossible settings
  rows = engine.Rows(None, np.arange(config.num_samples, dtype=np.uint32))
  size, batches = subject.batches(len(rows), config.batch_size)
  each = size // len(subject.devices)
  trial = subject.watch.program(
    mapped_program(subject, kernel, task.params, rows, size, fetched=True)
  )
  x_t = jax.ShapeDtypeStruct((each, *shape), jnp.float32)
  forward = num_operations(
    task.apply_fn, task.params, x_t, jax.ShapeDtypeStruct((each,), jnp.int32)
  )
  return StageCost(
    "sample", config.num_samples, "samples",
    operations=times(forward, steps * batches * len(subject.devices)),
    seconds={
      "compiling": trial.compiling,
      "batches": times(trial.batch, batches * steps / tried),
      "disk": written / subject.disk_rate,
    },
    device={
      "parameters": subject.params_bytes,
      "images": math.ceil(written / config.num_samples) * each,
      "workspace": trial.workspace,
    },
    host={"images": subject.images_bytes + written},
    disk={"images": written},
  )  # fmt: skip


def curvature_cost(subject: Subject) -> StageCost:
  """The passes of a fit, of one partition for all, and the decomposition of factors."""
  run, config, watch = subject.run, subject.run.config.curvature, subject.watch
  rows = engine.Rows(run.dataset.images, subject.ids, config.draws)
  size, batches = subject.batches(len(rows), config.batch_size)
  groups = partition(subject.model.layers, config.partitions)
  tried = _kernels(subject, rows, groups[0])
  trials: list[Trial] = []
  operations: list[float | None] = []
  tracing = 0.0  # once more, for the shapes of the sums
  for kernel, operands in tried:
    shapes = functools.partial(jax.eval_shape, kernel, operands, rows.padded_batch(0, size))
    tracing += watch.call(shapes, repeats=0).first
    trials.append(watch.program(mapped_program(subject, kernel, operands, rows, size)))
    batch = one_device(subject.sharded(rows, size, 0))
    operations.append(num_operations(kernel, operands, batch))
  passes = len(groups) * batches
  most = lambda field: max(
    sum(getattr(m, field) for m in subject.memory if m.layer.name in names) for names in groups
  )
  sums, bases = most("sums"), subject.eigenbases_bytes
  kept = sums * len(subject.devices) if tried else 0
  saves = math.ceil(batches / config.checkpoint_every) * len(groups) * len(tried)
  return StageCost(
    "curvature", len(rows), "pairs",
    operations=times(added(operations), passes * len(subject.devices)),
    seconds={
      "compiling": subject.registering
      + len(groups) * (tracing + sum(trial.compiling for trial in trials)),
      "batches": times(added(trial.batch for trial in trials), passes),
      "eigendecomposition": decomposition_seconds(subject) if tried else 0.0,
      "disk": (bases + saves * kept) / subject.disk_rate,
    },
    device={
      "parameters": subject.params_bytes, "sums": sums, "rotations": most("rotations"),
      "workspace": max((trial.workspace for trial in trials), default=0),
    },
    host={"images": subject.images_bytes, "sums": kept, "eigenbases": bases},
    disk={"eigenbases": bases, "partial sums": kept},
    notes=_curvature_notes(config),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Rehearsal(Fit):
  """A fit that collects the kernels of its passes, with their operands, and sums zeros."""

  kernels: list = dataclasses.field(default_factory=list)

  def _reduce(self, kernel: engine.Kernel, operands: PyTree, label: str, part: str) -> PyTree:
    del label, part
    self.kernels.append((kernel, operands))
    shapes = jax.eval_shape(kernel, operands, self.rows.padded_batch(0, 1))
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def _kernels(subject: Subject, rows: engine.Rows, names: list[str]) -> list:
  """(kernel, operands) of every pass over the layers `names`."""
  config, task, model = subject.run.config.curvature, subject.task, subject.model.only(names)
  if config.method == "identity" or (config.method == "cg" and config.solver.sketch_rank):
    return []
  targets = checked_targets(
    task, subject.run.dataset.image_shape, None, len(rows), config.estimator, config.targets
  )
  settings = dict(
    method=config.method, sharing=config.sharing, estimator=config.estimator, targets=targets,
    seed=subject.run.config.seed, solver=None, random_flip=subject.run.dataset.random_flip,
  )  # fmt: skip
  fit = _Rehearsal(task, model, rows, settings, config.batch_size)
  fit.first_pass(model)
  if config.method in ("ekfac", "cg"):
    fit.second_pass(model, {layer.name: random_basis(layer) for layer in model.layers})
  return fit.kernels


def decomposition_seconds(subject: Subject) -> float:
  """Seconds for the factors of all layers: one of each size is tried, and its time grows as d³."""
  sizes: dict[int, int] = {}  # rows → how many such factors
  for layer in subject.model.layers:
    if layer.structure == "kronecker":
      *groups, d_out, d_in = layer.matrix_shape
      for d in (d_out, d_in):
        sizes[d] = sizes.get(d, 0) + math.prod(groups)
  where = subject.run.config.curvature.decompose
  if where not in DECOMPOSERS:
    raise ValueError(f"Unknown decompose {where!r}; there are: {', '.join(DECOMPOSERS)}.")
  tried = sorted({min(d, _TIMED_ROWS) for d in sizes})
  found = {d: _decomposition(subject, where, d) for d in tried}
  compiling = sum(c.first - c.again for c in found.values()) if where == "devices" else 0.0
  each = {d: found[min(d, _TIMED_ROWS)].again * max(1, d / _TIMED_ROWS) ** 3 for d in sizes}
  shared = len(subject.devices) if where == "devices" else 1
  return compiling + sum(each[d] * count for d, count in sizes.items()) / shared


def _decomposition(subject: Subject, where: str, size: int) -> Call:
  """Seconds for a factor with that many rows."""
  rows = np.random.default_rng(size).standard_normal((size, size))
  factor = rows @ rows.T / size
  decompose = jax.jit(eigh_on_device) if where == "devices" else eigh_on_host
  # The shortest of a few: beside other processes, LAPACK's threads wait for one another.
  return subject.watch.call(lambda: decompose(factor), repeats=3)


def _curvature_notes(config: Any) -> tuple[str, ...]:
  found = []
  if config.partitions > 1:
    found.append("one partition was timed, and stands for the others.")
  if config.method == "cg" and config.solver.sketch_rank:
    found.append("nothing is fitted for cg: the solves of the stage attribute take the time.")
  return tuple(found)
