"""Layers and their gradient matrices: kernel and bias as one matrix [d_out, d_in], bias last."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxinf.types import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where one layer's parameters lie in the pytree, and how they make a matrix.

  Attributes:
    name: path of the layer, as "down_blocks_0/resnets_0/conv1".
    kind: "dense" or "conv2d".
    kernel: position of the kernel among the leaves of the parameters.
    bias: position of the bias, or None.
    kernel_shape: as stored.
    order: axes of the kernel, outputs first; the rest become the columns, row-major.
  """

  name: str
  kind: str
  kernel: int
  bias: int | None
  kernel_shape: tuple[int, ...]
  order: tuple[int, ...]

  @property
  def matrix_shape(self) -> tuple[int, int]:
    """(d_out, d_in), the bias counted in d_in."""
    d_out = self.kernel_shape[self.order[0]]
    return d_out, math.prod(self.kernel_shape) // d_out + (self.bias is not None)

  def to_matrix(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
    """The matrix [d_out, d_in] of this layer from the leaves of a pytree like the parameters."""
    kernel = leaves[self.kernel].transpose(self.order)
    matrix = kernel.reshape(kernel.shape[0], -1)
    if self.bias is None:
      return matrix
    return np.concatenate([matrix, leaves[self.bias][:, None]], axis=1)

  def from_matrix(self, matrix: np.ndarray) -> dict[int, np.ndarray]:
    """Leaf position → array; the inverse of `to_matrix`."""
    leaves = {}
    if self.bias is not None:
      leaves[self.bias], matrix = matrix[:, -1], matrix[:, :-1]
    shape = [self.kernel_shape[axis] for axis in self.order]
    inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
    leaves[self.kernel] = matrix.reshape(shape).transpose(inverse)
    return leaves


def to_matrices(layers: Sequence[Layer], tree: PyTree) -> dict[str, np.ndarray]:
  """Layer name → [d_out, d_in] of a pytree shaped like the parameters."""
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


def layer_name(leaf: str) -> str:
  """The layer a leaf belongs to: its path without the last part."""
  return leaf.rpartition("/")[0] or leaf
