"""Products of the exact GGN with vectors: a forward-mode and a reverse-mode derivative of each."""

import dataclasses
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.types import ApplyFn, Array, Batch
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.process import Process

# Vectors whose products are made together. As many tangents of the batch's activations are in
# memory; more of them share nothing further, because the network itself is evaluated once.
AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class ProductKernel:
  """Kernel from (params, v, num, seed) to Σ over pairs of (2 w/D) JᵀJ v, in the precision of v.

  v and the sums are lists of the leaves at positions `covered` of the parameters, [R, …] for R
  vectors; J has these parameters only. The network is linearised once a batch, and R products made
  with that. Where R is more than AT_ONCE it is a multiple of it, of which the first `num` are made
  and the others left at zero, so that one program serves any number of vectors up to R.

  The network is evaluated at parameters cast to the precision of v: of one that is kept in
  bfloat16, this is the GGN at the same point, without the rounding on the way.

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
    params, vectors, num, seed = operands
    dtype = vectors[0].dtype
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
    chex.assert_trees_all_equal_shapes_and_dtypes(part, [v[0] for v in vectors])
    # TF32 or bfloat16, the default on accelerators, would be an approximation itself.
    with jax.default_matmul_precision("highest"):
      predicted, push_forward = jax.linearize(outputs, part)
      pull_back = jax.linear_transpose(push_forward, part)
      size = math.prod(predicted.shape[1:])
      weights = batch.mask.astype(dtype) * pairs.weights.astype(dtype) * (2 / size)
      weights = weights.reshape(-1, *(1,) * (predicted.ndim - 1))

      def product(vector):
        (found,) = pull_back(push_forward(vector) * weights)
        return found

      return _by_chunks(jax.vmap(product), vectors, num)


def _by_chunks(
  function: Callable[[list[Array]], list[Array]], vectors: list[Array], num: Array
) -> list[Array]:
  """function(vectors) of the first `num` vectors, AT_ONCE at a time; zeros for the rest."""
  if len(vectors[0]) <= AT_ONCE:
    return function(vectors)

  def step(chunk, found):
    begin = chunk * AT_ONCE
    cut = lambda v: jax.lax.dynamic_slice_in_dim(v, begin, AT_ONCE)
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, begin, 0)
    return jax.tree.map(put, found, function(jax.tree.map(cut, vectors)))

  chunks = (num + AT_ONCE - 1) // AT_ONCE
  zeros = jax.tree.map(jnp.zeros_like, vectors)
  return jax.lax.fori_loop(jnp.zeros_like(chunks), chunks, step, zeros)
