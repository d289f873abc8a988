"""Weights w_t [T] of the squared errors of ε̂, by which losses of diffusion models differ.

With t uniform, the loss is the mean of w_t · mean squared error of ε̂ (paper, Appendix H), whatever
the network predicts. An error of x̂_0 is that of ε̂ over SNR_t = ᾱ_t / (1 − ᾱ_t): what the
literature calls weights of the image's squared error are w_t · SNR_t. Float64 on the host.
"""

import numpy as np

from jaxinf.diffusion.likelihood import image_error_weights, large_variances, small_variances
from jaxinf.diffusion.schedule import Schedule


def uniform(schedule: Schedule) -> np.ndarray:
  """1: the loss of a network that predicts ε."""
  return np.ones(schedule.num_steps)


def elbo(schedule: Schedule) -> np.ndarray:
  """T · a_t, the decoder's step t = 0 among them: the θ-dependent part of the negative ELBO."""
  return schedule.num_steps * image_error_weights(schedule, small_variances) * inverse_snr(schedule)


def elbo_large(schedule: Schedule) -> np.ndarray:
  """The same where the model's steps have the variances β_t."""
  return schedule.num_steps * image_error_weights(schedule, large_variances) * inverse_snr(schedule)


def simple_elbo(schedule: Schedule) -> np.ndarray:
  """T · a_t of t ≥ 1, the divergences between Gaussians: `elbo` without its decoder."""
  return np.append(0.0, elbo(schedule)[1:])


def snr(schedule: Schedule) -> np.ndarray:
  """SNR_t: stresses little noise."""
  return schedule.exact_alpha_bars / (1 - schedule.exact_alpha_bars)


def inverse_snr(schedule: Schedule) -> np.ndarray:
  """1 / SNR_t: the squared error of x̂_0; infinite where nothing is left of the data."""
  with np.errstate(divide="ignore"):
    return (1 - schedule.exact_alpha_bars) / schedule.exact_alpha_bars


def truncated_snr(schedule: Schedule) -> np.ndarray:
  """max(1, 1 / SNR_t): the larger of both squared errors (Salimans and Ho 2022)."""
  return np.maximum(1, inverse_snr(schedule))


def min_snr(schedule: Schedule) -> np.ndarray:
  """min(1, 5 / SNR_t): little noise counts less (Hang et al. 2023, γ = 5)."""
  return np.minimum(1, 5 * inverse_snr(schedule))


WEIGHTINGS = {
  "uniform": uniform,
  "elbo": elbo,
  "elbo_large": elbo_large,
  "simple_elbo": simple_elbo,
  "snr": snr,
  "inverse_snr": inverse_snr,
  "truncated_snr": truncated_snr,
  "min_snr": min_snr,
}
