"""How the draws of (t, ε) of a measurement are made: designs that average to the same number.

Every design is unbiased: the draws of one group together have t uniform on 0 … T − 1 and ε standard
normal, however they depend on each other. A group of draws is one complete design, so that
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
    antithetic: draws come in pairs (t, ε) and (t, −ε), which share a stratum; the last of an odd
      number stands alone, at any t.
    shared: all examples have the same draws (common random numbers), so that their scores are
      compared on equal terms; otherwise each example has its own. A sum over examples is then no
      less noisy than its terms.

  On scikit-learn's digits the default orders training images better than any other design of as
  many draws; `make bench-draws` has the figures.

  Raises:
    ValueError: unknown timesteps.
  """

  timesteps: str = "stratified"
  antithetic: bool = True
  shared: bool = True

  def __post_init__(self):
    if self.timesteps not in TIMESTEPS:
      raise ValueError(f"Unknown timesteps {self.timesteps!r}; there are: {', '.join(TIMESTEPS)}.")

  def numbers(self, ids: jax.Array) -> jax.Array:
    """Example numbers [B] that the keys of examples `ids` [B] are made from."""
    return jnp.zeros_like(ids) if self.shared else ids


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
  num, size = keys.shape
  twice = 2 if design.antithetic else 1
  firsts = keys[:, ::twice]  # of each pair, or all
  flat, num_firsts = firsts.reshape(-1), firsts.shape[1]
  t = _timesteps(schedule.num_steps, substreams(flat, "t"), design, num_firsts, size // twice)
  noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(substreams(flat, "noise"))
  if design.antithetic:
    both = lambda x, other: jnp.stack([x, other], axis=1).reshape(num, 2 * num_firsts, *x.shape[1:])
    t, noise = (
      x[:, :size].reshape(num * size, *x.shape[2:]) for x in (both(t, t), both(noise, -noise))
    )
  images = jnp.repeat(images, size, axis=0)
  return Noised(add_noise(schedule, images=images, t=t, noise=noise), t, noise)


def _timesteps(
  num_steps: int, keys: jax.Array, design: DrawDesign, num: int, strata: int
) -> jax.Array:
  """Timesteps [B · num] int32 from keys [B · num]; draws beyond one a stratum are uniform."""
  if design.timesteps == "uniform":
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_steps))(keys)
  within = jax.vmap(jax.random.uniform)(keys).reshape(-1, num)
  parts = (jnp.arange(strata) + within[:, :strata]) / max(strata, 1)
  t = jnp.concatenate([parts, within[:, strata:]], axis=1).reshape(-1) * num_steps
  return jnp.minimum(t.astype(jnp.int32), num_steps - 1)  # a sum may round up to the next stratum
