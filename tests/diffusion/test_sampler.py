"""Single steps against closed forms; whole runs on Gaussian data, where the best ε is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.sampler import _timesteps, ddim_step, ddpm_step, sample
from jaxinf.diffusion.schedule import Schedule

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BARS = np.cumprod(1 - BETAS)
DDPM = Schedule.linear(1000, 1e-4, 0.02)
SHAPE = (2, 2, 1)


@pytest.fixture(scope="module")
def states():
  """x_0 within [-1, 1], ε and z [3, 2, 2, 1]."""
  rng = np.random.default_rng(0)
  image = rng.uniform(-0.9, 0.9, (3, *SHAPE))
  return np.float32(image), *np.float32(rng.normal(size=(2, 3, *SHAPE)))


def x_at(t, image, noise):
  return np.sqrt(ALPHA_BARS[t]) * np.float64(image) + np.sqrt(1 - ALPHA_BARS[t]) * noise


@pytest.mark.parametrize("t", [1, 2, 500, 999])
@pytest.mark.parametrize("clip", [True, False])
def test_a_ddpm_step_draws_from_the_posterior(states, t, clip):
  """q(x_{t-1} | x_t, x_0) ∝ N(x_{t-1}; √ᾱ_{t-1} x_0, 1 − ᾱ_{t-1}) · N(x_t; √α_t x_{t-1}, β_t)."""
  image, noise, z = states
  x_t = x_at(t, image, noise)
  precision = 1 / (1 - ALPHA_BARS[t - 1]) + (1 - BETAS[t]) / BETAS[t]
  mean = (
    np.sqrt(ALPHA_BARS[t - 1]) * image / (1 - ALPHA_BARS[t - 1])
    + np.sqrt(1 - BETAS[t]) * x_t / BETAS[t]
  ) / precision
  actual = ddpm_step(DDPM, x_t=jnp.float32(x_t), t=t, predicted_noise=noise, noise=z, clip=clip)
  # Float32 numbers of size 1; x̂_0 = (x_t − …) / √ᾱ_t loses 160 times that at t = 999, of which
  # the posterior mean takes a ten-thousandth.
  np.testing.assert_allclose(actual, mean + z / np.sqrt(precision), rtol=0, atol=2e-6)


def test_the_last_ddpm_step_is_the_predicted_image_without_noise(states):
  image, noise, z = states
  actual = ddpm_step(
    DDPM, x_t=jnp.float32(x_at(0, image, noise)), t=0, predicted_noise=noise, noise=1e3 * z
  )
  np.testing.assert_allclose(actual, image, rtol=0, atol=1e-6)  # float32 numbers of size 1


@pytest.mark.parametrize(("t", "t_next"), [(999, 500), (500, 499), (1, 0), (20, -1)])
def test_a_ddim_step_keeps_the_noise_and_changes_its_level(states, t, t_next):
  image, noise, _ = states
  expected = image if t_next < 0 else x_at(t_next, image, noise)
  actual = ddim_step(
    DDPM, x_t=jnp.float32(x_at(t, image, noise)), t=t, t_next=t_next, predicted_noise=noise,
    clip=False,
  )  # fmt: skip
  # Float32 numbers of size 1, and 160 times that in x̂_0 at t = 999, here times √ᾱ = 0.28.
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_a_ddim_step_takes_the_noise_that_leads_to_the_clipped_image(states):
  image, noise, _ = states
  t, t_next, image = 500, 300, 3 * image
  x_t, clipped = x_at(t, image, noise), np.clip(np.float64(image), -1, 1)
  assert (clipped != image).any()
  implied = (x_t - np.sqrt(ALPHA_BARS[t]) * clipped) / np.sqrt(1 - ALPHA_BARS[t])
  actual = ddim_step(
    DDPM, x_t=jnp.float32(x_t), t=t, t_next=t_next, predicted_noise=noise, clip=True
  )
  # Float32 numbers of size up to 3.
  np.testing.assert_allclose(actual, x_at(t_next, clipped, implied), rtol=0, atol=5e-6)


MEAN, VARIANCE = 0.3, 0.25  # of each pixel of the data, all independent


def best_noise(params, x_t, t):
  """E[ε | x_t] for data N(m, s² I): √(1 − ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1 − ᾱ)."""
  mean, variance = params
  alpha_bar = DDPM.alpha_bars[t][:, None, None, None]
  spread = alpha_bar * variance + 1 - alpha_bar
  return jnp.sqrt(1 - alpha_bar) * (x_t - jnp.sqrt(alpha_bar) * mean) / spread


def moments(sampler, num_steps):
  """Mean and variance of the samples in float64: with this ε every step is affine in x_t."""
  mean, variance = 0.0, 1.0
  timesteps = _timesteps(DDPM, sampler, num_steps)
  for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
    now, after = ALPHA_BARS[t], ALPHA_BARS[s] if s >= 0 else 1.0
    slope = np.sqrt(1 - now) / (now * VARIANCE + 1 - now)  # ε = slope · x_t + offset
    offset = -slope * np.sqrt(now) * MEAN
    image = (1 - np.sqrt(1 - now) * slope) / np.sqrt(now), -np.sqrt((1 - now) / now) * offset
    if sampler == "ddim":
      a = np.sqrt(after) * image[0] + np.sqrt(1 - after) * slope
      b = np.sqrt(after) * image[1] + np.sqrt(1 - after) * offset
      added = 0.0
    else:
      of_image = np.sqrt(after) * BETAS[t] / (1 - now)
      of_state = np.sqrt(1 - BETAS[t]) * (1 - after) / (1 - now)
      a, b = of_image * image[0] + of_state, of_image * image[1]
      added = BETAS[t] * (1 - after) / (1 - now)
    mean, variance = a * mean + b, a**2 * variance + added
  return mean, variance


@pytest.mark.parametrize(
  ("sampler", "num_steps", "discretisation"),
  # Relative, of s²: the small variance leaves out that of x_0 given x_t; DDIM is an Euler method.
  [("ddpm", None, 0.02), ("ddim", None, 0.01), ("ddim", 50, 0.12)],
)
def test_samples_of_gaussian_data_have_its_mean_and_variance(sampler, num_steps, discretisation):
  num = 2000
  keys = fold_in_each(stream(0, "sample"), jnp.arange(num))
  run = jax.jit(
    lambda keys: sample(
      best_noise, (MEAN, VARIANCE), DDPM, keys, SHAPE, sampler=sampler, num_steps=num_steps,
      clip=False,
    )[0]
  )  # fmt: skip
  values = np.float64(run(keys)).ravel()
  mean, variance = moments(sampler, num_steps)
  # Four standard errors of the mean and of the variance of n independent normal numbers.
  assert abs(values.mean() - mean) < 4 * np.sqrt(variance / values.size)
  assert abs(values.var() - variance) < 4 * variance * np.sqrt(2 / values.size)
  # What finitely many steps change, and a start without the last √ᾱ_T m of the mean.
  assert abs(mean - MEAN) < 0.01 * MEAN
  assert abs(variance - VARIANCE) < discretisation * VARIANCE


def sampled(keys, **options):
  small = Schedule.linear(10, 0.01, 0.5)
  apply_fn = lambda scale, x_t, t: scale * x_t
  return sample(apply_fn, 0.5, small, keys, SHAPE, **options)


KEYS = fold_in_each(stream(0, "sample"), jnp.arange(5))


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 10), ("ddim", 10), ("ddim", 4)])
def test_a_trajectory_leads_from_noise_to_the_image(sampler, num_steps):
  options = dict(sampler=sampler, num_steps=num_steps)
  images, states = sampled(KEYS, keep_trajectory=True, **options)
  assert images.shape == (5, *SHAPE) and states.shape == (num_steps + 1, 5, *SHAPE)
  np.testing.assert_array_equal(states[-1], images)
  alone, none = sampled(KEYS, **options)
  assert none is None
  np.testing.assert_allclose(alone, images, rtol=1e-6)  # the same float32 sums, compiled anew
  # The start is the same whatever follows, and all states are distinct.
  np.testing.assert_array_equal(states[0], sampled(KEYS, keep_trajectory=True)[1][0])
  assert len(np.unique(np.asarray(states).reshape(num_steps + 1, -1), axis=0)) == num_steps + 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_does_not_depend_on_the_others(sampler):
  images, _ = sampled(KEYS, sampler=sampler, clip=False)
  order = np.array([3, 0])
  # The same float32 numbers, in vectors of another length.
  apart, _ = sampled(KEYS[order], sampler=sampler, clip=False)
  np.testing.assert_allclose(apart, images[order], rtol=1e-5, atol=1e-6)
  assert len(np.unique(images)) == images.size


def test_samples_are_clipped_unless_told_otherwise():
  largest = np.abs(sampled(KEYS)[0]).max()
  np.testing.assert_allclose(largest, 1, atol=1e-6)  # the last step's float32 product with 1
  assert np.abs(sampled(KEYS, clip=False)[0]).max() > 1.5


@pytest.mark.parametrize("num_steps", range(1, 51))
def test_ddim_goes_down_evenly_from_the_noisiest_timestep_to_the_first(num_steps):
  timesteps = _timesteps(Schedule.linear(50, 1e-4, 0.02), "ddim", num_steps)
  gaps = -np.diff(timesteps)
  assert len(timesteps) == num_steps and timesteps[0] == 49
  assert num_steps == 1 or timesteps[-1] == 0
  assert (gaps >= 1).all() and (num_steps < 3 or gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ({"sampler": "euler"}, "Unknown sampler 'euler'; there are: ddpm, ddim"),
    ({"sampler": "ddpm", "num_steps": 5}, "takes all 10 steps of the schedule; .* use ddim"),
    ({"sampler": "ddim", "num_steps": 0}, "must lie in 1…10; got 0"),
    ({"sampler": "ddim", "num_steps": 11}, "must lie in 1…10; got 11"),
  ],
)
def test_what_no_sampler_can_do_is_refused(options, complaint):
  with pytest.raises(ValueError, match=complaint):
    sampled(KEYS, **options)
