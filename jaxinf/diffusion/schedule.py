"""Noise schedules of the forward process (paper, Section 2.1 and Appendix A).

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), with ᾱ_t = Π_{s≤t} (1 − β_s) and 0-based t: the paper's
index t is one more.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Schedule:
  """The variances of a diffusion process.

  Attributes:
    betas: β [T] float32, the variance added in each step.
    alpha_bars: ᾱ [T] float32, the share of the image's variance left after each step.
    signal: √ᾱ [T] float32.
    noise: √(1 − ᾱ) [T] float32.
  """

  betas: jax.Array
  alpha_bars: jax.Array
  signal: jax.Array
  noise: jax.Array

  @property
  def num_steps(self) -> int:
    """T, the number of timesteps."""
    return self.betas.shape[0]

  @classmethod
  def from_betas(cls, betas: np.ndarray) -> "Schedule":
    """The schedule with the variances β [T], each in (0, 1); tables are computed in float64."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
      raise ValueError("betas must be a non-empty vector of numbers strictly between 0 and 1.")
    alpha_bars = np.cumprod(1 - betas)
    tables = betas, alpha_bars, np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
    return cls(*(jnp.asarray(table, jnp.float32) for table in tables))

  @classmethod
  def linear(cls, num_steps: int, beta_start: float, beta_end: float) -> "Schedule":
    """β rises linearly from beta_start to beta_end (DDPM: 1000, 1e-4, 0.02)."""
    return cls.from_betas(np.linspace(beta_start, beta_end, _checked(num_steps)))

  @classmethod
  def scaled_linear(cls, num_steps: int, beta_start: float, beta_end: float) -> "Schedule":
    """√β rises linearly (latent diffusion: 1000, 8.5e-4, 0.012)."""
    ends = np.sqrt(beta_start), np.sqrt(beta_end)
    return cls.from_betas(np.linspace(*ends, _checked(num_steps)) ** 2)


def add_noise(schedule: Schedule, *, images: jax.Array, t: jax.Array, noise: jax.Array):
  """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε for images [B, H, W, C], t [B] and noise like images."""
  expand = lambda table: table[t][:, None, None, None]
  return expand(schedule.signal) * images + expand(schedule.noise) * noise


def _checked(num_steps: int) -> int:
  if num_steps < 1:
    raise ValueError(f"A schedule needs at least one timestep; got num_steps={num_steps}.")
  return num_steps


SCHEDULES = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear}
