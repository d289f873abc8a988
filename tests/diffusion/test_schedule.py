"""Noise schedules against their closed forms in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.diffusion.schedule import SCHEDULES, Schedule, add_noise

# One rounding to float32.
FLOAT32 = 1e-7


def assert_tables(schedule, betas):
  log_alpha_bars = np.cumsum(np.log1p(-betas))
  expected = {
    "betas": betas,
    "alpha_bars": np.exp(log_alpha_bars),
    "signal": np.exp(log_alpha_bars / 2),
    "noise": np.sqrt(-np.expm1(log_alpha_bars)),  # without the cancellation of 1 − ᾱ
  }
  for name, table in expected.items():
    assert getattr(schedule, name).dtype == jnp.float32
    np.testing.assert_allclose(getattr(schedule, name), table, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_linear_variances_rise_linearly(num_steps):
  schedule = Schedule.linear(num_steps, 1e-4, 0.02)
  assert schedule.num_steps == num_steps
  t = np.arange(num_steps)
  assert_tables(schedule, 1e-4 + (0.02 - 1e-4) * t / max(num_steps - 1, 1))


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_scaled_linear_roots_rise_linearly(num_steps):
  schedule = Schedule.scaled_linear(num_steps, 8.5e-4, 0.012)
  start, end = np.sqrt(8.5e-4), np.sqrt(0.012)
  t = np.arange(num_steps)
  assert_tables(schedule, (start + (end - start) * t / max(num_steps - 1, 1)) ** 2)


def test_the_ddpm_schedule_ends_in_nearly_pure_noise():
  # ᾱ_T of Ho et al.: 4.0e-5.
  assert 4.0e-5 < float(Schedule.linear(1000, 1e-4, 0.02).alpha_bars[-1]) < 4.1e-5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_schedule_without_timesteps_is_refused(name, num_steps):
  with pytest.raises(ValueError, match=f"at least one timestep; got num_steps={num_steps}"):
    SCHEDULES[name](num_steps, 1e-4, 0.02)


@pytest.mark.parametrize("betas", [[], [0.0], [1.0], [0.1, -0.1], [0.1, np.nan], [[0.1]]])
def test_variances_outside_the_open_unit_interval_are_refused(betas):
  with pytest.raises(ValueError, match="strictly between 0 and 1"):
    Schedule.from_betas(np.array(betas))


def test_noising_mixes_image_and_noise_by_timestep():
  betas = np.linspace(1e-4, 0.02, 1000)
  schedule = Schedule.from_betas(betas)
  rng = np.random.default_rng(0)
  images, noise = rng.normal(size=(2, 4, 3, 2, 1)).astype(np.float32)
  t = np.array([0, 1, 500, 999])
  alpha_bars = np.cumprod(1 - betas)[t].reshape(4, 1, 1, 1)
  expected = np.sqrt(alpha_bars) * np.float64(images) + np.sqrt(1 - alpha_bars) * noise
  x_t = add_noise(schedule, images=jnp.asarray(images), t=jnp.asarray(t), noise=jnp.asarray(noise))
  # Float32 products and sums of numbers of size 1.
  np.testing.assert_allclose(x_t, expected, rtol=0, atol=1e-6)
