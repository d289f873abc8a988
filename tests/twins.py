"""Plain float64 twins of what the library computes: jax.vjp pair by pair, no tags, no patches.

The twins know layers by `Layer.from_matrix` and `to_matrix` alone, so that they hold for any kind.
"""

from collections.abc import Callable, Mapping, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import DiffusionModel, Draws, Examples
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.core.types import Eigenbasis, Matrices, Params, PyTree
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.measurements import LOSS, Measurement
from jaxinf.diffusion.noise import Noised, losses
from jaxinf.engine.worklist import Rows
from jaxinf.layers.specs import Layer, leaf_names, to_matrices

ROUNDING = 1e-5  # float32 sums of some hundred terms, of the largest entry


def assert_close(
  actual: PyTree, expected: PyTree, tolerance: float = ROUNDING, scale: float | None = None
) -> None:
  """Every array within `tolerance` of its largest entry, or of `scale`; dtypes do not matter."""
  actual, expected = (
    jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in (actual, expected)
  )
  size = lambda x: scale or np.abs(x).max(initial=0) or 1.0
  sizes = jax.tree.map(size, expected)
  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_close(
    *(jax.tree.map(lambda x, s: x / s, tree, sizes) for tree in (actual, expected)),
    rtol=0,
    atol=tolerance,
  )


def double(tree: PyTree) -> PyTree:
  """NumPy arrays, floats of any kind in float64."""

  def cast(x):
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, tree)


def in_float64(function: Callable, *args: PyTree) -> PyTree:
  """function(*args) with every float in float64, as NumPy arrays."""
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, jax.jit(function)(*double(args)))


def fit_pairs(model: DiffusionModel, train: Examples, draws: int, seed: int = 0) -> Noised:
  """The pairs [N · draws], example-major, that a fit goes over."""
  rows = Rows.of(train, draws)
  return curvature_pairs(model.process, seed, rows.padded_batch(0, len(rows)), train.augmentation)[
    0
  ]


def twin_gradients(
  model: DiffusionModel, layers: Sequence[Layer], pairs: Noised, value: Callable = losses
) -> Matrices:
  """Layer name → [B, (groups,) d_out, d_in]: ∇ of value(outputs, pairs) [B] of each pair alone."""

  def one(params, pair):
    pair = jax.tree.map(lambda x: x[None], pair)
    return value(model.apply_fn(params, *_inputs(pair)), pair)[0]

  each = jax.vmap(jax.grad(one), in_axes=(None, 0))
  return to_matrices(layers, in_float64(each, model.params, pairs))


def cotangent_gradients(
  apply_fn: Callable, params: Params, layers: Sequence[Layer], pairs: Noised, dy: np.ndarray
) -> Matrices:
  """Layer name → [K, B, (groups,) d_out, d_in]: each pair's ∇ ⟨dy, output⟩ for dy [K, B, …]."""

  def one(params, pair, dy):
    inputs = _inputs(jax.tree.map(lambda x: x[None], pair))
    _, pull_back = jax.vjp(lambda p: apply_fn(p, *inputs), params)
    return pull_back(dy[None])[0]

  each_pair = jax.vmap(one, in_axes=(None, 0, 0))
  each_target = jax.vmap(each_pair, in_axes=(None, None, 0))
  return to_matrices(layers, in_float64(each_target, params, pairs, dy))


def jacobians(
  apply_fn: Callable, params: Params, layers: Sequence[Layer], pairs: Noised
) -> Matrices:
  """Layer name → [D, B, (groups,) d_out, d_in]: ∂ output c / ∂ matrix of each pair, by jacrev."""

  def one(params, pair):
    return jnp.ravel(apply_fn(params, *_inputs(jax.tree.map(lambda x: x[None], pair))))

  each = jax.vmap(jax.jacrev(one), in_axes=(None, 0), out_axes=1)
  return to_matrices(layers, in_float64(each, params, pairs))


def output_gradients(
  apply_fn: Callable, params: Params, layers: Sequence[Layer], pairs: Noised
) -> Matrices:
  """√(2w) times the Jacobians [D, B, …]: their mean second moment is the GGN, (2/D) E[w JᵀJ]."""
  roots = np.sqrt(2 * np.asarray(pairs.weights, np.float64))
  scaled = lambda j: j * roots.reshape(-1, *[1] * (j.ndim - 2))
  return {name: scaled(j) for name, j in jacobians(apply_fn, params, layers, pairs).items()}


def second_moments(matrices: np.ndarray) -> np.ndarray:
  """[(groups,) P, P], the mean of vec(M) vec(M)ᵀ over targets and pairs [K, B, …, d_out, d_in]."""
  rows = matrices.reshape(-1, *matrices.shape[2:-2], matrices.shape[-2] * matrices.shape[-1])
  return np.einsum("n...i,n...j->...ij", rows, rows) / len(rows)


def ggn_blocks(
  model: DiffusionModel, layers: Sequence[Layer], pairs: Noised
) -> dict[str, np.ndarray]:
  """Layer name → its block [(groups,) P, P] of the GGN."""
  matrices = output_gradients(model.apply_fn, model.params, layers, pairs)
  return {name: second_moments(m) for name, m in matrices.items()}


def dense_ggn(model: DiffusionModel, layers: Sequence[Layer], pairs: Noised) -> np.ndarray:
  """The GGN [P, P] of all layers together, with the blocks between them."""
  return joined(output_gradients(model.apply_fn, model.params, layers, pairs))


def joined(matrices: Matrices) -> np.ndarray:
  """The second moment [P, P] of all layers' matrices [K, B, …] side by side."""
  rows = [m.reshape(m.shape[0] * m.shape[1], -1) for m in matrices.values()]
  side_by_side = np.concatenate(rows, axis=1)
  return side_by_side.T @ side_by_side / len(side_by_side)


def vector(layers: Sequence[Layer], tree: PyTree) -> np.ndarray:
  """[P] float64 of a pytree like the parameters, in the order of `dense_ggn`."""
  return np.concatenate([np.ravel(m) for m in to_matrices(layers, double(tree)).values()])


def block(basis: Eigenbasis) -> np.ndarray:
  """The block that an eigenbasis stands for, [(groups,) P, P], by explicit Kronecker products."""
  values = np.asarray(basis.eigenvalues)
  *groups, d_out, d_in = values.shape
  if basis.q_in is None:
    rotations = [np.eye(d_out * d_in)] * int(np.prod(groups))
  else:
    pair = (np.asarray(q).reshape(-1, *q.shape[-2:]) for q in (basis.q_out, basis.q_in))
    rotations = [np.kron(q_out, q_in) for q_out, q_in in zip(*pair, strict=True)]
  flat = values.reshape(len(rotations), -1)
  blocks = [(q * row) @ q.T for q, row in zip(rotations, flat, strict=True)]
  return np.stack(blocks).reshape(*groups, d_out * d_in, d_out * d_in)


def diagonal_in(basis: Eigenbasis, matrix: np.ndarray) -> np.ndarray:
  """diag(Qᵀ H Q) [(groups,) d_out, d_in] of a block H [(groups,) P, P]."""
  shape = basis.eigenvalues.shape
  if basis.q_in is None:
    return np.diagonal(matrix, axis1=-2, axis2=-1).reshape(shape)
  matrix = matrix.reshape(*shape, *shape[-2:])
  q_out, q_in = basis.q_out, basis.q_in
  return np.einsum(
    "...oipj,...ou,...iv,...pu,...jv->...uv", matrix, q_out, q_in, q_out, q_in, optimize=True
  )


def taps(
  module: nn.Module, params: Params, layers: Sequence[Layer], pairs: Noised, dy: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Layer name → a [B, R, groups, d_in] with the 1 for a bias, and g [K, B, R, groups, d_out].

  g is the gradient of a zero added to what the Flax module returns. a is what it returns with
  zeros for parameters but ones in column i of the matrix: then every output is a_r[i].
  """
  wanted = {layer.name: layer for layer in layers}
  seen: dict[str, tuple[nn.Module, jax.Array]] = {}

  def run(offsets: Mapping[str, jax.Array], params, inputs, time):
    def record(next_fun, args, kwargs, context):
      y, name = next_fun(*args, **kwargs), "/".join(context.module.path)
      if name not in wanted or context.method_name != "__call__":
        return y
      seen[name] = (context.module.clone(parent=None), args[0])
      shapes[name] = y.shape
      return y + offsets.get(name, 0)

    with nn.intercept_methods(record):
      out = module.apply({"params": params}, inputs, time)
    units = {name: _unit_outputs(*seen[name], params, wanted[name]) for name in wanted}
    return out, units

  shapes: dict[str, tuple[int, ...]] = {}
  jax.eval_shape(lambda *inputs: run({}, *inputs), params, pairs.inputs, pairs.time)
  zeros = {name: np.zeros(shape) for name, shape in shapes.items()}

  def both(zeros, params, inputs, time, dy):
    _, pull_back, units = jax.vjp(lambda z: run(z, params, inputs, time), zeros, has_aux=True)
    return units, jax.vmap(lambda d: pull_back(d)[0])(dy)

  units, offsets = in_float64(both, zeros, params, pairs.inputs, pairs.time, dy)
  result, num = {}, len(pairs.time)
  for name, layer in wanted.items():
    groups, d_out, d_in = (1, *layer.matrix_shape)[-3:]
    inputs = units[name].reshape(d_in, num, -1, groups, d_out)[..., 0]
    gradients_at = offsets[name].reshape(len(dy), num, -1, groups, d_out)
    result[name] = np.moveaxis(inputs, 0, -1), gradients_at
  return result


def _unit_outputs(module: nn.Module, x: jax.Array, params: Params, layer: Layer) -> jax.Array:
  """The module's outputs [d_in, B, …] for ones in each column of its matrix."""
  d_in = layer.matrix_shape[-1]
  lead = np.eye(d_in).reshape(d_in, *[1] * (len(layer.matrix_shape) - 1), d_in)
  matrices = np.broadcast_to(lead, (d_in, *layer.matrix_shape))
  names = leaf_names(params)
  own = {names[i].split("/")[-1]: jnp.asarray(x) for i, x in layer.from_matrix(matrices).items()}
  return jax.vmap(lambda p: module.apply({"params": p}, x))(own)


def _inputs(pairs: Noised) -> tuple:
  """What the network is called with besides its parameters."""
  given = () if pairs.conditioning is None else (pairs.conditioning,)
  return (pairs.inputs, pairs.time, *given)


# Scores.

# The paper's draws: each by itself, so that replicates are nothing but parts of them.
INDEPENDENT = dict(timesteps="uniform", antithetic=False, shared=False, loss_power=1.0)


class Killed(BaseException):
  """What stops a pass as a signal would: no handler of exceptions sees it."""


def keys_of(name: str, num: int, draws: Draws) -> jax.Array:
  """[num, S] keys of the first S = draws.num draws of the examples 0 … num − 1 of a stream."""
  keys = fold_in_each(stream(draws.seed, name), draws.numbers(jnp.arange(num)))
  return jax.vmap(lambda key: draw_keys(key, draws.num))(keys)


def pairs_of(model, examples, name: str, draws: Draws, measurement: Measurement = LOSS) -> list:
  """For each example its pairs of draws, in float32 as the library draws them."""
  keys = keys_of(name, len(examples), draws)
  row = lambda tree, i: jax.tree.map(lambda x: x[i][None], tree)
  return [
    measurement.pairs(
      model.process, row(examples.data, i), keys[i][None], row(examples.conditioning, i), draws,
      examples.augmentation,
    )
    for i in range(len(examples))
  ]  # fmt: skip


def weighted_errors(outputs, pairs):
  """The loss of each pair, written out."""
  axes = tuple(range(1, outputs.ndim))
  return pairs.weights * jnp.mean(jnp.square(outputs - pairs.target), axis=axes)


def draw_gradients(model, layers, examples, name: str, draws: Draws, value=weighted_errors):
  """Layer → [n, S, d_out, d_in] gradients of value(outputs, pairs) [S], a draw at a time."""
  everyones = pairs_of(model, examples, name, draws)
  found = []
  with jax.enable_x64(True):

    def values(params, pairs):
      given = () if pairs.conditioning is None else (pairs.conditioning,)
      return value(model.apply_fn(params, pairs.inputs, pairs.time, *given), pairs)

    jacobian = jax.jit(jax.jacobian(values))
    for pairs in everyones:
      of_draws = jacobian(double(model.params), double(pairs))
      leaves = [np.asarray(x) for x in jax.tree.leaves(of_draws)]
      found.append({layer.name: layer.to_matrix(leaves) for layer in layers})
  return {layer.name: np.stack([each[layer.name] for each in found]) for layer in layers}


def twin_scores(curvature, query_grads, train_grads, damping: float) -> np.ndarray:
  """[Q, N] products of gradients [n, S, …] averaged over draws, in a curvature's eigenbases."""
  mean = lambda grads: grads.mean(axis=1)
  return sum(
    np.einsum(
      "qoi,noi->qn",
      precondition(mean(query_grads[name]), basis, damping),
      mean(train_grads[name]),
    )
    for name, basis in curvature.bases.items()
  )
