"""Products of the exact GGN with a vector: a forward-mode and a reverse-mode derivative."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinf.core.types import Array, Batch
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.objective import predict
from jaxinf.engine import Kernel


def product_kernel(
  task: Task, covered: Sequence[int], seed: int, random_flip: bool = False
) -> Kernel:
  """Kernel from (params, v) to Σ over pairs of (2/D) JᵀJ v, in the precision of v.

  v and the sums are lists of the leaves at positions `covered` of the parameters; J has these
  parameters only.
  """

  def kernel(operands, batch: Batch) -> list[Array]:
    params, vector = operands
    dtype = vector[0].dtype
    pairs, _ = curvature_pairs(task.schedule, seed, batch, random_flip)
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    params, pairs = jax.tree.map(cast, (params, pairs))
    leaves, structure = jax.tree.flatten(params)

    def outputs(part):
      replaced = dict(zip(covered, part, strict=True))
      tree = jax.tree.unflatten(structure, [replaced.get(i, x) for i, x in enumerate(leaves)])
      return predict(task.apply_fn, tree, pairs)

    part = [leaves[i] for i in covered]
    # TF32 or bfloat16, the default on accelerators, would be an approximation itself.
    with jax.default_matmul_precision("highest"):
      predicted, tangents = jax.jvp(outputs, (part,), (vector,))
      if predicted.dtype != dtype:
        raise ValueError(
          f"apply_fn returns {predicted.dtype} for {dtype} parameters and images: it casts inside, "
          "so that products would not have the precision asked for."
        )
      weights = batch.mask.astype(dtype) * (2 / math.prod(predicted.shape[1:]))
      _, pull_back = jax.vjp(outputs, part)
      (products,) = pull_back(tangents * weights[:, None, None, None])
    return products

  return kernel
