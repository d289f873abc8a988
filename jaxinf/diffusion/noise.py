"""Draws of (t, ε), the pairs of inputs and targets that they make, and the loss of a pair.

How the draws of a replicate depend on each other is a design (core/draws.py). Every design is
unbiased: the draws of a replicate together have t by the process's law and ε standard normal.

What training does to an example at random is drawn too: see core/augmentation.py.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.draws import INDEPENDENT, Draws
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
  """The network's outputs [B, …] on pairs, as float32, or float64 where it computes in that."""
  return network_output(apply_fn, params, pairs.inputs, pairs.time, pairs.conditioning)


def network_output(
  apply_fn: ApplyFn,
  params: Params,
  inputs: jax.Array,
  time: jax.Array,
  conditioning: PyTree = None,
) -> jax.Array:
  """apply_fn(params, inputs, time[, conditioning]), at least float32: the one call of a network."""
  given = () if conditioning is None else (conditioning,)
  outputs = apply_fn(params, inputs, time, *given)
  return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def squared_errors(outputs: jax.Array, pairs: Noised) -> jax.Array:
  """[B] mean over all elements of (output − target)², without weights."""
  chex.assert_equal_shape([outputs, pairs.target])
  return jnp.mean(jnp.square(outputs - pairs.target), axis=tuple(range(1, outputs.ndim)))


def losses(outputs: jax.Array, pairs: Noised) -> jax.Array:
  """[B] training losses w_t · (mean over all elements of (output − target)²)."""
  return pairs.weights * squared_errors(outputs, pairs)


def noised(
  process: Process, data: jax.Array, keys: jax.Array, augmentation: Augmentation = PLAIN
) -> Noised:
  """One draw of (t, ε) for each example [B, …] from its key [B], t by the law of the process.

  Draws do not depend on conditioning: `noised(…)._replace(conditioning=…)` adds it.
  """
  return draw_pairs(process, data, keys[:, None], augmentation=augmentation)


def draw_pairs(
  process: Process,
  data: jax.Array,
  keys: jax.Array,
  draws: Draws = INDEPENDENT,
  augmentation: Augmentation = PLAIN,
) -> Noised:
  """One replicate of S draws for each example.

  Args:
    process: how data are noised.
    data: [B, …] floats, uint8 pixels, or what `augmentation` makes data of.
    keys: [B, S], one a draw.
    draws: the design of the replicate; its numbers of draws are not read.
    augmentation: what each draw does to its example.

  Returns:
    The B · S pairs, example-major, without conditioning.
  """
  data = jnp.repeat(data, keys.shape[1], axis=0)
  return draw_noised(process, data, draw_times(process, keys, draws), keys, draws, augmentation)


def draw_times(process: Process, keys: jax.Array, draws: Draws) -> jax.Array:
  """Times t [B · S] of keys [B, S], by the law of the process."""
  if process.num_steps is not None:
    return draw_integers(process.num_steps, keys, draws)
  return _both(process.times(_uniforms(keys, draws)), keys, draws)


def draw_times_between(
  process: Process, low: float, high: float, keys: jax.Array, draws: Draws
) -> jax.Array:
  """Times t [B · S] in [low, high) of keys [B, S], by the law of the process given that band.

  The design spreads them over the band as `draw_times` does over all times.
  """
  if process.num_steps is not None:
    return int(low) + draw_integers(int(high) - int(low), keys, draws)
  begin, end = process.probability_below(low), process.probability_below(high)
  u = begin + (end - begin) * _uniforms(keys, draws)
  return _both(jnp.clip(process.times(u), low, high), keys, draws)  # rounding may leave the band


def draw_noisiest_times(process: Process, keys: jax.Array, draws: Draws, share: float) -> jax.Array:
  """Times t [B · S] of keys [B, S], by the law of the process within its noisiest `share`."""
  return _both(process.times((1 - share) + share * _uniforms(keys, draws)), keys, draws)


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
  augmentation: Augmentation = PLAIN,
) -> Noised:
  """The pairs of examples [B · S, …] and times [B · S] with the noise of keys [B, S]."""
  data = augmentation.data(data, draw_augmentations(keys, draws))
  noise = draw_noise(data.shape[1:], keys, draws)
  inputs, time = process.inputs(process.noised(data, t, noise), t)
  return Noised(inputs, time, process.target(data, noise, t), process.weights(t), t)


def draw_noise(shape: tuple[int, ...], keys: jax.Array, draws: Draws) -> jax.Array:
  """ε [B · S, *shape] of keys [B, S]."""
  normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  noise = _both(normal(substreams(_firsts(keys, draws).reshape(-1), "noise")), keys, draws)
  if draws.antithetic:
    signs = jnp.tile(1.0 - 2.0 * (jnp.arange(keys.shape[1]) % 2), len(keys))
    noise *= signs.reshape(-1, *[1] * (noise.ndim - 1))
  return noise


def draw_augmentations(keys: jax.Array, draws: Draws) -> jax.Array:
  """Keys [B · S] of what is done to examples, from keys [B, S] of draws: one for both of a pair."""
  return _both(_firsts(keys, draws).reshape(-1), keys, draws)


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
