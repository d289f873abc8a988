"""Kernels as values, and the one cache of their compiled programs.

A kernel is pure and sees one unsharded batch: kernel(operands, batch) → pytree. Those of jaxinf are
frozen dataclasses. Two that are equal share a compiled program, however often they are made anew.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.core.types import PyTree
from jaxinf.engine import rehearsal
from jaxinf.engine.rehearsal import AXIS

Kernel = Callable[[PyTree, Any], PyTree]

# Programs are small next to arrays, and compiling one takes seconds: a session with several models,
# measurements and shapes stays within this number.
_MOST_PROGRAMS = 128


@contextlib.contextmanager
def numerics(x64: bool = False) -> Iterator[None]:
  """JAX as jaxinf computes, whatever a user's global flags say: in 32 bits unless asked."""
  with jax.enable_x64(x64), jax.threefry_partitionable(True):
    yield


class Program:
  """A function mapped over devices, which runs in jaxinf's own numerics.

  Args:
    function: of arrays without a device axis.
    devices: of this process; None for those of all processes.
    donate: whether the first argument is given up to the program.
    x64: whether it computes in 64 bits.
  """

  def __init__(
    self,
    function: Callable,
    devices: Sequence[jax.Device] | None,
    donate: bool = False,
    x64: bool = False,
  ):
    donated = (0,) if donate else ()
    self._x64, self._function = x64, function
    self._mapped = jax.pmap(function, axis_name=AXIS, devices=devices, donate_argnums=donated)

  def __call__(self, *arguments: PyTree) -> PyTree:
    with numerics(self._x64):
      return rehearsal.program(self._mapped, self._function)(*arguments)


@functools.lru_cache(maxsize=_MOST_PROGRAMS)
def compiled(kernel: Kernel, devices: tuple[jax.Device, ...]) -> Program:
  """kernel(operands, value) on each device, for replicated operands and sharded values."""
  return Program(kernel, devices, x64=in_64_bits(kernel))


@functools.lru_cache(maxsize=_MOST_PROGRAMS)
def summing(kernel: Kernel, devices: tuple[jax.Device, ...]) -> "Summing":
  """The programs that sum a kernel's outputs over batches."""
  return Summing(kernel, devices)


class Summing:
  """zeros(operands, batch), accumulate(sums, operands, batch), total(sums), place(sums)."""

  def __init__(self, kernel: Kernel, devices: tuple[jax.Device, ...]):
    x64 = in_64_bits(kernel)

    def zeros(operands, batch):
      shapes = jax.eval_shape(kernel, operands, batch)
      return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)

    def accumulate(sums, operands, batch):
      sums = jax.tree.map(jax.numpy.add, sums, kernel(operands, batch))
      # A number to wait for: the sums themselves are donated to the next batch.
      return sums, jax.tree.leaves(sums)[0].ravel()[:1]

    def total(sums):
      return jax.lax.psum(sums, AXIS)

    def place(sums):
      return sums

    self.zeros = Program(zeros, devices, x64=x64)
    self.accumulate = Program(accumulate, devices, donate=True, x64=x64)
    self.total, self.place = Program(total, devices, x64=x64), Program(place, devices, x64=x64)


def in_64_bits(kernel: Kernel) -> bool:
  """Whether the kernel has a true attribute `x64`; most have none, and compute in 32 bits."""
  return bool(getattr(kernel, "x64", False))


@functools.lru_cache(maxsize=_MOST_PROGRAMS)
def on_one_device(function: Callable) -> Callable:
  """A function of arrays on one device, compiled: run(device, *arguments)."""
  program = jax.jit(function)

  def run(device: jax.Device, *arguments: PyTree) -> PyTree:
    with numerics():
      return program(*jax.device_put(arguments, device))

  return run


@functools.cache
def copying(devices: tuple[jax.Device, ...], x64: bool = False) -> Callable[[PyTree], PyTree]:
  """Copies arrays to every device, with a leading device axis; 64 bits become 32 unless x64."""
  program = jax.pmap(lambda _, x: x, axis_name=AXIS, in_axes=(0, None), devices=devices)

  def copy(tree: PyTree) -> PyTree:
    with numerics(x64):
      return program(np.arange(len(devices)), tree)

  return copy
