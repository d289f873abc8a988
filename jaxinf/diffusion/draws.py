"""How the draws of (t, ε) of a measurement are made: designs that average to the same number.

Every design is unbiased: each draw alone has t uniform on 0 … T − 1 and ε standard normal, however
the draws of one group depend on each other. A group of draws is one complete design, so that
groups are independent of each other and their spread is the noise of the mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxinf.diffusion.objective import Noised
from jaxinf.diffusion.schedule import Schedule, add_noise
from jaxinf.random import substreams

TIMESTEPS = ("uniform", "stratified")


@dataclasses.dataclass(frozen=True)
class DrawDesign:
  """The design of one group of S draws.

  Attributes:
    timesteps: "uniform", with replacement (the paper), or "stratified": draw s lies in the s-th of
      S equal parts of [0, T).
    antithetic: draws come in pairs (t, ε) and (t, −ε), which share a stratum; S must be even.
    shared: all examples have the same draws (common random numbers), so that their scores are
      compared on equal terms; otherwise each example has its own.

  Raises:
    ValueError: unknown timesteps.
  """

  timesteps: str = "stratified"
  antithetic: bool = False
  shared: bool = False

  def __post_init__(self):
    if self.timesteps not in TIMESTEPS:
      raise ValueError(f"Unknown timesteps {self.timesteps!r}; there are: {', '.join(TIMESTEPS)}.")

  def check_size(self, size: int) -> None:
    """Raises ValueError unless a group may have `size` draws."""
    if self.antithetic and size % 2:
      raise ValueError(
        f"Antithetic draws come in pairs, so a group must have an even number of them; got {size}. "
        "Change draws or draw_groups, or turn antithetic off."
      )

  def numbers(self, ids: jax.Array) -> jax.Array:
    """Example numbers [B] that the keys of examples `ids` [B] are made from."""
    return jnp.zeros_like(ids) if self.shared else ids


UNIFORM = DrawDesign("uniform")  # the paper's: independent draws, each example's own


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
  num, size = keys.shape
  twice = 2 if design.antithetic else 1
  flat = keys[:, ::twice].reshape(-1)
  t = _timesteps(schedule.num_steps, substreams(flat, "t"), design, size // twice)
  noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(substreams(flat, "noise"))
  if design.antithetic:
    t = jnp.repeat(t, 2)
    noise = jnp.stack([noise, -noise], axis=1).reshape(num * size, *images.shape[1:])
  images = jnp.repeat(images, size, axis=0)
  return Noised(add_noise(schedule, images=images, t=t, noise=noise), t, noise)


def _timesteps(num_steps: int, keys: jax.Array, design: DrawDesign, strata: int) -> jax.Array:
  """Timesteps [B · strata] int32 from keys [B · strata]."""
  if design.timesteps == "uniform":
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(keys)
  within = jax.vmap(jax.random.uniform)(keys)
  stratum = jnp.tile(jnp.arange(strata), len(keys) // strata)
  t = jnp.floor((stratum + within) * (num_steps / strata)).astype(jnp.int32)
  return jnp.minimum(t, num_steps - 1)  # the sum may round up to the next stratum
