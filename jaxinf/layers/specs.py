"""Layers and their gradient matrices: kernel and bias as one matrix [d_out, d_in], bias last."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import Array, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where one layer's parameters lie in the pytree, and how they make a matrix.

  Attributes:
    name: path of the layer, as "down_blocks_0/resnets_0/conv1"; of the parameter for a scale or
      shift.
    kind: "dense", "conv2d", "conv_transpose2d", "embed", "scale", …
    structure: "kronecker", or "diagonal" where there are no factors.
    kernel: position of the kernel among the leaves of the parameters.
    bias: position of the bias, or None.
    kernel_shape: as stored.
    bias_shape: as stored, or None.
    order: axes of the kernel: those that become rows first, then those that become columns.
    num_rows_axes: how many become rows.
    groups: of a grouped convolution; each has a matrix of its own.
  """

  name: str
  kind: str
  structure: str
  kernel: int
  bias: int | None
  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...] | None
  order: tuple[int, ...]
  num_rows_axes: int
  groups: int

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """(d_out, d_in), the bias counted in d_in; (groups, d_out, d_in) where there are groups."""
    d_out = math.prod(self.kernel_shape[axis] for axis in self.order[: self.num_rows_axes])
    d_in = math.prod(self.kernel_shape) // d_out + (self.bias is not None)
    return (d_out, d_in) if self.groups == 1 else (self.groups, d_out // self.groups, d_in)

  @property
  def matrix_rows(self) -> int:
    """Outputs of the layer at one position: d_out, of all groups together."""
    return math.prod(self.matrix_shape[:-1])

  def to_matrix(self, leaves: Sequence[Array]) -> Any:
    """The matrix [..., (groups,) d_out, d_in] from leaves [..., *shape] like the parameters.

    NumPy arrays stay on the host; JAX arrays give a JAX computation.
    """
    xp = jnp if isinstance(leaves[self.kernel], jax.Array) else np
    kernel = xp.asarray(leaves[self.kernel])
    lead = kernel.ndim - len(self.kernel_shape)
    kernel = kernel.transpose((*range(lead), *(axis + lead for axis in self.order)))
    batch, rows = kernel.shape[:lead], self.matrix_shape[:-1]
    matrix = kernel.reshape((*batch, *rows, -1))
    if self.bias is None:
      return matrix
    bias = xp.asarray(leaves[self.bias]).reshape((*batch, *rows, 1))
    return xp.concatenate([matrix, bias], axis=-1)

  def from_matrix(self, matrix: Array) -> dict[int, Array]:
    """Leaf position → array; the inverse of `to_matrix`, and on the host or not likewise."""
    leaves: dict[int, Array] = {}
    batch = matrix.shape[: matrix.ndim - len(self.matrix_shape)]
    if self.bias is not None:
      assert self.bias_shape is not None
      leaves[self.bias] = matrix[..., -1].reshape((*batch, *self.bias_shape))
      matrix = matrix[..., :-1]
    shape = [self.kernel_shape[axis] for axis in self.order]
    inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
    lead = len(batch)
    kernel = matrix.reshape((*batch, *shape))
    leaves[self.kernel] = kernel.transpose((*range(lead), *(axis + lead for axis in inverse)))
    return leaves


def layer_of(block: Any, indices: tuple[int, ...], params: PyTree) -> Layer:
  """Where the block's parameters, the leaves `indices`, lie, and how they make a matrix."""
  rows, columns = block.axes
  leaves, names = jax.tree.leaves(params), leaf_names(params)
  kernel, bias = indices[0], (*indices, None)[1]
  return Layer(
    name=names[kernel]
    if block.structure == "diagonal"
    else _shared_path(*(names[i] for i in indices)),
    kind=block.form.kind,
    structure=block.structure,
    kernel=kernel,
    bias=bias,
    kernel_shape=tuple(leaves[kernel].shape),
    bias_shape=None if bias is None else tuple(leaves[bias].shape),
    order=(*rows, *columns),
    num_rows_axes=len(rows),
    groups=block.groups,
  )


def _shared_path(kernel: str, bias: str | None = None) -> str:
  """What the paths of a layer's parameters begin with: its module."""
  parts = kernel.split("/")
  if bias is None:
    return "/".join(parts[:-1]) or kernel
  pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(parts, bias.split("/"), strict=False))
  return "/".join(part for part, _ in pairs) or kernel


def to_matrices(layers: Sequence[Layer], tree: PyTree) -> dict[str, np.ndarray]:
  """Layer name → [..., d_out, d_in] of a pytree shaped like the parameters (… axes in front)."""
  leaves = jax.tree.leaves(tree)
  return {layer.name: layer.to_matrix(leaves) for layer in layers}


def from_matrices(layers: Sequence[Layer], matrices: Mapping[str, np.ndarray], params: Params):
  """A pytree like `params`, with zeros for parameters outside the layers."""
  leaves, treedef = jax.tree.flatten(params)
  result = [np.zeros_like(leaf) for leaf in leaves]
  for layer in layers:
    for position, array in layer.from_matrix(matrices[layer.name]).items():
      result[position] = array
  return jax.tree.unflatten(treedef, result)


def leaf_names(params: Params) -> list[str]:
  """Paths of the leaves, as "conv1/kernel", in the order of jax.tree.leaves."""
  paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(params))
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
