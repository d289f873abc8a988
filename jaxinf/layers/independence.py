"""Whether a network's output for one example depends on the others of its batch.

Gradients and curvature of single examples have no meaning where it does, and would change with the
batch size. Such are batch normalisation that takes its statistics from the batch, a mean or an
attention over the batch axis, and dropout with a fixed key.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.arrays import read_rows
from jaxinf.core.types import PyTree
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import network_output
from jaxinf.diffusion.process import Process
from jaxinf.engine.kernels import numerics

# Two uniform numbers for each check, of which the times of the two examples are made.
_TIMES = ((0.3, 0.8), (0.6, 0.05))
# Equal rows differ by rounding alone, where a processor adds up their sums in another order. In the
# mean over an output they may differ by so many units of the coarsest type on the way. Float32 has
# more room, because a deep network amplifies its roundings some hundred times: 1e-4 is still far
# below what any mean over two examples as different as these changes.
_ROUNDINGS = 8
_LEAST = 1e-4


def check_independent(
  model: DiffusionModel, shape: tuple[int, ...], conditioning: PyTree = None
) -> None:
  """Raises ValueError where two examples together have other outputs than each alone.

  Alone means beside a copy of itself: one program of two rows serves all, and rounding hardly
  differs. The two examples differ in scale and mean, in time, and in conditioning, so that whatever
  is taken over the batch differs too. It is checked at two pairs of times. That takes one small
  program and six runs of it: of a U-Net of 36 million parameters 6 s on one core, once a model.

  Args:
    model: the model; one whose parameters are shapes alone is not checked.
    shape: of an example.
    conditioning: pytree of arrays [2, …], two rows; None for none.
  """
  params = model.params
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
    return
  network = lambda *inputs: network_output(model.apply_fn, *inputs)
  # TF32 or bfloat16 products, the default on accelerators, would only add rounding.
  with numerics(), jax.default_matmul_precision("highest"):
    rows = _random_rows(shape)
    inputs = [(rows, _network_times(model.process, rows, times), conditioning) for times in _TIMES]
    tolerance = _tolerance(network, params, *inputs[0])
    program = jax.jit(network)
    for given in inputs:
      both = np.asarray(program(params, *given))
      for row in (0, 1):
        twice = jax.tree.map(lambda x, row=row: x[np.array([row, row])], given)
        _compare(both[row], np.asarray(program(params, *twice)), row, tolerance)


def two_rows(conditioning: PyTree) -> PyTree:
  """The first and the last row of each conditioning array [N, …]."""
  ends = lambda x: read_rows(x, np.array([0, x.shape[0] - 1]))
  return jax.tree.map(ends, conditioning)


def _compare(beside: np.ndarray, alone: np.ndarray, row: int, tolerance: float) -> None:
  """Refuses a row's output beside another's, or beside a copy's in either place, if they differ."""
  if not (np.isfinite(alone).all() and np.isfinite(beside).all()):
    return  # an overflow has its own message, with the name of the layer
  size = max(np.linalg.norm(alone[row]), np.linalg.norm(beside))
  place = np.linalg.norm(alone[1] - alone[0])
  others = np.linalg.norm(beside - alone[row])
  if place > tolerance * size:
    raise ValueError(
      "The network gives two equal examples of one batch outputs that differ by "
      f"{place / size:.1%}: gradients of single examples would depend on their places in the "
      "batch. Turn dropout and other noise off (Flax: deterministic=True or train=False), and add "
      "nothing along the batch axis, which is the first."
    )
  if others > tolerance * size:
    raise ValueError(
      f"The network's output for an example changes by {others / size:.1%} with the other example "
      "of its batch: gradients of single examples would depend on the batch. Give batch "
      "normalisation its running averages (Flax: use_running_average=True), and let no mean, no "
      "normalisation and no attention go over the batch axis, which is the first."
    )


def _random_rows(shape: tuple[int, ...]) -> jax.Array:
  """Two inputs [2, *shape]: one N(0, 1), one of another scale and mean."""
  rows = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  rows[1] = 0.4 * rows[1] + 0.5
  return jnp.asarray(rows)


def _network_times(process: Process, rows: jax.Array, uniforms: tuple[float, float]) -> jax.Array:
  """τ [2] of the times that these uniform numbers stand for."""
  t = process.times(jnp.asarray(uniforms, jnp.float32))
  return process.inputs(rows, t)[1]


def _tolerance(network: Any, *inputs: Any) -> float:
  """Relative norm within which outputs of equal inputs agree, by the coarsest type on the way.

  A rounding to bfloat16 turns a difference of one float32 unit into one of its own units.
  """
  traced = jax.make_jaxpr(network)(*inputs)
  types = {dtype for dtype in _types(traced.jaxpr) if jnp.issubdtype(dtype, jnp.floating)}
  coarsest = max((float(jnp.finfo(dtype).eps) for dtype in types), default=0.0)
  return max(_LEAST, _ROUNDINGS * coarsest)


def _types(jaxpr: Any) -> Iterator[Any]:
  """Types of all arrays in a trace, those inside calls, loops and branches among them."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype"))
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_trace):
      if _is_trace(inner):
        yield from _types(inner)


def _is_trace(value: Any) -> bool:
  return hasattr(value, "eqns")
