"""Samplers: ancestral DDPM with the small variance, and DDIM. One key a sample.

DDPM (Ho et al. 2020, Algorithm 2): x_{t-1} = μ_t(x_t, x̂_0) + σ_t z, where
x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ) / √ᾱ_t is clipped to [-1, 1], μ_t is the mean of q(x_{t-1} | x_t, x̂_0)
and σ_t² = β_t (1 − ᾱ_{t-1}) / (1 − ᾱ_t) is its variance (the "small" one).
DDIM (Song et al. 2021, Eq. 12 with η = 0): x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s) ε_θ over a subset of steps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.random import fold_in_each
from jaxinf.core.types import ApplyFn, Params
from jaxinf.diffusion.schedule import Schedule


def ddpm_step(schedule: Schedule, *, x_t, t, predicted_noise, noise, clip: bool = True):
  """x_{t-1} from x_t [B, H, W, C] at one timestep t (scalar int); no noise is added at t = 0.

  Args:
    x_t: [B, H, W, C].
    t: scalar timestep in [0, T).
    predicted_noise: ε_θ(x_t, t) [B, H, W, C].
    noise: z [B, H, W, C], standard normal.
    clip: whether x̂_0 is clipped to [-1, 1].
  """
  beta = schedule.betas[t]
  signal_before, noise_before = _levels(schedule, t - 1)
  # Squares of the table, because 1 − ᾱ_t in float32 loses up to four digits at small t.
  variance_before, variance_now = jnp.square(noise_before), jnp.square(schedule.noise[t])
  image = _predicted_image(schedule, x_t, t, predicted_noise, clip)
  mean = (
    signal_before * beta / variance_now * image
    + jnp.sqrt(1 - beta) * variance_before / variance_now * x_t
  )
  return mean + jnp.sqrt(beta * variance_before / variance_now) * noise


def ddim_step(schedule: Schedule, *, x_t, t, t_next, predicted_noise, clip: bool = True):
  """x at t_next < t (scalar ints; −1 means the image itself) from x_t, without noise."""
  signal_next, noise_next = _levels(schedule, t_next)
  image = _predicted_image(schedule, x_t, t, predicted_noise, clip)
  if clip:  # the ε that leads from the clipped image to x_t
    predicted_noise = (x_t - schedule.signal[t] * image) / schedule.noise[t]
  return signal_next * image + noise_next * predicted_noise


def sample(
  apply_fn: ApplyFn,
  params: Params,
  schedule: Schedule,
  keys: jax.Array,
  image_shape: tuple[int, int, int],
  *,
  sampler: str = "ddpm",
  num_steps: int | None = None,
  keep_trajectory: bool = False,
  clip: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Generates one image for each key.

  Args:
    apply_fn, params: the noise predictor.
    schedule: the process it was trained with.
    keys: [B], one a sample; a sample does not depend on the others.
    image_shape: (H, W, C).
    sampler: "ddpm" or "ddim".
    num_steps: steps taken: all T for "ddpm"; any number up to T for "ddim", evenly spaced.
    keep_trajectory: whether to return the states on the way as well.
    clip: whether x̂_0 is clipped to [-1, 1] in every step.

  Returns:
    images [B, H, W, C] float32 (in [-1, 1] where clip), and the trajectory
    [num_steps + 1, B, H, W, C] from x_T to the image, or None.
  """
  timesteps = _timesteps(schedule, sampler, num_steps)
  stochastic = sampler == "ddpm"
  normal = jax.vmap(lambda key: jax.random.normal(key, image_shape))
  # Fold-in numbers 0 … T − 1 make the noise of a step, T the start.
  start = normal(fold_in_each(keys, jnp.full(keys.shape, schedule.num_steps)))

  def step(x_t, times):
    t, t_next = times
    predicted = apply_fn(params, x_t, jnp.full(keys.shape, t))
    if stochastic:
      noise = normal(fold_in_each(keys, jnp.full(keys.shape, t)))
      x_next = ddpm_step(schedule, x_t=x_t, t=t, predicted_noise=predicted, noise=noise, clip=clip)
    else:
      x_next = ddim_step(
        schedule, x_t=x_t, t=t, t_next=t_next, predicted_noise=predicted, clip=clip
      )
    return x_next, x_next if keep_trajectory else None

  times = jnp.asarray(timesteps), jnp.asarray(np.append(timesteps[1:], -1))
  images, states = jax.lax.scan(step, start, times)
  trajectory = jnp.concatenate([start[None], states]) if keep_trajectory else None
  return images, trajectory


def _levels(schedule, t):
  """(√ᾱ_t, √(1 − ᾱ_t)), or (1, 0) for the image itself at t = −1."""
  signal, noise = schedule.signal[t], schedule.noise[t]
  return jnp.where(t >= 0, signal, 1.0), jnp.where(t >= 0, noise, 0.0)


def _predicted_image(schedule, x_t, t, predicted_noise, clip):
  image = (x_t - schedule.noise[t] * predicted_noise) / schedule.signal[t]
  return jnp.clip(image, -1, 1) if clip else image


def _timesteps(schedule: Schedule, sampler: str, num_steps: int | None) -> np.ndarray:
  """Timesteps visited, from the noisiest down."""
  total = schedule.num_steps
  num_steps = total if num_steps is None else num_steps
  if sampler not in SAMPLERS:
    raise ValueError(f"Unknown sampler {sampler!r}; there are: {', '.join(SAMPLERS)}.")
  if sampler == "ddpm" and num_steps != total:
    raise ValueError(
      f"The ddpm sampler takes all {total} steps of the schedule; for {num_steps} steps use ddim."
    )
  if not 1 <= num_steps <= total:
    raise ValueError(f"num_steps must lie in 1…{total}; got {num_steps}.")
  return np.round(np.linspace(total - 1, 0, num_steps)).astype(np.int32)


SAMPLERS = ("ddpm", "ddim")
