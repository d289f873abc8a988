"""Naive twins in float64, and what else several tests compare by or stop with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import Draws
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.diffusion.measurements import LOSS, Measurement

# The paper's draws: each by itself, so that replicates are nothing but parts of them.
INDEPENDENT = dict(timesteps="uniform", antithetic=False, shared=False)


class Killed(BaseException):
  """What stops a pass as a signal would: no handler of exceptions sees it."""


def assert_close(actual, expected, relative: float) -> None:
  """Equal to a share of the largest number expected."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def in_double(tree):
  """The floating-point leaves of a pytree in float64, within jax.enable_x64."""
  cast = lambda x: jnp.asarray(np.asarray(x), jnp.float64 if x.dtype == jnp.float32 else None)
  return jax.tree.map(cast, tree)


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
      examples.random_flip,
    )
    for i in range(len(examples))
  ]  # fmt: skip


def weighted_errors(outputs, pairs):
  """The loss of each pair, written out."""
  axes = tuple(range(1, outputs.ndim))
  return pairs.weights * jnp.mean(jnp.square(outputs - pairs.target), axis=axes)


def twin_gradients(model, layers, examples, name: str, draws: Draws, value=weighted_errors):
  """Layer → [n, S, d_out, d_in] gradients of value(outputs, pairs) [S], a draw at a time."""
  everyones = pairs_of(model, examples, name, draws)
  found = []
  with jax.enable_x64(True):

    def values(params, pairs):
      given = () if pairs.conditioning is None else (pairs.conditioning,)
      return value(model.apply_fn(params, pairs.inputs, pairs.time, *given), pairs)

    jacobian = jax.jit(jax.jacobian(values))
    for pairs in everyones:
      of_draws = jacobian(in_double(model.params), in_double(pairs))
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
