"""Finds a model's layers with kfac-jax, and taps their inputs and output gradients.

One forward and backward pass of a batch of (example, draw) pairs gives every layer's inputs a and
output gradients g. From these come the Kronecker factors (sums of a aᵀ and g gᵀ) and the gradients
of single examples (sums of g aᵀ over an example's own pairs) at the speed of an ordinary batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax

from jaxinf.curvature.blocks import BLOCKS, gradient_matrices
from jaxinf.curvature.coverage import ADVICE, Coverage, cover
from jaxinf.curvature.layers import Layer
from jaxinf.diffusion.objective import Noised
from jaxinf.types import ApplyFn, KroneckerFactors, Matrices, Params

# From the network's output [B, H, W, C] to the gradient there of what is differentiated.
Cotangents = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Registration:
  """A model's covered layers, and kernels on them.

  Attributes:
    layers: the covered layers.
    coverage: what became of every parameter.
  """

  layers: tuple[Layer, ...]
  coverage: Coverage
  _blocks: dict[str, Any]  # of KroneckerBlock
  _layer_data: Callable

  def factor_sums(
    self, params: Params, pairs: Noised, cotangents: jax.Array, weights: jax.Array
  ) -> dict[str, KroneckerFactors]:
    """Layer name → factors summed over pairs with weights [B].

    Args:
      params: the parameters.
      pairs: B (example, draw) pairs.
      cotangents: [B, H, W, C] gradients at the network's output, whose second moment is the loss's
        Hessian there.
      weights: [B].
    """
    data = self._layer_data(params, pairs, lambda out: cotangents)
    sums = {}
    for name, block in self._blocks.items():
      state = block.init(jax.random.key(0), None, None, False)
      state = block.update_curvature_matrix_estimate(
        state, data[name], ema_old=0.0, ema_new=weights, identity_weight=0.0, batch_size=1
      )
      sums[name] = KroneckerFactors(*(factor.value for factor in state.factors))
    return sums

  def gradients(
    self, params: Params, pairs: Noised, cotangents: Cotangents, *, rows: int
  ) -> Matrices:
    """Layer name → gradients [rows, d_out, d_in], each summed over B / rows consecutive pairs."""
    data = self._layer_data(params, pairs, cotangents)
    return {
      name: gradient_matrices(
        block.tap(data[name]), rows=rows, has_bias=block.number_of_parameters == 2
      )
      for name, block in self._blocks.items()
    }


def register(
  apply_fn: ApplyFn, params: Params, image_shape: tuple[int, ...], skip: Sequence[str]
) -> Registration:
  """Registers the layers of a model; ValueError with the coverage table where that fails.

  Args:
    apply_fn: the network, traced by kfac-jax: plain, un-jitted, float32.
    params: the parameters.
    image_shape: (H, W, C).
    skip: regular expressions on parameter paths to leave out.
  """

  def tagged(params, x_t, t):
    out = apply_fn(params, x_t, t)
    kfac_jax.register_squared_error_loss(out)
    return jnp.zeros(())

  estimator = kfac_jax.BlockDiagonalCurvature(
    tagged, params_index=0, layer_tag_to_block_ctor=BLOCKS
  )
  # Two pairs: with one, kfac-jax could not tell a batch axis from an axis of size 1.
  try:
    estimator.finalize((params, jnp.zeros((2, *image_shape)), jnp.zeros(2, jnp.int32)))
  except Exception as error:  # of many kinds, raised deep in kfac-jax
    raise ValueError(f"kfac-jax cannot register the model's layers: {error} {ADVICE}") from error
  layer_vjp, _ = kfac_jax.layer_tags_vjp(tagged, params_index=0)
  indices = estimator.jaxpr.layer_indices
  objections = {
    indices[i]: "its inputs or outputs do not have the batch on their first axis"
    for i in _misplaced_batches(layer_vjp, params, image_shape)
  }
  layers, coverage = cover(dict(estimator.indices_to_block_map), params, skip, objections)
  places = {layer_indices[0]: i for i, layer_indices in enumerate(indices)}

  def layer_data(params, pairs, cotangents):
    losses, vjp = layer_vjp((params, pairs.x_t, pairs.t))
    (out,) = losses[0].parameter_dependants
    data = vjp(((cotangents(out),),))
    return {layer.name: data[places[layer.kernel]] for layer in layers}

  kfac_blocks = estimator.blocks or ()
  blocks = {layer.name: kfac_blocks[places[layer.kernel]] for layer in layers}
  return Registration(layers, coverage, blocks, layer_data)


def _misplaced_batches(
  layer_vjp: Callable, params: Params, image_shape: tuple[int, ...]
) -> set[int]:
  """Positions of layers whose inputs or output gradients have another first axis than the batch.

  Shapes at two batch sizes tell a batch axis from an axis that happens to be as long.
  """
  misplaced = set()
  for size in (3, 5):

    def tapped(params, x_t, t):
      losses, vjp = layer_vjp((params, x_t, t))
      data = vjp((losses[0].parameter_dependants,))
      return [(layer.primals.inputs, layer.tangents.outputs) for layer in data]

    x_t = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    shapes = jax.eval_shape(tapped, params, x_t, jax.ShapeDtypeStruct((size,), jnp.int32))
    for i, arrays in enumerate(shapes):
      if any(array.shape[:1] != (size,) for array in jax.tree.leaves(arrays)):
        misplaced.add(i)
  return misplaced
