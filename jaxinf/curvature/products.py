"""Products of the exact GGN with a vector: a forward-mode and a reverse-mode derivative."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.types import ApplyFn, Array, Batch
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.process import Process


@dataclasses.dataclass(frozen=True)
class ProductKernel:
  """Kernel from (params, v, seed) to Σ over pairs of (2 w/D) JᵀJ v, in the precision of v.

  v and the sums are lists of the leaves at positions `covered` of the parameters; J has these
  parameters only. The network is evaluated at parameters cast to the precision of v: of one that is
  kept in bfloat16, this is the GGN at the same point, without the rounding on the way.

  Attributes:
    apply_fn, process: of the model.
    covered: positions of leaves.
    augmentation: what training does to its examples.
    x64: whether v is float64.
  """

  apply_fn: ApplyFn
  process: Process
  covered: tuple[int, ...]
  augmentation: Augmentation = PLAIN
  x64: bool = False

  def __call__(self, operands, batch: Batch) -> list[Array]:
    params, vector, seed = operands
    dtype = vector[0].dtype
    pairs, _ = curvature_pairs(self.process, seed, batch, self.augmentation)
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    params, pairs = jax.tree.map(cast, (params, pairs))
    leaves, structure = jax.tree.flatten(params)

    def outputs(part):
      replaced = dict(zip(self.covered, part, strict=True))
      tree = jax.tree.unflatten(structure, [replaced.get(i, x) for i, x in enumerate(leaves)])
      given = () if pairs.conditioning is None else (pairs.conditioning,)
      predicted = self.apply_fn(tree, pairs.inputs, pairs.time, *given)
      if self.x64 and predicted.dtype != dtype:
        raise ValueError(
          f"apply_fn returns {predicted.dtype} for {dtype} parameters and data. It casts inside, "
          "so that products would not have the precision asked for: take precision='float32'."
        )
      return predicted.astype(dtype)

    part = [leaves[i] for i in self.covered]
    chex.assert_trees_all_equal_shapes_and_dtypes(part, vector)
    # TF32 or bfloat16, the default on accelerators, would be an approximation itself.
    with jax.default_matmul_precision("highest"):
      predicted, tangents = jax.jvp(outputs, (part,), (vector,))
      size = math.prod(predicted.shape[1:])
      weights = batch.mask.astype(dtype) * pairs.weights.astype(dtype) * (2 / size)
      _, pull_back = jax.vjp(outputs, part)
      (products,) = pull_back(tangents * weights.reshape(-1, *(1,) * (tangents.ndim - 1)))
    return products
