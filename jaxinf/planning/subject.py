"""What the trials of all stages have in common."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.core.random import example_numbers
from jaxinf.core.types import Batch, Eigenbasis, PyTree
from jaxinf.curvature.memory import LayerMemory, layer_memory
from jaxinf.diffusion.model import Task
from jaxinf.engine import processes
from jaxinf.engine.devices import mapped
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, register
from jaxinf.layers.specs import Layer
from jaxinf.planning.trials import Program, Stopwatch, random_like, random_params
from jaxinf.runs.run import Run, fresh_task


@dataclasses.dataclass(frozen=True)
class Subject:
  """A run, and the stopwatch that its kernels are tried with."""

  run: Run
  watch: Stopwatch

  @functools.cached_property
  def task(self) -> Task:
    """The model, with random parameters."""
    task = fresh_task(self.run)
    return dataclasses.replace(task, params=random_params(task.params))

  @functools.cached_property
  def devices(self) -> list[jax.Device]:
    return engine.local_devices(self.run.devices)

  @functools.cached_property
  def ids(self) -> np.ndarray:
    """[N] numbers of the training images."""
    return example_numbers(self.run.dataset.ids)

  @functools.cached_property
  def selection(self) -> Selection:
    """Which parameters the curvature covers."""
    config = self.run.config.curvature
    diagonal = (".",) if config.method == "diagonal" else config.diagonal
    return Selection(config.skip, diagonal, config.only)

  @functools.cached_property
  def _registered(self) -> tuple[Registration, float]:
    began = time.perf_counter()
    task, shape = self.task, self.run.dataset.image_shape
    return register(task.apply_fn, task.params, shape, self.selection), time.perf_counter() - began

  @property
  def model(self) -> Registration:
    """The covered layers."""
    return self._registered[0]

  @property
  def registering(self) -> float:
    """Seconds that finding the layers takes, in each stage that needs them."""
    return self._registered[1]

  @functools.cached_property
  def memory(self) -> tuple[LayerMemory, ...]:
    """What the curvature of each layer takes."""
    config, shape = self.run.config.curvature, self.run.dataset.image_shape
    targets = math.prod(shape) if config.estimator == "exact" else config.targets
    return layer_memory(
      self.model, self.task.params, shape, method=config.method, sharing=config.sharing,
      targets=targets, batch_size=math.ceil(config.batch_size / len(self.devices)),
    )  # fmt: skip

  @functools.cached_property
  def disk_rate(self) -> float:
    """Bytes a second."""
    return self.watch.disk_rate(self.run.workdir)

  @property
  def params_bytes(self) -> int:
    return sum(4 * leaf.size for leaf in jax.tree.leaves(self.task.params))

  @property
  def gradient_bytes(self) -> int:
    """Of one row: the gradient matrices of the covered layers."""
    return sum(4 * math.prod(layer.matrix_shape) for layer in self.model.layers)

  @property
  def eigenbases_bytes(self) -> int:
    """Of all layers, float64."""
    return sum(layer.eigenbasis for layer in self.memory)

  @property
  def images_bytes(self) -> int:
    """Of the training images."""
    return self.run.dataset.images.nbytes

  def batches(self, num_rows: int, batch_size: int) -> tuple[int, int]:
    """(rows of a batch over all local devices, batches of this process), as drivers make them."""
    num = len(self.devices)
    size = math.ceil(min(batch_size, num_rows) / num) * num
    begin, end = processes.share(num_rows)
    return size, max(1, math.ceil((end - begin) / size))

  def sharded(self, rows: engine.Rows, size: int, number: int) -> Batch:
    """Batch `number` of rows, sharded; from the first again after the last."""
    begin = number * size % max(1, len(rows) - size + 1)
    return engine.shard(rows.padded_batch(begin, size), self.devices)


def one_device(batch: PyTree) -> PyTree:
  """The part of a sharded batch that the first device has."""
  return jax.tree.map(lambda x: x[0], batch)


def mapped_program(
  subject: Subject,
  kernel: engine.Kernel,
  operands: PyTree,
  rows: engine.Rows,
  size: int,
  **how: Any,
) -> Program:
  """A kernel on batches of `size` rows, as the drivers run it; `how` are fields of `Program`."""
  function = mapped(kernel, tuple(subject.devices))
  return Program(function, operands, functools.partial(subject.sharded, rows, size), **how)


def random_basis(layer: Layer) -> Eigenbasis:
  """Random numbers in the place of a layer's eigenbasis, float32."""
  *groups, d_out, d_in = layer.matrix_shape
  struct = lambda *shape: jax.ShapeDtypeStruct((*groups, *shape), jnp.float32)
  eigenvalues = random_like(struct(d_out, d_in))
  if layer.structure == "diagonal":
    return Eigenbasis(None, None, eigenvalues)
  both = random_like((struct(d_in, d_in), struct(d_out, d_out)))
  q_in, q_out = (q / np.float32(np.sqrt(q.shape[-1])) for q in both)
  return Eigenbasis(q_in, q_out, eigenvalues)
