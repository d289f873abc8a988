"""Plain float64 twins of what curvature is made of: jax.vjp pair by pair, no tags, no patches.

The twins know layers by `Layer.from_matrix` and `to_matrix` alone, so that they hold for any kind.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import Eigenbasis, Matrices, Params, PyTree
from jaxinf.diffusion.objective import Noised
from jaxinf.layers.specs import Layer, leaf_names, to_matrices


def in_float64(function: Callable, *args: PyTree) -> PyTree:
  """function(*args) with every float in float64, as NumPy arrays."""

  def cast(x):
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(cast, args)))


def gradients(
  apply_fn: Callable, params: Params, layers: Sequence[Layer], pairs: Noised, dy: np.ndarray
) -> Matrices:
  """Layer name → [K, B, (groups,) d_out, d_in]: each pair's ∇ ⟨dy, ε_θ⟩ for dy [K, B, …]."""

  def one(params, x_t, t, conditioning, dy):
    given = () if conditioning is None else (conditioning,)
    inputs = jax.tree.map(lambda x: x[None], (x_t, t, *given))
    _, pull_back = jax.vjp(lambda p: apply_fn(p, *inputs), params)
    return pull_back(dy[None])[0]

  each_pair = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
  each_target = jax.vmap(each_pair, in_axes=(None, None, None, None, 0))
  tree = in_float64(each_target, params, pairs.x_t, pairs.t, pairs.conditioning, dy)
  return to_matrices(layers, tree)


def unit_cotangents(num: int, shape: tuple[int, ...]) -> np.ndarray:
  """√2 e_c for each of the D outputs c [D, num, *shape]: their mean second moment is (2/D) I."""
  size = int(np.prod(shape))
  units = np.sqrt(2) * np.eye(size).reshape(size, 1, *shape)
  return np.broadcast_to(units, (size, num, *shape))


def output_gradients(
  apply_fn: Callable, params: Params, layers: Sequence[Layer], pairs: Noised
) -> Matrices:
  """Layer name → [D, B, (groups,) d_out, d_in], whose mean second moment is the GGN."""
  shape = jax.eval_shape(apply_fn, params, pairs.x_t, pairs.t).shape
  return gradients(apply_fn, params, layers, pairs, unit_cotangents(shape[0], shape[1:]))


def second_moments(matrices: np.ndarray) -> np.ndarray:
  """[(groups,) P, P], the mean of vec(M) vec(M)ᵀ over targets and pairs [K, B, …, d_out, d_in]."""
  rows = matrices.reshape(-1, *matrices.shape[2:-2], matrices.shape[-2] * matrices.shape[-1])
  return np.einsum("n...i,n...j->...ij", rows, rows) / len(rows)


def dense(basis: Eigenbasis) -> np.ndarray:
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


def taps(
  module: nn.Module, params: Params, layers: Sequence[Layer], pairs: Noised, dy: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Layer name → a [B, R, groups, d_in] with the 1 for a bias, and g [K, B, R, groups, d_out].

  g is the gradient of a zero added to what the Flax module returns. a is what it returns with
  zeros for parameters but ones in column i of the matrix: then every output is a_r[i].
  """
  wanted = {layer.name: layer for layer in layers}
  seen: dict[str, tuple[nn.Module, jax.Array]] = {}

  def run(offsets: Mapping[str, jax.Array], params, x_t, t):
    def record(next_fun, args, kwargs, context):
      y, name = next_fun(*args, **kwargs), "/".join(context.module.path)
      if name not in wanted or context.method_name != "__call__":
        return y
      seen[name] = (context.module.clone(parent=None), args[0])
      shapes[name] = y.shape
      return y + offsets.get(name, 0)

    with nn.intercept_methods(record):
      out = module.apply({"params": params}, x_t, t)
    units = {name: _unit_outputs(*seen[name], params, wanted[name]) for name in wanted}
    return out, units

  shapes: dict[str, tuple[int, ...]] = {}
  jax.eval_shape(lambda *inputs: run({}, *inputs), params, pairs.x_t, pairs.t)
  zeros = {name: np.zeros(shape) for name, shape in shapes.items()}

  def both(zeros, params, x_t, t, dy):
    _, pull_back, units = jax.vjp(lambda z: run(z, params, x_t, t), zeros, has_aux=True)
    return units, jax.vmap(lambda d: pull_back(d)[0])(dy)

  units, offsets = in_float64(both, zeros, params, pairs.x_t, pairs.t, dy)
  result = {}
  for name, layer in wanted.items():
    groups, d_out, d_in = (1, *layer.matrix_shape)[-3:]
    inputs = units[name].reshape(d_in, len(pairs.t), -1, groups, d_out)[..., 0]
    gradients_at = offsets[name].reshape(len(dy), len(pairs.t), -1, groups, d_out)
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
