"""What the curvature of a model takes, layer by layer, before anything is computed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.types import Batch, PyTree
from jaxinf.curvature.kinds import Kind
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.layers.register import Registration
from jaxinf.layers.specs import Layer

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class LayerMemory:
  """Bytes of one layer.

  Attributes:
    layer: the layer.
    sums: on every device while its factors are summed, float32.
    eigenbasis: on the host and on disk, float64: Q_in, Q_out and Λ.
    rotations: on every device in the second pass (EK-FAC, Shampoo): Q_in and Q_out in float32.
    workspace: on a device for one batch: inputs at all positions, and where the second pass is made
      each pair's gradient matrix.
  """

  layer: Layer
  sums: int
  eigenbasis: int
  rotations: int
  workspace: int


def layer_memory(
  layers: Registration,
  model: DiffusionModel,
  row: Batch,
  kind: Kind,
  *,
  batch_size: int,
  augmentation: Augmentation = PLAIN,
) -> tuple[LayerMemory, ...]:
  """The bytes of every layer, from shapes alone.

  Args:
    layers: the registered layers.
    model: the model; shapes of its parameters count.
    row: a batch of one example, of which shapes count.
    kind: of the curvature.
    batch_size: (example, draw) pairs at a time on one device.
    augmentation: of the examples.
  """
  struct: Any = jax.ShapeDtypeStruct
  rows = lambda x: struct((batch_size, *np.shape(x)[1:]), x.dtype)
  batch = jax.tree.map(rows, row)
  num_outputs = math.prod(augmentation.shape(row.data.shape[1:]))
  num = num_outputs if kind.fisher == "exact" else kind.samples
  make = lambda batch: curvature_pairs(model.process, 0, batch, augmentation)[0]

  def sums(params, batch):
    pairs = make(batch)
    cotangents = lambda out: jnp.broadcast_to(out, (num, *out.shape))
    return layers.factor_sums(params, pairs, cotangents, jnp.ones(batch_size), approx=kind.approx)

  shapes = jax.eval_shape(sums, model.params, batch)
  pairs = jax.eval_shape(make, batch)
  positions = layers.positions(model.params, pairs)
  return tuple(
    _of_layer(
      layer,
      _bytes(shapes[layer.name]),
      positions[layer.name] * batch_size,
      batch_size,
      kind.corrects,
    )
    for layer in layers.layers
  )


def memory_table(memory: Sequence[LayerMemory], partitions: Sequence[Sequence[str]]) -> str:
  """The layers' bytes in MiB as aligned text; the last lines are totals, for workspace the most.

  Args:
    memory: of every layer.
    partitions: names of the layers in each, of which the last line shows the largest.
  """
  width = max(len("eigenbases"), *(len(m.layer.name) for m in memory))
  line = lambda name, kind, matrix, *numbers: (
    f"  {name:{width}}  {kind:17} {matrix:>16}" + "".join(f"{n:>12}" for n in numbers)
  )
  fields = ("sums", "rotations", "workspace", "eigenbasis")
  lines = [line("layer", "kind", "matrix", *fields)]
  for m in memory:
    matrix = " × ".join(map(str, m.layer.matrix_shape))
    lines.append(line(m.layer.name, m.layer.kind, matrix, *(_mib(getattr(m, f)) for f in fields)))

  def total(field, names):
    values = [getattr(m, field) for m in memory if m.layer.name in names]
    return max(values) if field == "workspace" else sum(values)  # layers come one after another

  everything = [m.layer.name for m in memory]
  lines.append(line("all layers", "", "", *(_mib(total(f, everything)) for f in fields)))
  if len(partitions) > 1:
    most = [max(total(f, names) for names in partitions) for f in fields[:3]]
    name = f"most of {len(partitions)} partitions"
    lines.append(line(name, "", "", *map(_mib, most), ""))
  return "\n".join(lines)


def _of_layer(
  layer: Layer, sums: int, positions: int, batch_size: int, second_pass: bool
) -> LayerMemory:
  *groups, d_out, d_in = layer.matrix_shape
  num, matrix = math.prod(groups), math.prod(layer.matrix_shape)
  kronecker = layer.structure == "kronecker"
  squares = num * (d_in**2 + d_out**2) if kronecker else 0
  inputs = positions * num * d_in if kronecker else 0
  each_pair = batch_size * matrix if second_pass or not kronecker else 0
  return LayerMemory(
    layer,
    sums=sums,
    eigenbasis=8 * (squares + matrix),
    rotations=4 * squares if second_pass else 0,
    workspace=4 * (inputs + each_pair),
  )


def _bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _mib(num: int) -> str:
  return f"{num / _MIB:,.2f}"
