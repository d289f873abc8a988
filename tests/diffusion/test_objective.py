"""Draws of (t, ε), the ε loss and measurements: distributions, a NumPy twin, a naive loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.diffusion import measurements
from jaxinf.diffusion.draws import UNIFORM
from jaxinf.diffusion.measurements import LOSS, MEASUREMENTS, measurement_named
from jaxinf.diffusion.objective import Noised, float_images, noised, squared_errors
from jaxinf.random import draw_keys, fold_in_each, stream
from tests import nets

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


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_measurement_equals_a_naive_loop_over_images_and_draws(name, dtype, mlp, schedule):
  measurement = MEASUREMENTS[name]
  images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
  images = images if dtype == np.uint8 else np.asarray(float_images(images))
  params = mlp.init(stream(0, "init"), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32))["params"]
  apply_fn = lambda params, x_t, t: mlp.apply({"params": params}, x_t, t)
  keys = jnp.stack([draw_keys(key, 2) for key in keys_of(3)])
  values = measurement.evaluate(apply_fn, params, schedule, jnp.asarray(images), keys)

  expected = np.zeros(3)
  for n in range(3):
    for s in range(2):
      image = float_images(jnp.asarray(images[n : n + 1]))
      pair = measurement.draw(schedule, image, keys[n, s][None, None], UNIFORM)
      expected[n] += measurement.value(apply_fn(params, pair.x_t, pair.t), pair)[0] / 2
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_conditioning_changes_no_draw_and_stays_with_its_image(name):
  measurement = MEASUREMENTS[name]
  images = jnp.asarray(nets.random_images(3))
  keys = jnp.stack([draw_keys(key, 2) for key in keys_of(3)])
  text = jax.random.normal(stream(4, "test"), (3, 5, 2))
  conditioning = {"label": jnp.array([2, 0, 1]), "text": text}
  without = measurement.pairs(nets.SCHEDULE, images, keys)
  pairs = measurement.pairs(nets.SCHEDULE, images, keys, conditioning)
  assert without.conditioning is None
  jax.tree.map(np.testing.assert_array_equal, pairs._replace(conditioning=None), without)
  np.testing.assert_array_equal(pairs.conditioning["label"], [2, 2, 0, 0, 1, 1])
  np.testing.assert_array_equal(pairs.conditioning["text"], np.repeat(text, 2, axis=0))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_conditional_measurement_equals_a_loop_over_closed_over_labels(name):
  """Every image by itself, under the unconditional network that its label makes."""
  measurement, task = MEASUREMENTS[name], nets.conditional_task()
  images, labels = jnp.asarray(nets.random_images(4)), jnp.array([2, 0, 1, 2])
  keys = jnp.stack([draw_keys(key, 3) for key in keys_of(4)])
  values = measurement.evaluate(task.apply_fn, task.params, task.schedule, images, keys, labels)
  expected = []
  for n in range(4):

    def apply_fn(params, x_t, t, label=labels[n]):
      return task.apply_fn(params, x_t, t, jnp.full(len(x_t), label))

    one = measurement.evaluate(
      apply_fn, task.params, task.schedule, images[n : n + 1], keys[n : n + 1]
    )
    expected.append(one[0])
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order
  others = measurement.evaluate(
    task.apply_fn, task.params, task.schedule, images, keys, (labels + 1) % 3
  )
  assert not np.isclose(values, others, rtol=1e-3).any()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_cotangents_are_the_derivative_of_an_images_mean_over_draws(name, schedule):
  measurement = MEASUREMENTS[name]
  keys = jnp.stack([draw_keys(key, 2) for key in keys_of(3)])
  pairs = measurement.pairs(schedule, jnp.zeros((3, 2, 2, 1)), keys)
  out = jax.random.normal(stream(2, "test"), pairs.x_t.shape)
  change = jax.random.normal(stream(3, "test"), pairs.x_t.shape)
  total = lambda y: float(np.sum(np.float64(measurement.value(y, pairs)).reshape(3, 2).mean(1)))
  difference = (total(out + 0.1 * change) - total(out - 0.1 * change)) / 0.2
  inner = np.sum(np.float64(measurement.cotangents(pairs, draws=2)(out)) * change)
  # Central differences are exact for a square, up to float32 rounding: 6 · 1e-7 over a step of 0.2.
  np.testing.assert_allclose(inner, difference, rtol=1e-4)


def test_the_loss_of_the_true_noise_is_zero(schedule):
  pairs = LOSS.pairs(schedule, jnp.zeros((3, 2, 2, 1)), keys_of(3)[:, None])
  np.testing.assert_array_equal(LOSS.value(pairs.noise, pairs), np.zeros(3))


def test_an_unknown_measurement_names_the_valid_ones():
  assert measurement_named("loss") is measurements.LOSS
  with pytest.raises(ValueError, match="Unknown measurement 'lost'; there are: loss"):
    measurement_named("lost")
