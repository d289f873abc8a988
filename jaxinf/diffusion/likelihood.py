"""Likelihoods of data and of sampling trajectories under a discrete model, in nats per dimension.

(Paper, Section 4; Ho et al. 2020, Eq. 5 and 12.) With 0-based t, step t leads from x_t to x_{t-1},
step 0 to the data x_{-1}, and the model's steps are

  p(x_{t-1} | x_t) = N(μ_θ, σ_t² I),
  μ_θ = (√ᾱ_{t-1} β_t x̂_0 + √α_t (1 − ᾱ_{t-1}) x_t) / (1 − ᾱ_t),

from x_{T-1} ~ N(0, I) on: the mean of q(x_{t-1} | x_t, x̂_0) at the x̂_0 that the network's output
implies. Unlike samplers' x̂_0, that of μ_θ is not clipped: steps stay linear in the output, and all
that depends on θ are its squared errors, with the weights of `error_weights`. Everything is a mean
over the D dimensions of an example. Tables are in float64, on the host.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.draws import Draws
from jaxinf.diffusion.noise import Noised, draw_augmentations, draw_integers
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule

Variances = Callable[[Schedule], np.ndarray]  # σ² [T] float64, of the model's steps


def small_variances(schedule: Schedule) -> np.ndarray:
  """σ_t² = β̃_t = β_t (1 − ᾱ_{t-1}) / (1 − ᾱ_t), the variance of q(x_{t-1} | x_t, x_0).

  β̃_0 is zero, where q knows the data: σ_0² is β̃_1, as is usual (β_0 where T = 1).
  """
  posterior = posterior_variances(schedule)
  posterior[0] = posterior[1] if len(posterior) > 1 else schedule.exact_betas[0]
  return posterior


def large_variances(schedule: Schedule) -> np.ndarray:
  """σ_t² = β_t, the variance of q(x_t | x_{t-1})."""
  return schedule.exact_betas


def posterior_variances(schedule: Schedule) -> np.ndarray:
  """β̃ [T], with β̃_0 = 0."""
  return schedule.exact_betas * (1 - _before(schedule)) / (1 - schedule.exact_alpha_bars)


def image_error_weights(schedule: Schedule, variances: Variances) -> np.ndarray:
  """[T] ᾱ_{t-1} β_t² / (2 σ_t² (1 − ᾱ_t)²).

  A step whose mean would be right with x_0 in place of x̂_0 costs, beyond what does not depend on θ,
  this times the mean squared error of x̂_0.
  """
  shares = schedule.exact_betas / (1 - schedule.exact_alpha_bars)
  return _before(schedule) * shares**2 / (2 * variances(schedule))


def error_weights(process: Process, variances: Variances = small_variances) -> np.ndarray:
  """[T] what the mean squared error of the network's output costs in each step."""
  schedule = discrete_schedule(process)
  return image_error_weights(schedule, variances) * process.exact_clean_error_scales


def elbo_constant(
  process: Process, data: jax.Array, variances: Variances = small_variances
) -> jax.Array:
  """[B] all of the negative ELBO of data [B, …] that does not depend on θ.

  The prior KL(q(x_{T-1} | x_0) ‖ N(0, I)); ½ (β̃_t/σ_t² − 1 + log σ_t²/β̃_t) of each t ≥ 1, where
  the model's variance is not that of q; and ½ log 2πσ_0² of the decoder, which is a density:
  samples of a model are not quantised.
  """
  schedule = discrete_schedule(process)
  chosen = variances(schedule)
  ratios = posterior_variances(schedule)[1:] / chosen[1:]
  mismatch = np.sum(ratios - 1 - np.log(ratios)) / 2
  decoder = np.log(2 * np.pi * chosen[0]) / 2
  signal = schedule.exact_alpha_bars[-1]
  squares = _mean_squares(data)
  return signal * squares / 2 + (decoder + mismatch - (signal + np.log1p(-signal)) / 2)


def trajectory_constant(process: Process, trajectories: jax.Array) -> jax.Array:
  """[B] −log N(x_{T-1}; 0, I) + Σ_t ½ log 2πσ_t² of trajectories [B, T + 1, …]."""
  squares = _mean_squares(trajectories[:, 0])
  scales = np.sum(np.log(2 * np.pi * small_variances(discrete_schedule(process))))
  return squares / 2 + (np.log(2 * np.pi) + scales) / 2


def draw_transitions(
  process: Process,
  trajectories: jax.Array,
  keys: jax.Array,
  draws: Draws,
  augmentation: Augmentation = PLAIN,
) -> Noised:
  """S steps of each trajectory: t by the design, and the target at which μ equals x_{t-1}.

  Nothing else is drawn, so that there are no antithetic pairs: with as many stratified draws as
  timesteps, each step comes once.

  Args:
    process: of the sampler.
    trajectories: [B, T + 1, …], all states of DDPM sampling, from noise to data.
    keys: [B, S].
    draws: the design.
    augmentation: of each draw, which can mirror its images.
  """
  schedule = discrete_schedule(process)
  num_steps = schedule.num_steps
  if trajectories.ndim < 3 or trajectories.shape[1] != num_steps + 1:
    raise ValueError(
      f"A trajectory must have the {num_steps + 1} states of a sampler of {num_steps} steps, from "
      f"noise to data; got an array {trajectories.shape}, not [B, {num_steps + 1}, …]."
    )
  draws = dataclasses.replace(draws, antithetic=False)
  t = draw_integers(num_steps, keys, draws)
  rows = jnp.repeat(jnp.arange(len(trajectories)), keys.shape[1])
  states = [trajectories[rows, num_steps - 1 - t + step] for step in (0, 1)]
  states = [augmentation.mirrored(x, draw_augmentations(keys, draws)) for x in states]
  x_t, x_next = states
  betas, before, remains = schedule.exact_betas, _before(schedule), 1 - schedule.exact_alpha_bars
  column = lambda table: jnp.asarray(table, jnp.float32)[t].reshape(-1, *[1] * (x_t.ndim - 1))
  of_image = np.sqrt(before) * betas / remains
  of_state = np.sqrt(1 - betas) * (1 - before) / remains
  image = (x_next - column(of_state) * x_t) / column(of_image)
  noise = (x_t - column(process.exact.a) * image) / column(process.exact.b)
  inputs, time = process.inputs(x_t, t)
  return Noised(inputs, time, process.target(image, noise, t), process.weights(t), t)


def discrete_schedule(process: Process) -> Schedule:
  """The schedule of a discrete process; ValueError for another."""
  if process.schedule is None:
    raise ValueError(f"A likelihood by steps needs discrete timesteps; {process} is continuous.")
  return process.schedule


def _before(schedule: Schedule) -> np.ndarray:
  """ᾱ_{t-1} [T], with ᾱ_{-1} = 1."""
  return np.append(1.0, schedule.exact_alpha_bars[:-1])


def _mean_squares(data: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(data), axis=tuple(range(1, data.ndim)))
