"""Finds a model's layers, and taps their inputs and output gradients with kfac-jax.

One forward and backward pass of a batch of (example, draw) pairs gives every layer's inputs a and
output gradients g. From these come the Kronecker factors (sums of a aᵀ and g gᵀ) and the gradients
of single examples (sums of g aᵀ over an example's own pairs) at the speed of an ordinary batch.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

from jaxinf.core.types import (
  ApplyFn,
  Arrays,
  Eigenbasis,
  KroneckerFactors,
  Matrices,
  Params,
  PyTree,
)
from jaxinf.diffusion.objective import Noised
from jaxinf.layers.blocks import BLOCKS, Uncovered
from jaxinf.layers.coverage import ADVICE, Coverage, Selection, cover
from jaxinf.layers.find import find_batches, tagged
from jaxinf.layers.specs import Layer, layer_of

# From the network's output [B, H, W, C] to the gradient there of what is differentiated.
Cotangents = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Registration:
  """A model's covered layers, and kernels on them.

  Attributes:
    layers: the covered layers.
    coverage: what became of every parameter.
    blocks: layer name → its KroneckerBlock or ElementBlock.
  """

  layers: tuple[Layer, ...]
  coverage: Coverage
  blocks: Mapping[str, Any]
  _layer_arrays: Callable[..., dict[str, Arrays]]
  _network: Callable[..., jax.Array]

  def only(self, names: Sequence[str]) -> "Registration":
    """The registration of some of the layers: its kernels compute nothing for the others."""
    layers = tuple(layer for layer in self.layers if layer.name in names)
    return dataclasses.replace(self, layers=layers)

  def positions(self, params: Params, pairs: Noised) -> dict[str, int]:
    """Layer name → positions R of each pair, from shapes alone."""
    arrays = jax.eval_shape(
      lambda params, pairs: self._layer_arrays(params, pairs, lambda out: out[None]), params, pairs
    )
    count = lambda layer: math.prod(arrays[layer.name][1].shape[2:]) // layer.matrix_rows
    return {layer.name: count(layer) for layer in self.layers}

  def factor_sums(
    self,
    params: Params,
    pairs: Noised,
    cotangents: Cotangents,
    weights: jax.Array,
    *,
    sharing: str = "expand",
  ) -> dict[str, PyTree]:
    """Layer name → sums over pairs, of which `factors` makes A and G; eigenvalues if diagonal.

    Args:
      params: the parameters.
      pairs: B (example, draw) pairs.
      cotangents: network outputs → [K, B, H, W, C] gradients there, K targets a pair, whose second
        moment is the loss's Hessian there.
      weights: [B].
      sharing: "expand" or "reduce".
    """
    arrays = self._layer_arrays(params, pairs, cotangents)
    sums: dict[str, PyTree] = {}
    for layer in self.layers:
      block, (x, dy) = self.blocks[layer.name], arrays[layer.name]
      if layer.structure == "diagonal":
        sums[layer.name] = _eigenvalue_sums(block, (x, dy), _IDENTITY, weights)
        continue
      each = jnp.tile(weights / len(dy), len(dy))
      sums[layer.name] = {
        "a": block.input_sums(x, weights, sharing),
        "g": block.gradient_sums(dy.reshape(-1, *dy.shape[2:]), each, sharing),
      }
    return sums

  def factors(self, sums: Mapping[str, PyTree], total: float) -> dict[str, KroneckerFactors]:
    """Layer name → mean factors, on the host in float64, from sums with weights adding to total."""
    mean = lambda x: np.asarray(x, np.float64) / total
    return {
      name: KroneckerFactors(a=mean(self.blocks[name].input_factor(s["a"])), g=mean(s["g"]))
      for name, s in sums.items()
      if isinstance(s, dict)
    }

  def eigenvalue_sums(
    self,
    params: Params,
    pairs: Noised,
    cotangents: Cotangents,
    weights: jax.Array,
    bases: Mapping[str, Eigenbasis],
  ) -> dict[str, jax.Array]:
    """Layer name → sums over pairs of squared gradients in the eigenbases [..., d_out, d_in]."""
    arrays = self._layer_arrays(params, pairs, cotangents)
    return {
      layer.name: _eigenvalue_sums(
        self.blocks[layer.name], arrays[layer.name], bases[layer.name], weights
      )
      for layer in self.layers
    }

  def gradients(
    self, params: Params, pairs: Noised, cotangents: Cotangents, *, rows: int
  ) -> Matrices:
    """Layer name → gradients [rows, ..., d_out, d_in], each summed over B / rows pairs in turn.

    cotangents: network outputs → [B, H, W, C].
    """
    if rows == 1:  # an ordinary backward pass, which taps would only slow down
      network = lambda params: self._network(params, *_as_inputs(pairs))
      out, pull_back = jax.vjp(network, params)
      leaves = [leaf[None] for leaf in jax.tree.leaves(pull_back(cotangents(out)))]
      return {layer.name: layer.to_matrix(leaves) for layer in self.layers}
    arrays = self._layer_arrays(params, pairs, lambda out: cotangents(out)[None])
    return {
      layer.name: self.blocks[layer.name].matrices((x, dy[0]), rows)
      for layer in self.layers
      for x, dy in (arrays[layer.name],)
    }


_IDENTITY = Eigenbasis(q_in=None, q_out=None, eigenvalues=None)


def _eigenvalue_sums(
  block: Any, arrays: Arrays, basis: Eigenbasis, weights: jax.Array
) -> jax.Array:
  """The mean over targets of a block's sums; arrays are x [B, …] and dy [K, B, …]."""
  x, dy = arrays
  of_target = lambda target: block.eigenvalue_sums((x, target), basis, weights)
  if len(dy) == 1:  # the common case, without a loop
    return of_target(dy[0])
  # A loop of the compiled program: "exact" has as many targets as the network has outputs.
  zeros = jnp.zeros_like(jax.eval_shape(of_target, dy[0]))
  total, _ = jax.lax.scan(lambda sums, target: (sums + of_target(target), None), zeros, dy)
  return total / len(dy)


def register(
  apply_fn: ApplyFn,
  params: Params,
  image_shape: tuple[int, ...],
  selection: Selection,
  *,
  conditioning: PyTree = None,
) -> Registration:
  """Registers the layers of a model; ValueError with the coverage table where that fails.

  Args:
    apply_fn: the network, with the batch on the first axis of everything.
    params: the parameters.
    image_shape: (H, W, C).
    selection: which parameters to leave out, and which are diagonal.
    conditioning: further inputs of the network, arrays [N, …] of which the shapes matter; or None.
  """
  try:
    batches, reasons = find_batches(
      apply_fn, params, *(_inputs(size, image_shape, conditioning) for size in (3, 5))
    )
  except Exception as error:  # of many kinds, raised in the network
    raise ValueError(f"The model cannot be traced: {error}") from error
  network = tagged(apply_fn, batches)

  def tagged_loss(params, *inputs):
    kfac_jax.register_squared_error_loss(network(params, *inputs))
    return jnp.zeros(())

  # Two pairs: with one, kfac-jax could not tell a batch axis from an axis of size 1.
  inputs = _inputs(2, image_shape, conditioning)
  options: dict[str, Any] = dict(graph_patterns=())  # all tags are ours
  estimator = kfac_jax.BlockDiagonalCurvature(
    tagged_loss, params_index=0, layer_tag_to_block_ctor=BLOCKS, auto_register_kwargs=options
  )
  try:
    estimator.finalize((params, *inputs))
  except Exception as error:  # of many kinds, raised deep in kfac-jax
    raise ValueError(f"The model's layers cannot be registered: {error} {ADVICE}") from error
  layer_vjp, _ = kfac_jax.layer_tags_vjp(tagged_loss, params_index=0, **options)
  indices = estimator.jaxpr.layer_indices
  found = _distinct(
    [
      layer_of(block, leaves, params)
      for leaves, block in estimator.indices_to_block_map.items()
      if not isinstance(block, Uncovered)
    ]
  )
  layers, coverage = cover(found, params, selection, reasons)
  places = {leaves[0]: i for i, leaves in enumerate(indices)}

  def layer_arrays(params, pairs, cotangents):
    losses, vjp = layer_vjp((params, *_as_inputs(pairs)))
    (out,) = losses[0].parameter_dependants
    data = jax.vmap(lambda cotangent: vjp(((cotangent,),)), out_axes=0)
    taps = _split(data, vjp, cotangents(out))
    return {layer.name: taps[places[layer.kernel]] for layer in layers}

  kfac_blocks = estimator.blocks or ()
  blocks = {layer.name: kfac_blocks[places[layer.kernel]] for layer in layers}
  return Registration(layers, coverage, blocks, layer_arrays, apply_fn)


def _split(mapped: Callable, vjp: Callable, cotangents: jax.Array) -> list[Arrays]:
  """Each tag's inputs x [B, …] and output gradients dy [K, B, …] for cotangents [K, B, …]."""
  if len(cotangents) == 1:  # the common case, without vmap
    data = vjp(((cotangents[0],),))
    return [_arrays(layer, layer.tangents.outputs[0][None]) for layer in data]
  inputs = vjp(((jnp.zeros_like(cotangents[0]),),))
  data = mapped(cotangents)
  return [_arrays(one, many.tangents.outputs[0]) for one, many in zip(inputs, data, strict=True)]


def _arrays(data: kfac_jax.LayerVjpData, dy: jax.Array) -> Arrays:
  inputs = data.primals.inputs
  return (inputs[0] if inputs else jnp.zeros(0), dy)


def _as_inputs(pairs: Noised) -> tuple:
  """What the network is called with besides its parameters."""
  return (pairs.x_t, pairs.t, pairs.conditioning)[: 2 + (pairs.conditioning is not None)]


def _inputs(size: int, image_shape: tuple[int, ...], conditioning: PyTree) -> tuple:
  """Zeros for the network's inputs, `size` pairs."""
  images, t = jnp.zeros((size, *image_shape)), jnp.zeros(size, jnp.int32)
  if conditioning is None:
    return images, t
  like = lambda x: jnp.zeros((size, *np.shape(x)[1:]), jnp.asarray(x).dtype)
  return images, t, jax.tree.map(like, conditioning)


def _distinct(layers: list[Layer]) -> list[Layer]:
  """The layers with names of their own: where modules share one, by their kernels' positions."""
  counts = collections.Counter(layer.name for layer in layers)
  return [
    layer
    if counts[layer.name] == 1
    else dataclasses.replace(layer, name=f"{layer.name}#{layer.kernel}")
    for layer in layers
  ]
