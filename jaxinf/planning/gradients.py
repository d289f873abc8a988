"""Training gradients on trial, and kernels on them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.attribution.kernels import TRAIN, DrawGroups, gradient_kernel, gradient_operands
from jaxinf.core.types import PyTree
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine.devices import mapped
from jaxinf.layers.per_example import checked_draws
from jaxinf.layers.precision import in_precision
from jaxinf.layers.register import register
from jaxinf.planning.subject import Subject, mapped_program, one_device
from jaxinf.planning.trials import Program, Trial, num_operations, random_like, times
from jaxinf.runs.run import draw_design
from jaxinf.runs.sections import AttributeConfig


@dataclasses.dataclass(frozen=True)
class Gradients:
  """The kernel of training gradients in the stage attribute.

  Gradients of queries, and of an index, are told from it by their number of (image, draw) pairs,
  so that nothing as large is compiled for them.

  Attributes:
    trial: of a batch.
    operations: of a batch, on all local devices.
    size: rows of a batch over all local devices.
    group_size: pairs of a row.
  """

  trial: Trial
  operations: float | None
  size: int
  group_size: int

  def seconds_of(self, pairs: float) -> float | None:
    """Of gradients of so many pairs."""
    return times(self.trial.batch, pairs / (self.size * self.group_size))

  def operations_of(self, pairs: float) -> float | None:
    """Likewise."""
    return times(self.operations, pairs / (self.size * self.group_size))


@dataclasses.dataclass(frozen=True)
class Draws:
  """How the stage attribute splits its draws.

  Attributes:
    group_size: draws in a group.
    rounds: of `draw_groups` groups, at most.
    query_draws: of a query.
  """

  group_size: int
  rounds: int
  query_draws: int

  @classmethod
  def of(cls, config: AttributeConfig) -> "Draws":
    """As `influence` does; ValueError where they do not split."""
    a_round = config.stop.group_size * config.draw_groups if config.auto_draws else config.draws
    default = 256 if config.auto_draws else config.draws
    query_draws = default if config.query_draws is None else config.query_draws
    checked_draws(a_round, config.draw_groups, "draws", "draw_groups")
    checked_draws(query_draws, config.query_groups, "query_draws", "query_groups")
    return cls(a_round // config.draw_groups, max(1, config.draws // a_round), query_draws)


def try_gradients(subject: Subject) -> Gradients:
  """Tries the kernel of training gradients."""
  run, config, task = subject.run, subject.run.config.attribute, subject.task
  size = Draws.of(config).group_size
  model = subject.model
  if config.precision is not None:
    network = in_precision(task.apply_fn, config.precision)
    model = register(network, task.params, run.dataset.image_shape, subject.selection)
  groups = DrawGroups(run.config.seed, size, draw_design(config.design, run.dataset.random_flip))
  kernel = gradient_kernel(model, LOSS, task.schedule, groups)
  operands = jax.tree.map(np.asarray, gradient_operands(task.params, TRAIN))
  rows = engine.Rows(run.dataset.images, subject.ids, config.draw_groups)
  num_rows, _ = subject.batches(len(rows), max(1, config.batch_size // size))
  trial = subject.watch.program(mapped_program(subject, kernel, operands, rows, num_rows))
  batch = one_device(subject.sharded(rows, num_rows, 0))
  operations = times(num_operations(kernel, operands, batch), len(subject.devices))
  return Gradients(trial, operations, num_rows, size)


def try_on_gradients(
  subject: Subject, kernel: engine.Kernel, operands: PyTree, num_rows: int, **how: Any
) -> tuple[Trial, float | None]:
  """Tries a kernel on the gradients of a batch, which are on the devices; and its operations.

  Args:
    subject: the run.
    kernel: kernel(operands, gradients of some rows).
    operands: on the host.
    num_rows: of a batch, over all devices.
    how: further fields of the `Program`.
  """
  each = math.ceil(num_rows / len(subject.devices))
  gradients = random_like({
    layer.name: jax.ShapeDtypeStruct((each, *layer.matrix_shape), jnp.float32)
    for layer in subject.model.layers
  })  # fmt: skip
  on_devices = functools.cache(lambda: engine.replicate(gradients, subject.devices))
  function = mapped(kernel, tuple(subject.devices))
  trial = subject.watch.program(Program(function, operands, lambda number: on_devices(), **how))
  operations = num_operations(kernel, operands, gradients)
  return trial, times(operations, len(subject.devices))
