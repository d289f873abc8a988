"""Draws of (t, ε), the pairs of inputs and targets that they make, and the loss of a pair.

How the draws of a replicate depend on each other is a design (core/draws.py). Every design is
unbiased: the draws of a replicate together have t by the process's law and ε standard normal.

Training that mirrors images at random has the mean over both as its loss (paper, Appendix J.8):
then draws are of (flip, t, ε).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.examples import as_float
from jaxinf.core.random import substreams
from jaxinf.core.types import ApplyFn, Params, PyTree
from jaxinf.diffusion.process import Process, index_of


class Noised(NamedTuple):
  """Inputs and target of the network for B (example, draw) pairs."""

  inputs: jax.Array  # [B, …], s_t x_t
  time: jax.Array  # [B], τ_t: int32 where t is
  target: jax.Array  # [B, …], c_t ε + d_t x_0
  weights: jax.Array  # [B] float32, w_t
  t: jax.Array  # [B], the process's own time: int32 where it is discrete, float32 otherwise
  conditioning: PyTree = None  # of arrays [B, …]; None where the model has no further inputs


def predict(apply_fn: ApplyFn, params: Params, pairs: Noised) -> jax.Array:
  """The network's outputs [B, …] on pairs, as float32."""
  return network_output(apply_fn, params, pairs.inputs, pairs.time, pairs.conditioning)


def network_output(
  apply_fn: ApplyFn,
  params: Params,
  inputs: jax.Array,
  time: jax.Array,
  conditioning: PyTree = None,
) -> jax.Array:
  """apply_fn(params, inputs, time[, conditioning]) as float32: the one call of a network."""
  given = () if conditioning is None else (conditioning,)
  return apply_fn(params, inputs, time, *given).astype(jnp.float32)


def squared_errors(outputs: jax.Array, pairs: Noised) -> jax.Array:
  """[B] mean over all elements of (output − target)², without weights."""
  chex.assert_equal_shape([outputs, pairs.target])
  return jnp.mean(jnp.square(outputs - pairs.target), axis=tuple(range(1, outputs.ndim)))


def losses(outputs: jax.Array, pairs: Noised) -> jax.Array:
  """[B] training losses w_t · (mean over all elements of (output − target)²)."""
  return pairs.weights * squared_errors(outputs, pairs)


def noised(process: Process, data: jax.Array, keys: jax.Array) -> Noised:
  """One draw of (t, ε) for each example [B, …] from its key [B], t by the law of the process.

  Draws do not depend on conditioning: `noised(…)._replace(conditioning=…)` adds it.
  """
  return draw_pairs(process, data, keys[:, None])


def draw_pairs(
  process: Process,
  data: jax.Array,
  keys: jax.Array,
  draws: Draws = INDEPENDENT,
  random_flip: bool = False,
) -> Noised:
  """One replicate of S draws for each example.

  Args:
    process: how data are noised.
    data: [B, …] floats, or uint8 pixels.
    keys: [B, S], one a draw.
    draws: the design of the replicate; its numbers of draws are not read.
    random_flip: whether each draw mirrors its image [H, W, C] with probability ½.

  Returns:
    The B · S pairs, example-major, without conditioning.
  """
  data = jnp.repeat(data, keys.shape[1], axis=0)
  return draw_noised(process, data, draw_times(process, keys, draws), keys, draws, random_flip)


def draw_times(process: Process, keys: jax.Array, draws: Draws) -> jax.Array:
  """Times t [B · S] of keys [B, S], by the law of the process."""
  if process.num_steps is not None:
    return draw_integers(process.num_steps, keys, draws)
  return _both(process.times(_uniforms(keys, draws)), keys, draws)


def draw_integers(num: int, keys: jax.Array, draws: Draws) -> jax.Array:
  """Int32 [B · S], uniform in [0, num), of keys [B, S]."""
  if draws.timesteps == "uniform":
    firsts = substreams(_firsts(keys, draws).reshape(-1), "t")
    values = jax.vmap(lambda key: jax.random.randint(key, (), 0, num))(firsts)
  else:
    values = index_of(_uniforms(keys, draws), num)
  return _both(values, keys, draws)


def draw_noised(
  process: Process,
  data: jax.Array,
  t: jax.Array,
  keys: jax.Array,
  draws: Draws,
  random_flip: bool = False,
) -> Noised:
  """The pairs of examples [B · S, …] and times [B · S] with the noise of keys [B, S]."""
  data = as_float(data)
  normal = jax.vmap(lambda key: jax.random.normal(key, data.shape[1:], jnp.float32))
  noise = _both(normal(substreams(_firsts(keys, draws).reshape(-1), "noise")), keys, draws)
  if draws.antithetic:
    signs = jnp.tile(1.0 - 2.0 * (jnp.arange(keys.shape[1]) % 2), len(keys))
    noise *= signs.reshape(-1, *[1] * (noise.ndim - 1))
  if random_flip:
    data = draw_flips(data, keys, draws)
  inputs, time = process.inputs(process.noised(data, t, noise), t)
  return Noised(inputs, time, process.target(data, noise, t), process.weights(t), t)


def draw_flips(images: jax.Array, keys: jax.Array, draws: Draws) -> jax.Array:
  """Images [B · S, H, W, C], each mirrored with probability ½ as keys [B, S] say."""
  return flipped(images, _both(_firsts(keys, draws).reshape(-1), keys, draws))


def flipped(data: jax.Array, keys: jax.Array) -> jax.Array:
  """Images [B, H, W, C], each mirrored left to right with probability ½ as its key [B] says."""
  if data.ndim != 4:
    raise ValueError(f"random_flip mirrors images [B, H, W, C]; got data of shape {data.shape}.")
  flips = jax.vmap(jax.random.bernoulli)(substreams(keys, "flip"))
  return jnp.where(flips[:, None, None, None], data[:, :, ::-1], data)


def _uniforms(keys: jax.Array, draws: Draws) -> jax.Array:
  """[B · F] numbers in [0, 1) of the first draws of pairs of keys [B, S], or of all."""
  firsts = _firsts(keys, draws)
  within = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(
    substreams(firsts.reshape(-1), "t")
  )
  if draws.timesteps == "uniform":
    return within
  within = within.reshape(-1, firsts.shape[1])
  strata = keys.shape[1] // (2 if draws.antithetic else 1)
  parts = (jnp.arange(strata) + within[:, :strata]) / max(strata, 1)
  # Draws beyond one a stratum are uniform; a sum may round up to the next stratum.
  return jnp.concatenate([parts, within[:, strata:]], axis=1).reshape(-1)


def _firsts(keys: jax.Array, draws: Draws) -> jax.Array:
  """[B, F] of keys [B, S]: those of the first draw of each pair, or all."""
  return keys[:, ::2] if draws.antithetic else keys


def _both(values: jax.Array, keys: jax.Array, draws: Draws) -> jax.Array:
  """[B · S, …]: the values [B · F, …] of first draws, for both draws of each pair."""
  if not draws.antithetic:
    return values
  num, size = keys.shape
  each = values.reshape(num, -1, *values.shape[1:])
  return jnp.repeat(each, 2, axis=1)[:, :size].reshape(num * size, *values.shape[1:])
