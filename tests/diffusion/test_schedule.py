"""Noise schedules against their closed forms in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.diffusion.schedule import SCHEDULES, Schedule

FLOAT32 = 1e-7  # one rounding


def assert_tables(schedule, betas):
  log_alpha_bars = np.cumsum(np.log1p(-betas))
  expected = {
    "betas": betas,
    "alpha_bars": np.exp(log_alpha_bars),
    "signal": np.exp(log_alpha_bars / 2),
    "noise": np.sqrt(-np.expm1(log_alpha_bars)),  # without the cancellation of 1 − ᾱ
  }
  for name, table in expected.items():
    assert getattr(schedule, name).dtype == np.float32
    np.testing.assert_allclose(getattr(schedule, name), table, rtol=FLOAT32, atol=0)
  np.testing.assert_allclose(schedule.exact_betas, betas, rtol=1e-12)  # float64
  np.testing.assert_allclose(schedule.exact_alpha_bars, np.exp(log_alpha_bars), rtol=1e-12)


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


@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_cosine_shares_follow_the_squared_cosine_until_the_largest_variance(num_steps):
  """ᾱ_t = f((t + 1)/T) / f(0) while no β is above 0.999, which only the last is."""
  schedule = Schedule.cosine(num_steps)
  share = lambda time: np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
  expected = share(np.arange(1, num_steps) / num_steps) / share(0)
  np.testing.assert_allclose(schedule.exact_alpha_bars[:-1], expected, rtol=1e-9)  # float64 sums
  assert schedule.exact_betas[-1] == 0.999


def test_sigmoid_variances_rise_along_the_logistic_function():
  betas = Schedule.sigmoid(5, 1e-4, 0.02).exact_betas
  by_hand = [1e-4 + 0.0199 / (1 + np.exp(-x)) for x in (-6, -3, 0, 3, 6)]
  np.testing.assert_allclose(betas, by_hand, rtol=1e-12)  # float64


def test_the_ddpm_schedule_ends_in_nearly_pure_noise():
  # ᾱ_T of Ho et al.: 4.0e-5.
  assert 4.0e-5 < float(Schedule.linear(1000, 1e-4, 0.02).alpha_bars[-1]) < 4.1e-5


def test_shares_and_variances_give_the_same_schedule():
  schedule = Schedule.linear(20, 1e-3, 0.3)
  again = Schedule.from_alpha_bars(schedule.exact_alpha_bars)
  np.testing.assert_allclose(again.exact_betas, schedule.exact_betas, rtol=1e-12)  # float64
  assert Schedule.from_betas(schedule.exact_betas) == schedule


def test_zero_terminal_snr_keeps_the_first_share_and_moves_roots_evenly():
  """Lin et al. 2023, Algorithm 1, written out for three steps."""
  roots = np.sqrt([0.9, 0.5, 0.1])
  moved = (roots - roots[2]) * roots[0] / (roots[0] - roots[2])
  schedule = Schedule.from_alpha_bars([0.9, 0.5, 0.1]).with_zero_terminal_snr()
  np.testing.assert_allclose(schedule.exact_alpha_bars, moved**2, rtol=1e-12, atol=0)
  np.testing.assert_allclose(schedule.exact_betas, [0.1, 1 - moved[1] ** 2 / 0.9, 1.0], rtol=1e-12)
  assert schedule.exact_alpha_bars[-1] == 0 and schedule.has_zero_terminal_snr
  assert schedule.signal[-1] == 0 and schedule.noise[-1] == 1
  assert schedule.with_zero_terminal_snr() == schedule
  assert Schedule.from_betas(schedule.exact_betas).has_zero_terminal_snr


def test_schedules_are_compared_by_value_and_may_be_closed_over():
  one, other = Schedule.linear(10, 0.01, 0.5), Schedule.from_betas(np.linspace(0.01, 0.5, 10))
  assert one == other and hash(one) == hash(other)
  assert one != Schedule.linear(10, 0.01, 0.4) and one != "linear"
  with pytest.raises(ValueError, match="read-only"):
    one.signal[0] = 0
  at = jax.jit(lambda t: jnp.asarray(one.signal)[t])
  assert at(3) == one.signal[3]


@pytest.mark.parametrize(
  "schedule",
  [
    *(made(7, 1e-3, 0.2) for made in SCHEDULES.values()),
    Schedule.from_betas([0.1, 0.2, 1.0]),
    Schedule.from_alpha_bars([0.9, 0.3]),
    Schedule.cosine(5, 0.9).with_zero_terminal_snr(),
  ],
  ids=repr,
)
def test_settings_are_json_and_make_the_schedule_again(schedule):
  assert Schedule.from_settings(json.loads(json.dumps(dict(schedule.settings)))) == schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_schedule_without_timesteps_is_refused(name, num_steps):
  with pytest.raises(ValueError, match=f"num_steps must be at least 1; got {num_steps}"):
    SCHEDULES[name](num_steps, 1e-4, 0.02)


@pytest.mark.parametrize(
  "betas", [[], [0.0], [1.1], [1.0, 0.5], [0.1, -0.1], [0.1, np.nan], [np.nan, 0.1], [[0.1]]]
)
def test_variances_that_are_none_are_refused(betas):
  with pytest.raises(ValueError, match=r"between 0 and 1|must lie in \(0, 1\]"):
    Schedule.from_betas(np.array(betas))


@pytest.mark.parametrize(
  "shares",
  [[], [1.0, 0.5], [0.5, 0.5], [0.5, 0.6], [0.5, 0.0, 0.0], [0.5, -0.1], [np.nan], [[0.5]]],
)
def test_shares_that_do_not_fall_are_refused(shares):
  with pytest.raises(ValueError, match="falls from a number below 1"):
    Schedule.from_alpha_bars(np.array(shares))


def test_one_timestep_cannot_have_a_zero_terminal_snr():
  with pytest.raises(ValueError, match="at least 2 timesteps"):
    Schedule.linear(1, 1e-4, 0.02).with_zero_terminal_snr()
