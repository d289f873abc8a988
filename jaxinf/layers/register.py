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

import chex
import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

from jaxinf.core.examples import Examples
from jaxinf.core.types import (
  ApplyFn,
  Arrays,
  Eigenbasis,
  KroneckerFactors,
  Matrices,
  Params,
  PyTree,
)
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised, losses
from jaxinf.engine.kernels import numerics
from jaxinf.layers.blocks import BLOCKS, Uncovered
from jaxinf.layers.coverage import ADVICE, Coverage, Selection, cover
from jaxinf.layers.factors import GRADIENTS
from jaxinf.layers.find import find_batches, tagged
from jaxinf.layers.independence import check_independent, two_rows
from jaxinf.layers.precision import in_precision
from jaxinf.layers.specs import Layer, layer_of

# From the network's output [B, …] to the gradient there of what is differentiated.
Cotangents = Callable[[jax.Array], jax.Array]

LOSSES = "/losses"  # beside the names of layers, which are paths that begin with no slash


@dataclasses.dataclass(frozen=True, eq=False)  # itself a key, as of compiled kernels
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
  _parts: dict[tuple[str, ...], "Registration"] = dataclasses.field(default_factory=dict)

  def only(self, names: Sequence[str]) -> "Registration":
    """The registration of some of the layers: its kernels compute nothing for the others."""
    if tuple(names) not in self._parts:
      layers = tuple(layer for layer in self.layers if layer.name in names)
      self._parts[tuple(names)] = dataclasses.replace(self, layers=layers, _parts={})
    return self._parts[tuple(names)]

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
    approx: str = "expand",
  ) -> dict[str, PyTree]:
    """Layer name → sums over pairs, of which `factors` makes A and G; eigenvalues if diagonal.

    LOSSES → [3]: the sum of weights, and those of the losses of the network and of zero.

    Args:
      params: the parameters.
      pairs: B (example, draw) pairs.
      cotangents: network outputs → [K, B, …] gradients there, K targets a pair, whose second
        moment is the loss's Hessian there.
      weights: [B].
      approx: over positions, "expand" or "reduce"; "gradients" for the moments of Shampoo.
    """
    seen: list[jax.Array] = []

    def watched(out):
      seen.append(out)
      return cotangents(out)

    arrays = self._layer_arrays(params, pairs, watched)
    chex.assert_equal_shape([seen[0], pairs.target])
    both = losses(seen[0], pairs), losses(jnp.zeros_like(seen[0]), pairs)
    sums: dict[str, PyTree] = {
      LOSSES: jnp.stack([jnp.sum(weights), *(jnp.sum(weights * loss) for loss in both)])
    }
    for layer in self.layers:
      block, (x, dy) = self.blocks[layer.name], arrays[layer.name]
      if layer.structure == "diagonal":
        sums[layer.name] = _eigenvalue_sums(block, (x, dy), _IDENTITY, weights)
        continue
      if approx == GRADIENTS:
        of_target = lambda pair, block=block: block.matrix_moments(pair, weights)
        sums[layer.name] = _mean_over_targets(of_target, (x, dy))
        continue
      each = jnp.tile(weights / len(dy), len(dy))
      sums[layer.name] = {
        "a": block.input_sums(x, weights, approx),
        "g": block.gradient_sums(dy.reshape(-1, *dy.shape[2:]), each, approx),
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

    cotangents: network outputs → [B, …].
    """
    single = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    if rows == 1 and single:  # an ordinary backward pass, which taps would only slow down
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
  """The mean over targets of a block's sums of squares; arrays are x [B, …] and dy [K, B, …]."""
  return _mean_over_targets(lambda pair: block.eigenvalue_sums(pair, basis, weights), arrays)


def _mean_over_targets(sums: Callable[[Arrays], PyTree], arrays: Arrays) -> PyTree:
  """The mean of sums((x, dy_k)) over the K targets of x [B, …] and dy [K, B, …]."""
  x, dy = arrays
  of_target = lambda target: sums((x, target))
  if len(dy) == 1:  # the common case, without a loop
    return of_target(dy[0])
  # A loop of the compiled program: "exact" has as many targets as the network has outputs.
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_target, dy[0]))
  add = lambda total, target: (jax.tree.map(jnp.add, total, of_target(target)), None)
  total, _ = jax.lax.scan(add, zeros, dy)
  return jax.tree.map(lambda sum_: sum_ / len(dy), total)


def layers_of(
  model: DiffusionModel,
  examples: Examples,
  selection: Selection,
  *,
  axes: int = 0,
  precision: str | None = None,
) -> Registration:
  """The layers of a model for such examples, found once and kept in the model's cache.

  Args:
    model: the model.
    examples: of which the shapes and types of a row count.
    selection: which parameters to leave out, and which are diagonal.
    axes: axes of the data that the network does not see, such as states of a trajectory.
    precision: of the network's products; see layers.precision.

  Raises:
    ValueError: the network does not take such examples, its output for one of them depends on the
      others of a batch, or a parameter is in no layer.
  """
  shape = examples.shape[axes:]
  structs = examples.conditioning_structs
  leaves, structure = jax.tree.flatten(structs)
  # Another network, or parameters of other shapes, have layers of their own. What is kept holds on
  # to the network, so that no other one can take its id.
  network = id(model.apply_fn), model.process.is_discrete, *_form(model.params)
  inputs = (network, shape, structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))
  key = (inputs, selection, precision)
  if key not in model.cache:
    if inputs not in model.cache:
      model.check_inputs(shape, examples.conditioning)
      check_independent(model, shape, two_rows(examples.conditioning))
      model.cache[inputs] = model.apply_fn
    model.cache[key] = register(model, shape, selection, structs, precision)
  return model.cache[key]


def _form(params: Params) -> tuple:
  """Structure, shapes and types of parameters."""
  leaves, structure = jax.tree.flatten(params)
  return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def register(
  model: DiffusionModel,
  shape: tuple[int, ...],
  selection: Selection,
  conditioning: PyTree = None,
  precision: str | None = None,
) -> Registration:
  """Registers the layers of a model; ValueError with the coverage table where that fails.

  Args:
    model: whose network has the batch on the first axis of everything.
    shape: of an example.
    selection: which parameters to leave out, and which are diagonal.
    conditioning: structs of a row of further inputs of the network; or None.
    precision: of the network's products.
  """
  apply_fn, params = in_precision(model.apply_fn, precision), model.params
  inputs_of = lambda size: _inputs(model, size, shape, conditioning)
  try:
    with numerics():
      batches, reasons = find_batches(apply_fn, params, inputs_of(3), inputs_of(5))
  except Exception as error:  # of many kinds, raised in the network
    raise ValueError(f"The model cannot be traced: {error}") from error
  network = tagged(apply_fn, batches)

  def tagged_loss(params, *inputs):
    outputs = network(params, *inputs)
    kfac_jax.register_squared_error_loss(outputs.astype(jnp.float32))
    return jnp.zeros(())

  # Two pairs: with one, kfac-jax could not tell a batch axis from an axis of size 1.
  options: dict[str, Any] = dict(graph_patterns=())  # all tags are ours
  estimator = kfac_jax.BlockDiagonalCurvature(
    tagged_loss, params_index=0, layer_tag_to_block_ctor=BLOCKS, auto_register_kwargs=options
  )
  try:
    with numerics():
      estimator.finalize((params, *inputs_of(2)))
  except Exception as error:  # of many kinds, raised deep in kfac-jax
    raise ValueError(f"The model's layers cannot be registered: {error} {ADVICE}") from error
  layer_vjp, _ = kfac_jax.layer_tags_vjp(tagged_loss, params_index=0, **options)
  return _registration(estimator, layer_vjp, apply_fn, params, selection, reasons)


def _registration(
  estimator: Any,
  layer_vjp: Callable,
  apply_fn: ApplyFn,
  params: Params,
  selection: Selection,
  reasons: Mapping[int, str],
) -> Registration:
  """What kfac-jax has found, as layers with their taps."""
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
    targets = cotangents(out)
    chex.assert_shape(targets, (None, *out.shape))
    taps = _split(data, vjp, targets)
    return {layer.name: taps[places[layer.kernel]] for layer in layers}

  kfac_blocks = estimator.blocks or ()
  blocks = {layer.name: kfac_blocks[places[layer.kernel]] for layer in layers}
  network = lambda *inputs: apply_fn(*inputs).astype(jnp.float32)
  return Registration(layers, coverage, blocks, layer_arrays, network)


def _split(mapped: Callable, vjp: Callable, cotangents: jax.Array) -> list[Arrays]:
  """Each tag's inputs x [B, …] and output gradients dy [K, B, …] for cotangents [K, B, …]."""
  if len(cotangents) == 1:  # the common case, without vmap
    data = vjp(((cotangents[0],),))
    return [_arrays(layer, layer.tangents.outputs[0][None]) for layer in data]
  inputs = vjp(((jnp.zeros_like(cotangents[0]),),))
  data = mapped(cotangents)
  return [_arrays(one, many.tangents.outputs[0]) for one, many in zip(inputs, data, strict=True)]


def _arrays(data: kfac_jax.LayerVjpData, dy: jax.Array) -> Arrays:
  """x and dy, in float32 where the network computes in less."""
  inputs = data.primals.inputs
  x = inputs[0] if inputs else jnp.zeros(0)
  single = lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a
  return single(x), single(dy)


def _as_inputs(pairs: Noised) -> tuple:
  """What the network is called with besides its parameters."""
  given = () if pairs.conditioning is None else (pairs.conditioning,)
  return (pairs.inputs, pairs.time, *given)


def _inputs(
  model: DiffusionModel, size: int, shape: tuple[int, ...], conditioning: PyTree
) -> tuple:
  """Zeros for the network's inputs, `size` pairs."""
  time = jnp.int32 if model.process.is_discrete else jnp.float32
  given = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), conditioning)
  found = jnp.zeros((size, *shape)), jnp.zeros(size, time)
  return found if conditioning is None else (*found, given)


def _distinct(layers: list[Layer]) -> list[Layer]:
  """The layers with names of their own: where modules share one, by their kernels' positions."""
  counts = collections.Counter(layer.name for layer in layers)
  return [
    layer
    if counts[layer.name] == 1
    else dataclasses.replace(layer, name=f"{layer.name}#{layer.kernel}")
    for layer in layers
  ]
