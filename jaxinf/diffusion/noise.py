"""How the draws of (t, ε) of a measurement are made: designs that average to the same number.

Every design is unbiased: the draws of one group together have t uniform on 0 … T − 1 and ε standard
normal, however they depend on each other. A group of draws is one complete design, so that
groups are independent of each other and their spread is the noise of the mean.

Training that mirrors images at random has the mean over both as its loss (paper, Appendix J.8):
then draws are of (flip, t, ε).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxinf.core.random import substreams
from jaxinf.diffusion.objective import Noised, flipped
from jaxinf.diffusion.schedule import Schedule, add_noise

TIMESTEPS = ("uniform", "stratified")


@dataclasses.dataclass(frozen=True)
class DrawDesign:
  """The design of one group of S draws.

  Attributes:
    timesteps: "uniform", with replacement (the paper), or "stratified": draw s lies in the s-th of
      S equal parts of [0, T).
    antithetic: draws come in pairs (t, ε) and (t, −ε), which share a stratum; the last of an odd
      number stands alone, at any t.
    shared: all examples have the same draws (common random numbers), so that their scores are
      compared on equal terms; otherwise each example has its own. A sum over examples is then no
      less noisy than its terms.
    random_flip: each draw mirrors its image left to right with probability ½; antithetic pairs
      share their flip. For the training images of a model trained so, never for queries.

  On scikit-learn's digits the default orders training images better than any other design of as
  many draws; `make bench-draws` has the figures.

  Raises:
    ValueError: unknown timesteps.
  """

  timesteps: str = "stratified"
  antithetic: bool = True
  shared: bool = True
  random_flip: bool = False

  def __post_init__(self):
    if self.timesteps not in TIMESTEPS:
      raise ValueError(f"Unknown timesteps {self.timesteps!r}; there are: {', '.join(TIMESTEPS)}.")

  def numbers(self, ids: jax.Array) -> jax.Array:
    """Example numbers [B] that the keys of examples `ids` [B] are made from."""
    return jnp.zeros_like(ids) if self.shared else ids

  def without_flips(self) -> "DrawDesign":
    """The design of queries, which are measured as they are, where this is of training images."""
    return dataclasses.replace(self, random_flip=False)


# The paper's: independent draws, each example's own.
UNIFORM = DrawDesign("uniform", antithetic=False, shared=False)


def draw_pairs(
  schedule: Schedule, images: jax.Array, keys: jax.Array, design: DrawDesign = UNIFORM
) -> Noised:
  """One group of S draws for each image.

  Args:
    schedule: the diffusion process.
    images: [B, H, W, C] float32.
    keys: [B, S], one a draw.
    design: of the group.

  Returns:
    The B · S pairs, image-major, without conditioning.
  """
  images = jnp.repeat(images, keys.shape[1], axis=0)
  t = draw_timesteps(schedule.num_steps, keys, design)
  return draw_noised(schedule, images, t, keys, design)


def draw_timesteps(num_steps: int, keys: jax.Array, design: DrawDesign) -> jax.Array:
  """Timesteps [B · S] int32 in [0, num_steps) of keys [B, S]."""
  firsts = _firsts(keys, design)
  pairs, num = substreams(firsts.reshape(-1), "t"), firsts.shape[1]
  if design.timesteps == "uniform":
    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(pairs)
  else:
    strata = keys.shape[1] // (2 if design.antithetic else 1)
    within = jax.vmap(jax.random.uniform)(pairs).reshape(-1, num)
    parts = (jnp.arange(strata) + within[:, :strata]) / max(strata, 1)
    # Draws beyond one a stratum are uniform; a sum may round up to the next stratum.
    t = jnp.concatenate([parts, within[:, strata:]], axis=1).reshape(-1) * num_steps
    t = jnp.minimum(t.astype(jnp.int32), num_steps - 1)
  return _both(t, keys, design)


def draw_noised(
  schedule: Schedule, images: jax.Array, t: jax.Array, keys: jax.Array, design: DrawDesign
) -> Noised:
  """The pairs of images [B · S, H, W, C] and timesteps [B · S] with the noise of keys [B, S]."""
  normal = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))
  noise = _both(normal(substreams(_firsts(keys, design).reshape(-1), "noise")), keys, design)
  if design.antithetic:
    signs = jnp.tile(1.0 - 2.0 * (jnp.arange(keys.shape[1]) % 2), len(keys))
    noise *= signs[:, None, None, None]
  images = draw_flips(images, keys, design)
  return Noised(add_noise(schedule, images=images, t=t, noise=noise), t, noise)


def draw_flips(images: jax.Array, keys: jax.Array, design: DrawDesign) -> jax.Array:
  """Images [B · S, H, W, C], mirrored as keys [B, S] say where the design has flips."""
  if not design.random_flip:
    return images
  return flipped(images, _both(_firsts(keys, design).reshape(-1), keys, design))


def _firsts(keys: jax.Array, design: DrawDesign) -> jax.Array:
  """[B, F] of keys [B, S]: those of the first draw of each pair, or all."""
  return keys[:, ::2] if design.antithetic else keys


def _both(values: jax.Array, keys: jax.Array, design: DrawDesign) -> jax.Array:
  """[B · S, …]: the values [B · F, …] of first draws, for both draws of each pair."""
  if not design.antithetic:
    return values
  num, size = keys.shape
  each = values.reshape(num, -1, *values.shape[1:])
  return jnp.repeat(each, 2, axis=1)[:, :size].reshape(num * size, *values.shape[1:])
