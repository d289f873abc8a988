"""The local devices: steps mapped over them, and arrays that go to and from them.

The package `engine` is the only place with pmap and a device axis.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxinf.core.types import PyTree
from jaxinf.engine import processes
from jaxinf.engine.kernels import AXIS, Program, copying

# Results a device may be ahead of the host, so that it has work while the host takes the last one.
# Each more would be kept in the device's memory.
IN_FLIGHT = 2


def on_all(
  function: Callable, devices: Sequence[jax.Device], donate: bool = False, x64: bool = False
) -> Program:
  """A function of arrays with a device axis, mapped; the first argument is donated on request."""
  return Program(function, devices, donate, x64)


def parallel_step(
  sums: Callable[[PyTree, PyTree], PyTree],
  update: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
  devices: Sequence[jax.Device] | None = None,
  x64: bool = False,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
  """One training step over sharded rows: state, metrics = update(state, Σ sums(state, rows)).

  The sum is over the devices of all processes. Returns step(state, batch) for a state from
  `replicate` and a batch from `shard_of_step`. The state is donated.
  """

  def step(state, batch):
    return update(state, jax.lax.psum(sums(state, batch), AXIS))

  everywhere = None if _spans_processes(devices) else local_devices(devices)
  return Program(step, everywhere, donate=True, x64=x64)


def num_step_devices(devices: Sequence[jax.Device] | None = None) -> int:
  """Devices that a step is spread over: those of all processes, where `devices` is None."""
  return jax.device_count() if _spans_processes(devices) else num_devices(devices)


def shard_of_step(batch: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """This process's part [local devices, b, …] of a step's rows [B, …], the same everywhere."""
  if not _spans_processes(devices):
    return shard(batch, devices)
  num, each = jax.device_count(), jax.local_device_count()
  begin = jax.process_index() * each
  return jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:])[begin : begin + each], batch)


def replicate(
  tree: PyTree, devices: Sequence[jax.Device] | None = None, x64: bool = False
) -> PyTree:
  """Copies a pytree of arrays to every local device: a leading device axis is added.

  Arrays of 64 bits become such of 32 unless x64.
  """
  return copying(tuple(local_devices(devices)), x64)(tree)


def shard(batch: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
  """Splits rows [B, …] evenly into [devices, B / devices, …]."""
  num = num_devices(devices)
  return jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), batch)


def first(tree: PyTree) -> PyTree:
  """The first device's copy of a replicated pytree, as NumPy arrays."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)


def num_devices(devices: Sequence[jax.Device] | None = None) -> int:
  return len(local_devices(devices))


def local_devices(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
  return list(jax.local_devices() if devices is None else devices)


def _spans_processes(devices: Sequence[jax.Device] | None) -> bool:
  return devices is None and processes.count() > 1
