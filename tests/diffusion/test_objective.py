"""Draws of (t, ε), the ε loss: distributions and a NumPy twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.objective import Noised, float_images, noised, squared_errors

NUM = 20_000


def keys_of(num):
  return fold_in_each(stream(0, "test"), jnp.arange(num))


@pytest.fixture(scope="module")
def draws(schedule):
  """Many draws of (t, ε), for images of zeros."""
  return jax.tree.map(np.asarray, noised(schedule, jnp.zeros((NUM, 2, 1, 1)), keys_of(NUM)))


def test_timesteps_are_uniform(draws, schedule):
  counts = np.bincount(draws.t, minlength=schedule.num_steps)
  assert len(counts) == schedule.num_steps == 10
  expected = NUM / 10
  # Chi-square with 9 degrees of freedom passes 27.9 once in a thousand seeds.
  assert np.sum((counts - expected) ** 2 / expected) < 27.9


def test_noise_is_standard_normal(draws):
  values = np.float64(draws.noise.ravel())
  num = values.size
  # Four standard errors of the first four moments: their variances are 1, 2, 15 and 96 over n.
  for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
    assert abs(np.mean(values**power) - moment) < 4 * np.sqrt(variance / num)


def test_noise_is_independent_between_pixels_and_of_the_timestep(draws):
  first, second = draws.noise.reshape(NUM, 2).T
  # Correlations of independent numbers have standard error 1/√n.
  for a, b in ((first, second), (first, draws.t), (first**2, draws.t)):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(NUM)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_noise_is_independent_of_what_others_draw_from_the_same_key(draws, number):
  """Curvature folds a small number into the key of a draw for its sampled targets."""
  keys = fold_in_each(keys_of(NUM), jnp.full(NUM, number))
  others = jax.vmap(lambda key: jax.random.normal(key, (2, 1, 1)))(keys)
  correlation = np.corrcoef(draws.noise.ravel(), np.ravel(others))[0, 1]
  assert abs(correlation) < 4 / np.sqrt(2 * NUM)  # standard error 1/√n


def test_a_draw_depends_on_its_key_and_image_alone(schedule):
  images = jax.random.normal(stream(1, "test"), (6, 2, 2, 1))
  keys = keys_of(6)
  together = noised(schedule, images, keys)
  order = np.array([4, 1])
  apart = noised(schedule, images[order], keys[order])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), apart, together)


def test_the_noised_image_is_that_of_its_draw(schedule):
  images = jax.random.normal(stream(1, "test"), (6, 2, 2, 1))
  pairs = noised(schedule, images, keys_of(6))
  alpha_bars = np.cumprod(1 - np.linspace(0.01, 0.5, 10))[pairs.t].reshape(6, 1, 1, 1)
  expected = np.sqrt(alpha_bars) * images + np.sqrt(1 - alpha_bars) * np.float64(pairs.noise)
  np.testing.assert_allclose(pairs.x_t, expected, atol=1e-6)  # float32 numbers of size 1


def test_the_loss_is_a_mean_over_pixels_and_channels():
  predicted, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
  pairs = Noised(x_t=jnp.zeros_like(noise), t=jnp.zeros(3, jnp.int32), noise=jnp.asarray(noise))
  expected = [
    sum((float(p) - float(e)) ** 2 for p, e in zip(a.flat, b.flat, strict=True)) / 40
    for a, b in zip(predicted, noise, strict=True)
  ]
  # Sums of 40 positive float32 numbers.
  np.testing.assert_allclose(squared_errors(jnp.asarray(predicted), pairs), expected, rtol=1e-6)


def test_bytes_map_linearly_to_minus_one_to_one():
  levels = np.arange(256, dtype=np.uint8)
  # Float32 numbers of size 1.
  np.testing.assert_allclose(float_images(jnp.asarray(levels)), levels / 127.5 - 1, atol=1e-7)
  np.testing.assert_array_equal(float_images(jnp.array([-1.0, 0.3, 1.0])), np.float32([-1, 0.3, 1]))
