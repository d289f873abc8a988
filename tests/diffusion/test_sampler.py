"""Single steps against closed forms; whole runs on Gaussian data with the best network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.sampler import (
  SAMPLERS,
  ancestral_step,
  deterministic_step,
  sample,
  sampler_steps,
  sampler_times,
)
from jaxinf.diffusion.schedule import Schedule
from tests.processes import DISCRETE, PROCESSES, best_network, processes

SHAPE = (2, 2, 1)
FINE = processes(Schedule.linear(200, 5e-4, 0.08))
KEYS = fold_in_each(stream(0, "sample"), jnp.arange(5))
each = pytest.mark.parametrize("process", FINE.values(), ids=FINE)


def at(steps, i):
  return jax.tree.map(lambda table: table[i], steps)


@each
def test_an_ancestral_step_draws_from_the_posterior(process):
  """q(x_s | x_t, x_0) ∝ N(x_s; a_s x_0, b_s²) · N(x_t; r x_s, b_t² − r² b_s²), r = a_t / a_s."""
  a, b = process.exact_levels(sampler_times(process))
  image, x_t, z = np.random.default_rng(0).normal(size=3)
  steps = sampler_steps(process)
  for i in (0, 1, len(b) // 2, len(b) - 3):
    ratio = a[i] / a[i + 1]
    variance = b[i] ** 2 - (ratio * b[i + 1]) ** 2
    precision = 1 / b[i + 1] ** 2 + ratio**2 / variance
    mean = (a[i + 1] * image / b[i + 1] ** 2 + ratio * x_t / variance) / precision
    found = ancestral_step(at(steps, i), x_t, image, None, lambda: z)
    np.testing.assert_allclose(found, mean + z / np.sqrt(precision), rtol=1e-5)  # float32 tables


@each
def test_the_last_step_of_every_sampler_is_the_predicted_image(process):
  last = at(sampler_steps(process), -1)
  for step in SAMPLERS.values():
    assert step(last, 5.0, 0.25, -3.0, lambda: 1e3) == 0.25


@pytest.mark.parametrize("name", ["flow", "flow_logit_normal", "edm", "edm_raw"])
def test_a_deterministic_step_is_eulers_of_the_ode(name):
  """dx/dt is the network's output for flow, and (x − D) / σ for EDM."""
  process = FINE[name]
  times, steps = sampler_times(process, 20), sampler_steps(process, 20)
  x_t, output = np.float32(np.random.default_rng(0).normal(size=(2, 1, 4)))
  for i in (1, 10, 18):
    t = jnp.full(1, steps.t[i])
    image, noise = process.clean(x_t, t, output), process.noise(x_t, t, output)
    slope = output if process.name == "flow" else (x_t - image) / times[i]
    expected = x_t + (times[i + 1] - times[i]) * slope
    found = deterministic_step(at(steps, i), x_t, image, noise, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32 numbers of size 1 to 8


def test_ddim_keeps_the_noise_and_changes_its_level():
  process = FINE["epsilon"]
  image, noise = np.float32(np.random.default_rng(0).normal(size=(2, 1, 4)))
  times, steps = sampler_times(process, 7), sampler_steps(process, 7)
  for i in range(6):
    t, s = (jnp.full(1, time) for time in times[i : i + 2])
    x_t = process.noised(image, t, noise)
    found = deterministic_step(at(steps, i), x_t, process.clean(x_t, t, noise), noise, None)
    # Float32 numbers of size 1, of which x̂_0 loses 50 times that at the noisiest.
    np.testing.assert_allclose(found, process.noised(image, s, noise), rtol=0, atol=1e-5)


MEAN, VARIANCE = 0.3, 0.25  # of each number of the data, all independent


def moments(process, sampler, num_steps):
  """Mean and variance of the samples in float64: with the best network every step is affine."""
  times = sampler_times(process, num_steps)
  a, b = process.exact_levels(times)
  mean, variance = 0.0, 1.0 if process.is_discrete else b[0] ** 2
  for i in range(len(times) - 1):
    # x̂_0 = slope · x_t + offset, and ε̂ = (x_t − a x̂_0) / b.
    slope = a[i] * VARIANCE / (a[i] ** 2 * VARIANCE + b[i] ** 2)
    offset = MEAN - slope * a[i] * MEAN
    if SAMPLERS[sampler] is deterministic_step:
      of_state, added = b[i + 1] / b[i], 0.0
      of_image = a[i + 1] - a[i] * of_state
    else:
      ratio = a[i] / a[i + 1]
      step = b[i] ** 2 - (ratio * b[i + 1]) ** 2
      of_state, of_image = ratio * (b[i + 1] / b[i]) ** 2, a[i + 1] * step / b[i] ** 2
      added = step * (b[i + 1] / b[i]) ** 2
    total = of_state + of_image * slope
    mean, variance = total * mean + of_image * offset, total**2 * variance + added
  return mean, variance


@each
@pytest.mark.parametrize("sampler", ["ddpm", "euler"])
def test_samples_of_gaussian_data_have_its_mean_and_variance(process, sampler):
  num = 2_000
  keys = fold_in_each(stream(0, "sample"), jnp.arange(num))
  apply_fn = best_network(process, MEAN, VARIANCE)
  run = jax.jit(
    lambda keys: sample(apply_fn, None, process, keys, (2,), sampler=sampler, clip=False)[0]
  )
  values = np.float64(run(keys)).ravel()
  mean, variance = moments(process, sampler, None)
  # Four standard errors of the mean and of the variance of n independent normal numbers.
  assert abs(values.mean() - mean) < 4 * np.sqrt(variance / values.size)
  assert abs(values.var() - variance) < 4 * variance * np.sqrt(2 / values.size)
  # What 100 or 200 steps change, relative: Euler's method and the small variance are of first
  # order, and the start lacks the last of the mean: a_T m of a schedule, m / σ_max of EDM.
  assert abs(mean - MEAN) < 0.01 * MEAN
  assert abs(variance - VARIANCE) < 0.13 * VARIANCE


@pytest.mark.parametrize("name", ["epsilon", "v_zero_snr", "flow_logit_normal", "edm"])
@pytest.mark.parametrize("sampler", ["ddpm", "euler"])
def test_more_steps_come_nearer_to_the_data(name, sampler):
  process = processes(Schedule.linear(1000, 1e-4, 0.02))[name]
  few, many = (abs(moments(process, sampler, n)[1] - VARIANCE) for n in (50, 1000))
  # First order in the step, a twentieth; half the rate allows for the grid's uneven steps.
  assert many < few / 10 and many < 0.02 * VARIANCE


def test_ddpm_and_ddim_give_the_samples_that_they_gave_before():
  """Keys of the noise and arithmetic of both samplers, for a network that depends on t."""
  apply_fn = lambda scale, x_t, t: scale * x_t + t[:, None] / 50
  run = functools.partial(sample, apply_fn, 0.5, DISCRETE["epsilon"], KEYS, (2,), clip=False)
  ddpm, ddim = run()[0], run(sampler="ddim", num_steps=4)[0]
  # Six digits; float32 coefficients that were computed in float32 before.
  np.testing.assert_allclose(
    ddpm[:2], [[-1.6406, -0.0102417], [-0.562141, 1.05197]], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    ddim[:2], [[-1.91995, 0.0055138], [-3.29188, 1.38664]], rtol=1e-5, atol=1e-6
  )


def sampled(keys, process=DISCRETE["epsilon"], scale=0.5, **options):
  return sample(lambda scale, x_t, t: scale * x_t, scale, process, keys, SHAPE, **options)


@pytest.mark.parametrize(
  ("name", "sampler", "num_steps"),
  [("epsilon", "ddpm", 10), ("v_zero_snr", "ddpm", 4), ("sample", "ddim", 4), ("edm", "euler", 4)],
)
def test_a_trajectory_leads_from_noise_to_the_image(name, sampler, num_steps):
  run = functools.partial(sampled, KEYS, PROCESSES[name])
  images, states = run(keep_trajectory=True, sampler=sampler, num_steps=num_steps)
  assert images.shape == (5, *SHAPE) and states.shape == (num_steps + 1, 5, *SHAPE)
  np.testing.assert_array_equal(states[-1], images)
  alone, none = run(sampler=sampler, num_steps=num_steps)
  assert none is None
  np.testing.assert_allclose(alone, images, rtol=1e-6)  # the same float32 sums, compiled anew
  # The start is the same whatever follows, and all states are distinct.
  np.testing.assert_array_equal(states[0], run(keep_trajectory=True, num_steps=2)[1][0])
  assert len(np.unique(np.asarray(states).reshape(num_steps + 1, -1), axis=0)) == num_steps + 1


@pytest.mark.parametrize(("name", "sampler"), [("epsilon", "ddpm"), ("flow", "euler")])
def test_a_sample_does_not_depend_on_the_others(name, sampler):
  run = functools.partial(
    sampled, process=PROCESSES[name], sampler=sampler, num_steps=8, clip=False
  )
  images, _ = run(KEYS)
  order = np.array([3, 0])
  # The same float32 numbers, in vectors of another length.
  np.testing.assert_allclose(run(KEYS[order])[0], images[order], rtol=1e-5, atol=1e-6)
  assert len(np.unique(images)) == images.size


@pytest.mark.parametrize(("name", "scale"), [("epsilon", 0.5), ("flow", -3.0)])
@pytest.mark.parametrize("sampler", ["ddpm", "euler"])
def test_samples_are_clipped_unless_told_otherwise(name, scale, sampler):
  run = functools.partial(sampled, KEYS, PROCESSES[name], scale, sampler=sampler, num_steps=10)
  assert np.abs(run()[0]).max() <= 1 + 1e-6  # the last step's float32 product with 1
  assert np.abs(run(clip=False)[0]).max() > 1.5


@pytest.mark.parametrize("name", ["sample", "edm_raw"])
def test_the_start_and_every_step_have_noise_of_their_own(name):
  """With x̂_0 = 0 the states tell the noise of each step; all of it is independent."""
  process, num = PROCESSES[name], 2_000
  keys = fold_in_each(stream(0, "sample"), jnp.arange(num))
  zero = lambda params, inputs, time: 0 * inputs
  how = dict(num_steps=5, keep_trajectory=True)
  _, states = sample(zero, None, process, keys, (1,), **how)
  states, steps = np.float64(states)[:, :, 0], sampler_steps(process, 5)
  drawn = [states[0] / states[0].std()]
  for i in range(4):  # the last step has none
    drawn.append((states[i + 1] - steps.of_state[i] * states[i]) / steps.spread[i])
  # Correlations of independent numbers have standard error 1/√n.
  np.testing.assert_allclose(np.corrcoef(drawn), np.eye(5), rtol=0, atol=4 / np.sqrt(num))


def test_a_clipped_image_takes_the_noise_that_leads_to_it():
  """One ddim step of two, by hand: ε̂ = (x_t − a x̂_0) / b with the clipped x̂_0."""
  process = DISCRETE["epsilon"]
  run = functools.partial(sampled, KEYS, process, sampler="ddim", num_steps=2)
  _, states = run(keep_trajectory=True)
  a, b = process.exact_levels(np.array([9, 0]))
  x_t = np.float64(states[0])
  image = np.clip((x_t - b[0] * 0.5 * x_t) / a[0], -1, 1)
  assert (np.abs(image) == 1).any()
  expected = a[1] * image + b[1] * (x_t - a[0] * image) / b[0]
  np.testing.assert_allclose(states[1], expected, rtol=1e-5, atol=1e-6)  # float32


def test_conditions_belong_to_their_samples():
  apply_fn = lambda params, x_t, t, label: label[:, None] * jnp.ones_like(x_t)
  labels = jnp.float32([0.3, -0.5, 0.1, 0.7, 0.0])
  images, _ = sample(apply_fn, None, PROCESSES["sample"], KEYS, (2,), conditioning=labels)
  np.testing.assert_allclose(images, np.stack([labels, labels], axis=1), atol=1e-6)  # x̂_0 itself


@pytest.mark.parametrize("num_steps", range(1, 51))
def test_timesteps_go_down_evenly_from_the_noisiest_to_the_first(num_steps):
  process = Process.epsilon(Schedule.linear(50, 1e-4, 0.02))
  *timesteps, last = sampler_times(process, num_steps)
  gaps = -np.diff(timesteps)
  assert len(timesteps) == num_steps and timesteps[0] == 49 and last == -1
  assert num_steps == 1 or timesteps[-1] == 0
  assert (gaps >= 1).all() and (num_steps < 3 or gaps.max() - gaps.min() <= 1)


def test_continuous_grids_by_hand():
  np.testing.assert_allclose(sampler_times(Process.flow(), 4), [1, 0.75, 0.5, 0.25, 0])
  shifted = [1, 3 * 0.5 / (1 + 2 * 0.5), 0]
  np.testing.assert_allclose(sampler_times(Process.flow(shift=3.0), 2), shifted)
  middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
  np.testing.assert_allclose(sampler_times(Process.edm(), 3), [80, middle, 0.002, 0], rtol=1e-12)
  assert len(sampler_times(Process.flow())) == 101


@pytest.mark.parametrize(
  ("options", "complaint"),
  [
    ({"sampler": "heun"}, "Unknown sampler 'heun'; there are: ddpm, ddim, euler"),
    ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
    ({"num_steps": 2.5}, "num_steps must be a whole number; got 2.5"),
    ({"sampler": "ddim", "num_steps": 11}, "must lie in 1…10; got 11"),
  ],
)
def test_what_no_sampler_can_do_is_refused(options, complaint):
  with pytest.raises(ValueError, match=complaint):
    sampled(KEYS, **options)
