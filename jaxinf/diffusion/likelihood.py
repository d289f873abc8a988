"""Likelihoods of images and of sampling trajectories under a model, in nats per dimension.

(Paper, Section 4; Ho et al. 2020, Eq. 5 and 12.) With 0-based t, step t leads from x_t to x_{t-1},
step 0 to the image x_{-1}, and the model's steps are

  p(x_{t-1} | x_t) = N(μ_θ, σ_t² I),   μ_θ = (x_t − β_t / √(1 − ᾱ_t) · ε_θ(x_t, t)) / √α_t,

from x_{T-1} ~ N(0, I) on. Unlike samplers' x̂_0, that of μ_θ is not clipped: steps stay linear in
ε_θ, and all that depends on θ are squared errors of ε, with weights a_t (`error_weights`).
Everything is a mean over the D = H·W·C dimensions. Tables are in float64, on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.diffusion.noise import DrawDesign, draw_flips, draw_timesteps
from jaxinf.diffusion.objective import Noised
from jaxinf.diffusion.schedule import Schedule

Variances = Callable[[Schedule], np.ndarray]  # σ² [T] float64, of the model's steps


def small_variances(schedule: Schedule) -> np.ndarray:
  """σ_t² = β̃_t = β_t (1 − ᾱ_{t-1}) / (1 − ᾱ_t), the variance of q(x_{t-1} | x_t, image).

  β̃_0 = 0 would leave no density to the image: σ_0² is β̃_1, as is usual (β_0 where T = 1).
  """
  tables = host_tables(schedule)
  posterior = tables.posterior.copy()
  posterior[0] = posterior[1] if len(posterior) > 1 else tables.betas[0]
  return posterior


def large_variances(schedule: Schedule) -> np.ndarray:
  """σ_t² = β_t, the variance of q(x_t | x_{t-1})."""
  return host_tables(schedule).betas


def error_weights(schedule: Schedule, variances: Variances = small_variances) -> np.ndarray:
  """a_t [T] float64 = β_t² / (2 σ_t² α_t (1 − ᾱ_t)).

  A step whose mean would be right with the noise ε in place of ε_θ costs, beyond what does not
  depend on θ, a_t times the mean squared error of ε_θ.
  """
  tables = host_tables(schedule)
  spread = 2 * variances(schedule) * (1 - tables.betas) * (1 - tables.alpha_bars)
  return np.square(tables.betas) / spread


def elbo_constant(
  schedule: Schedule, images: jax.Array, variances: Variances = small_variances
) -> jax.Array:
  """[B] all of the negative ELBO of images [B, H, W, C] that does not depend on θ.

  The prior KL(q(x_{T-1} | image) ‖ N(0, I)); ½ (β̃_t/σ_t² − 1 + log σ_t²/β̃_t) of each t ≥ 1, where
  the model's variance is not that of q; and ½ log 2πσ_0² of the decoder, which is a density:
  samples of a model are not quantised.
  """
  tables, chosen = host_tables(schedule), variances(schedule)
  ratios = tables.posterior[1:] / chosen[1:]
  mismatch = np.sum(ratios - 1 - np.log(ratios)) / 2
  decoder = np.log(2 * np.pi * chosen[0]) / 2
  signal = tables.alpha_bars[-1]
  squares = jnp.mean(jnp.square(images), axis=(1, 2, 3))
  return signal * squares / 2 + (decoder + mismatch - (signal + np.log1p(-signal)) / 2)


def trajectory_constant(schedule: Schedule, trajectories: jax.Array) -> jax.Array:
  """[B] −log N(x_{T-1}; 0, I) + Σ_t ½ log 2πσ_t² of trajectories [B, T + 1, H, W, C]."""
  squares = jnp.mean(jnp.square(trajectories[:, 0]), axis=(1, 2, 3))
  scales = np.sum(np.log(2 * np.pi * small_variances(schedule)))
  return squares / 2 + (np.log(2 * np.pi) + scales) / 2


def draw_transitions(
  schedule: Schedule, trajectories: jax.Array, keys: jax.Array, design: DrawDesign
) -> Noised:
  """S steps of each trajectory: t by the design, and the noise that makes μ equal x_{t-1}.

  Nothing else is drawn, so that there are no antithetic pairs: with as many stratified draws as
  timesteps, each step comes once.

  Args:
    schedule: of the sampler.
    trajectories: [B, T + 1, H, W, C], all states of DDPM sampling, from noise to image.
    keys: [B, S].
    design: of the draws.
  """
  num_steps = schedule.num_steps
  if trajectories.ndim != 5 or trajectories.shape[1] != num_steps + 1:
    raise ValueError(
      f"A trajectory must have the {num_steps + 1} states of a sampler of {num_steps} steps, from "
      f"noise to image; got an array {trajectories.shape}, not [B, {num_steps + 1}, H, W, C]."
    )
  design = dataclasses.replace(design, antithetic=False)
  t = draw_timesteps(num_steps, keys, design)
  rows = jnp.repeat(jnp.arange(len(trajectories)), keys.shape[1])
  x_t, x_next = (
    draw_flips(trajectories[rows, num_steps - 1 - t + step], keys, design) for step in (0, 1)
  )
  tables = host_tables(schedule)
  column = lambda table: jnp.asarray(table, jnp.float32)[t][:, None, None, None]
  scale = np.sqrt(1 - tables.alpha_bars) / tables.betas
  noise = column(scale) * (x_t - column(np.sqrt(1 - tables.betas)) * x_next)
  return Noised(x_t, t, noise)


class Tables(NamedTuple):
  betas: np.ndarray  # β [T]
  alpha_bars: np.ndarray  # ᾱ [T]
  posterior: np.ndarray  # β̃ [T], with β̃_0 = 0


def host_tables(schedule: Schedule) -> Tables:
  if isinstance(schedule.betas, jax.core.Tracer):
    raise ValueError("Close over the schedule: this measurement needs its numbers under jit.")
  betas = np.asarray(schedule.betas, np.float64)
  alpha_bars = np.cumprod(1 - betas)
  before = np.append(1.0, alpha_bars[:-1])
  return Tables(betas, alpha_bars, betas * (1 - before) / (1 - alpha_bars))
