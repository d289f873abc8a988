"""From queries to the operand of the score pass: their gradients, preconditioned and compressed.

A few queries at a time: each one's gradients are averaged within a replicate of draws,
preconditioned for every damping and compressed before the next ones come, so that memory holds the
compressed rows and little else. The rows of one layer are damping-major, then query-major: row (l,
q, a) is that of damping l, query q and group a of its draws.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from jaxinf.attribution.kernels import GradientKernel, Replicate
from jaxinf.compression.compression import Compression
from jaxinf.core.checks import checked_damping
from jaxinf.core.damping import Damping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Array, Matrices, PyTree
from jaxinf.curvature.curvature import Curvature, ExactCurvature
from jaxinf.diffusion.measurements import Measurement
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import Kernel, numerics
from jaxinf.engine.maps import stream_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.register import layers_of

_CHECKED_QUERIES = 4  # kept uncompressed too, for each damping


@dataclasses.dataclass(frozen=True)
class QueryRows:
  """The preconditioned query gradients of a score pass, on the host.

  Attributes:
    compressed: layer name → pytree with leading axis R = L · Q · A.
    checked: positions [L · C · A] of the rows that are kept uncompressed too: those of the first
      C queries of each damping, in the primary process.
    exact: layer name → those rows [L · C · A, …, d_out, d_in].
    solves: [L] how well the systems of each damping were solved: the relative "residuals" of the
      Q · A rows and how many "iterations" each took. Empty where nothing was to be solved.
  """

  compressed: dict[str, PyTree]
  checked: np.ndarray
  exact: Matrices
  solves: tuple[dict[str, list], ...] = ()


def query_rows(
  curvature: Curvature,
  gradient_batches: Iterator[Matrices],
  *,
  num_rows: int,
  dampings: Sequence[Damping],
  compression: Compression,
  groups: int = 1,
  checkpoint: Checkpointing | None = None,
) -> QueryRows:
  """Preconditions and compresses query gradients as they come.

  Args:
    curvature: H.
    gradient_batches: layer name → ∇m [b, …, d_out, d_in], this process's share of the Q · A rows
      in order, a few at a time.
    num_rows: Q · A.
    dampings: L of them.
    compression: of the rows.
    groups: A.
    checkpoint: where solves with the exact GGN are kept and gone on from.
  """
  solves = not curvature.has_eigenbasis
  if solves:  # a solve is a computation of all processes' rows
    gradient_batches = iter([_everyones_rows(gradient_batches, num_rows)])
  parts: list[dict[str, list[PyTree]]] = [collections.defaultdict(list) for _ in dampings]
  exact: list[dict[str, list[np.ndarray]]] = [collections.defaultdict(list) for _ in dampings]
  begin, end = processes.share(num_rows)
  num_checked = min(_CHECKED_QUERIES * groups, (end - begin) // groups * groups)
  done = 0
  how_well: dict[int, dict[str, list]] = {}
  for grads in gradient_batches:
    for i, matrices, solved in _preconditioned(curvature, grads, dampings, checkpoint):
      how_well |= {i: solved} if solved else {}
      for name, rows in matrices:
        compressed = _compress(compression, rows, curvature.eigenvalues(name))
        parts[i][name].append(jax.tree.map(np.asarray, compressed))
        if done < num_checked:
          exact[i][name].append(np.asarray(rows[: num_checked - done]))
    done += len(next(iter(grads.values())))
  gather = lambda x: x if solves else processes.gathered(x, num_rows)
  joined = lambda *arrays: gather(np.concatenate(arrays))
  over_dampings = lambda *arrays: np.concatenate(arrays)
  return QueryRows(
    compressed={
      layer.name: jax.tree.map(
        over_dampings, *(jax.tree.map(joined, *part[layer.name]) for part in parts)
      )
      for layer in curvature.layers
    },
    checked=np.concatenate([i * num_rows + np.arange(num_checked) for i in range(len(dampings))]),
    exact={
      layer.name: np.concatenate([rows for some in exact for rows in some[layer.name]])
      for layer in curvature.layers
      if num_checked
    },
    solves=tuple(how_well[i] for i in sorted(how_well)),
  )


def gradient_kernel(
  curvature: Curvature,
  examples: Examples,
  measurement: Measurement,
  draws: Draws,
  precision: str | None = None,
) -> GradientKernel:
  """The kernel of gradients in a curvature's layers, for rows of such examples.

  Raises:
    ValueError: the process has no such measurement, or the examples or the model's layers are not
      those that the curvature was fitted for.
  """
  model = curvature.model
  measurement.check_gradient(model.process)
  check_conditioning(curvature, examples)
  layers = layers_of(
    model, examples, curvature.selection, axes=measurement.axes, precision=precision
  )
  if layers.layers != curvature.layers:
    raise ValueError("The curvature has other layers than the model: fit it for this model.")
  replicate = Replicate.of(draws, examples.augmentation)
  return GradientKernel(layers, measurement, model.process, replicate)


def check_conditioning(curvature: Curvature, examples: Examples) -> None:
  """Raises ValueError unless both have conditioning or neither has."""
  if curvature.settings["conditional"] != (examples.conditioning is not None):
    raise ValueError(
      "The curvature was fitted with conditioning, or these examples have it: one of both."
    )


def gradient_batches(
  kernel: Kernel, operands: PyTree, queries: Examples, draws: Draws, compute: Compute
) -> Iterator[Matrices]:
  """The gradients of this process's share of (query, replicate) rows, as they come."""
  return stream_batches(
    kernel,
    operands,
    Rows.of(queries, draws.replicates),
    batch_size=compute.rows(draws),
    label="query gradients",
    unit="(query, replicate) rows",
    devices=compute.devices,
  )


def _preconditioned(
  curvature: Curvature,
  grads: Matrices,
  dampings: Sequence[Damping],
  checkpoint: Checkpointing | None,
) -> Iterator[tuple[int, Iterable[tuple[str, Array]], dict[str, list]]]:
  """Yields (number of a damping, layers with their rows, how well they were solved) for each."""
  if not isinstance(curvature, ExactCurvature):
    for i, damping in enumerate(dampings):
      yield i, curvature.precondition_rows(grads, damping), {}
    return
  for damping, solved, residuals in curvature.solutions(
    grads, [checked_damping(d) for d in dampings], checkpoint
  ):
    how_well = {
      "residuals": residuals.relative.tolist(),
      "iterations": residuals.iterations.tolist(),
    }
    yield list(dampings).index(damping), solved.items(), how_well


def _everyones_rows(batches: Iterator[Matrices], num_rows: int) -> Matrices:
  """All processes' rows at once."""
  whole = jax.tree.map(lambda *x: np.concatenate(x), *batches)
  return jax.tree.map(lambda x: processes.gathered(x, num_rows), whole)


@numerics()
@functools.partial(jax.jit, static_argnums=0)
def _compress(compression: Compression, rows: Array, eigenvalues: Array) -> PyTree:
  return compression.compress(rows, eigenvalues)
