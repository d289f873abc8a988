"""Draws of (t, ε) and the ε-prediction loss (paper, Eq. 3).

ℓ(θ, x) = E over (t, ε) of the MEAN over pixels and channels of (ε − ε_θ(x_t, t))². The mean gives
damping the units of the published figures.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinf.core.random import substreams
from jaxinf.core.types import ApplyFn, Params, PyTree
from jaxinf.diffusion.schedule import Schedule, add_noise


class Noised(NamedTuple):
  """Inputs and target of the network for B (example, draw) pairs."""

  x_t: jax.Array  # [B, H, W, C]
  t: jax.Array  # [B] int32
  noise: jax.Array  # [B, H, W, C], ε
  conditioning: PyTree = None  # of arrays [B, …]; None where the model has no further inputs


def predict(apply_fn: ApplyFn, params: Params, pairs: Noised) -> jax.Array:
  """ε_θ(x_t, t) or ε_θ(x_t, t, conditioning), [B, H, W, C]: the one call of a network on pairs."""
  if pairs.conditioning is None:
    return apply_fn(params, pairs.x_t, pairs.t)
  return apply_fn(params, pairs.x_t, pairs.t, pairs.conditioning)


def float_images(images: jax.Array) -> jax.Array:
  """Images as float32 in [-1, 1]: uint8 0…255 is mapped linearly, float32 passes through."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  return images


def flipped(images: jax.Array, keys: jax.Array) -> jax.Array:
  """Images [B, H, W, C], each mirrored left to right with probability ½ as its key [B] says."""
  flips = jax.vmap(jax.random.bernoulli)(substreams(keys, "flip"))
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def noised(schedule: Schedule, images: jax.Array, keys: jax.Array) -> Noised:
  """One draw of (t, ε) for each image [B, H, W, C] from its key [B]; t is uniform in [0, T).

  Draws do not depend on conditioning: `noised(…)._replace(conditioning=…)` adds it.
  """
  uniform = jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_steps))
  normal = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))
  t, noise = uniform(substreams(keys, "t")), normal(substreams(keys, "noise"))
  return Noised(add_noise(schedule, images=images, t=t, noise=noise), t, noise)


def squared_errors(predicted: jax.Array, pairs: Noised) -> jax.Array:
  """[B] mean squared error over pixels and channels of predicted noise [B, H, W, C]."""
  return jnp.mean(jnp.square(predicted - pairs.noise), axis=(1, 2, 3))
