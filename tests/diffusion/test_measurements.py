"""Measurements: textbook twins in float64, closed forms of linear denoisers, a naive loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion import measurements
from jaxinf.diffusion.measurements import (
  LOSS,
  MEASUREMENTS,
  PARAMETERISED,
  Measurement,
  journey_loss,
  loss_at_timestep,
  measurement_named,
  weighted_loss,
)
from jaxinf.diffusion.noise import UNIFORM, DrawDesign
from jaxinf.diffusion.objective import float_images
from jaxinf.diffusion.sampler import sample
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.weightings import WEIGHTINGS
from tests import nets
from tests.diffusion.measured import NAMES, random_examples

T = 10
EVERY_STEP = DrawDesign("stratified", antithetic=False, shared=False)  # once, in T draws
DESIGNS = (UNIFORM, DrawDesign(), EVERY_STEP)
named = pytest.mark.parametrize("name", NAMES)


def keys_of(num: int, size: int) -> jax.Array:
  """[num, size]."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  return jax.vmap(lambda key: draw_keys(key, size))(keys)


def tables(schedule):
  """β, ᾱ, ᾱ before each step, and β̃, in float64."""
  betas = np.float64(schedule.betas)
  alpha_bars = np.cumprod(1 - betas)
  before = np.concatenate([[1.0], alpha_bars[:-1]])
  return betas, alpha_bars, before, betas * (1 - before) / (1 - alpha_bars)


def step_variances(schedule, large: bool) -> np.ndarray:
  betas, _, _, posterior = tables(schedule)
  return betas if large else np.append(posterior[1], posterior[1:])


def posterior_mean(schedule, t, x_t, image):
  """Of q(x_{t-1} | x_t, image), from the product of two Gaussians."""
  betas, alpha_bars, before, _ = tables(schedule)
  from_image = np.sqrt(before[t]) * betas[t] * image
  return (from_image + np.sqrt(1 - betas[t]) * (1 - before[t]) * x_t) / (1 - alpha_bars[t])


def model_mean(schedule, t, x_t, predicted):
  """The same at the image that the predicted noise implies."""
  _, alpha_bars, _, _ = tables(schedule)
  image = (x_t - np.sqrt(1 - alpha_bars[t]) * predicted) / np.sqrt(alpha_bars[t])
  return posterior_mean(schedule, t, x_t, image)


def divergence(mean, variance, other_mean, other_variance):
  """KL of two Gaussians, dimension by dimension."""
  spread = (variance + np.square(mean - other_mean)) / other_variance
  return 0.5 * (np.log(other_variance / variance) + spread - 1)


def network(params, x_t, t):
  """Not linear, and another one at every timestep."""
  return params[0] * jnp.tanh(x_t) + params[1] * jnp.cos(t)[:, None, None, None]


PARAMS = jnp.array([0.7, 0.3])


@pytest.mark.parametrize("name", ["elbo", "elbo_large"])
def test_the_elbo_equals_textbook_divergences(name, schedule):
  """With each timestep drawn once: prior, decoder and the divergences of given means, summed."""
  images, keys = nets.random_images(3, (2, 2, 1)), keys_of(3, T)
  evaluate = functools.partial(measurement_named(name).evaluate, network, PARAMS, schedule)
  values = evaluate(jnp.asarray(images), keys, design=EVERY_STEP)
  pairs = LOSS.pairs(schedule, jnp.asarray(images), keys, design=EVERY_STEP)
  predicted = np.float64(network(PARAMS, pairs.x_t, pairs.t))
  _, alpha_bars, _, posterior = tables(schedule)
  variances = step_variances(schedule, large=name == "elbo_large")
  images = np.float64(images)
  expected = np.mean(
    divergence(np.sqrt(alpha_bars[-1]) * images, 1 - alpha_bars[-1], 0.0, 1.0), axis=(1, 2, 3)
  )
  for row in range(3 * T):
    t, x_t, image = int(pairs.t[row]), np.float64(pairs.x_t[row]), images[row // T]
    mean = model_mean(schedule, t, x_t, predicted[row])
    if t == 0:
      terms = -stats.norm.logpdf(image, mean, np.sqrt(variances[0]))
    else:
      given = posterior_mean(schedule, t, x_t, image)
      terms = divergence(given, posterior[t], mean, variances[t])
    expected[row // T] += np.mean(terms)
  # Float32 noise and states, whose rounding counts 1 / √β_0 = 10 times in a mean.
  np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["elbo", "elbo_large"])
@pytest.mark.parametrize(("centre", "spread"), [(0.0, 1.0), (0.3, 0.5)])
def test_the_elbo_of_a_perfect_gaussian_model_is_the_analytic_bound(name, centre, spread, schedule):
  """Data N(m, s²) and E[ε | x_t]: all means are linear in ε, and so the bound is known.

  For s = 1 the variance β_t is that of the true reverse step and the bound is log N(x; 0, 1).
  """
  _, alpha_bars, _, posterior = tables(schedule)
  variances = step_variances(schedule, large=name == "elbo_large")
  shrink = np.sqrt(1 - alpha_bars) / (alpha_bars * spread**2 + 1 - alpha_bars)
  image = np.array([0.5, -0.8]).reshape(1, 2, 1, 1)

  def predict(t, x_t):
    return shrink[t] * (x_t - np.sqrt(alpha_bars[t]) * centre)

  bound = divergence(np.sqrt(alpha_bars[-1]) * image, 1 - alpha_bars[-1], 0.0, 1.0)
  for t in range(T):
    # The gap between both means is offset + slope · ε.
    def gap(noise, t=t):
      x_t = np.sqrt(alpha_bars[t]) * image + np.sqrt(1 - alpha_bars[t]) * noise
      given = posterior_mean(schedule, t, x_t, image) if t else image
      return given - model_mean(schedule, t, x_t, predict(t, x_t))

    offset, slope = gap(0.0), gap(1.0) - gap(0.0)
    squares = (offset**2 + slope**2) / variances[t]
    if t == 0:
      bound += 0.5 * (np.log(2 * np.pi * variances[t]) + squares)
    else:
      ratio = posterior[t] / variances[t]
      bound += 0.5 * (ratio - 1 - np.log(ratio) + squares)
  bound = bound.mean()
  if spread == 1.0:
    exact = -stats.norm.logpdf(image).mean()
    assert abs(bound - exact) < 1e-9 if name == "elbo_large" else bound > exact

  def apply_fn(params, x_t, t):
    column = lambda table: jnp.asarray(table, jnp.float32)[t][:, None, None, None]
    return column(shrink) * (x_t - column(np.sqrt(alpha_bars)) * centre)

  num = 2_000
  images = jnp.asarray(np.repeat(image, num, axis=0), jnp.float32)
  evaluate = functools.partial(measurement_named(name).evaluate, apply_fn, None, schedule)
  values = np.float64(evaluate(images, keys_of(num, T), design=EVERY_STEP))
  # Groups are independent; four standard errors of their mean.
  assert abs(values.mean() - bound) < 4 * values.std(ddof=1) / np.sqrt(num)


def test_a_trajectorys_probability_is_the_product_of_its_steps(schedule):
  """Any states, step by step, with each timestep drawn once."""
  trajectories = 2 * nets.random_images(3, (T + 1, 2, 2, 1))
  evaluate = functools.partial(
    measurement_named("trajectory").evaluate, network, PARAMS, schedule, jnp.asarray(trajectories)
  )
  values = evaluate(keys_of(3, T), design=EVERY_STEP)
  states = np.float64(trajectories)
  expected = -stats.norm.logpdf(states[:, 0]).mean(axis=(1, 2, 3))
  for t in range(T):
    before, after = states[:, T - 1 - t], states[:, T - t]
    predicted = np.float64(network(PARAMS, jnp.asarray(before, jnp.float32), jnp.full(3, t)))
    mean = model_mean(schedule, t, before, predicted)
    scale = np.sqrt(step_variances(schedule, large=False)[t])
    expected -= stats.norm.logpdf(after, mean, scale).mean(axis=(1, 2, 3))
  # Float32 states, of which differences of a size √β_0 of their own are taken.
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_samplers_own_trajectories_have_the_entropy_of_its_noise(schedule):
  """Unclipped DDPM: every step's error is its noise, and the last one's is zero."""
  num = 2_000
  keys = keys_of(num, 1)[:, 0]
  _, states = sample(
    network, PARAMS, schedule, keys, (2, 1, 1), keep_trajectory=True, clip=False
  )  # fmt: skip
  trajectories = jnp.moveaxis(states, 0, 1)
  evaluate = functools.partial(measurement_named("trajectory").evaluate, network, PARAMS, schedule)
  values = np.float64(evaluate(trajectories, keys_of(num, T), design=EVERY_STEP))
  scales = np.append(1.0, step_variances(schedule, large=False))
  expected = np.sum(0.5 * np.log(2 * np.pi * scales)) + T / 2
  # Means of (T noises of 2 dimensions, each a square with variance 2) / 2.
  assert abs(values.mean() - expected) < 4 * np.sqrt(T / 4 / num)


def linear_errors(schedule, image, slope):
  """[T] E over ε of the mean squared error of ε̂ = a x_t for an image, in float64."""
  _, alpha_bars, _, _ = tables(schedule)
  kept = slope**2 * alpha_bars * np.mean(np.square(image))
  return kept + (1 - slope * np.sqrt(1 - alpha_bars)) ** 2


def expectations(schedule, image, slope) -> dict[str, float]:
  """Name → what the linear denoiser's measurement of an image is."""
  errors = linear_errors(schedule, image, slope)
  betas, alpha_bars, _, _ = tables(schedule)
  ratios = alpha_bars / (1 - alpha_bars)
  variances = step_variances(schedule, large=False)
  weights = betas**2 / (2 * variances * (1 - betas) * (1 - alpha_bars))
  norms = slope**2 * (alpha_bars * np.mean(np.square(image)) + 1 - alpha_bars)
  return {
    "loss": errors.mean(),
    "simple_elbo": np.sum((weights * errors)[1:]),
    "square_norm": norms.mean(),
    "loss_at_timestep(3)": errors[3],
    "weighted_loss(elbo)": np.sum(weights * errors),
    "weighted_loss(snr)": np.mean(ratios * errors),
    "weighted_loss(inverse_snr)": np.mean(errors / ratios),
    "weighted_loss(truncated_snr)": np.mean(np.maximum(ratios, 1) / ratios * errors),
    "weighted_loss(min_snr)": np.mean(np.minimum(ratios, 5) / ratios * errors),
  }


@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("size", [4, 5])
def test_every_design_is_unbiased_for_a_linear_denoiser(design, size, schedule):
  num, slope = 4_000, 0.7
  image = np.array([0.5, -0.8]).reshape(1, 2, 1, 1)
  images = jnp.asarray(np.repeat(image, num, axis=0), jnp.float32)
  apply_fn = lambda params, x_t, t: params * x_t
  plain = expectations(schedule, image, slope)

  @jax.jit
  def evaluate(images):
    several = jnp.stack([images, images[:, ::-1] * 0.5, images * 0.2], axis=1)
    run = lambda measurement, images: measurement.evaluate(
      apply_fn, slope, schedule, images, keys_of(num, size), design=design
    )
    found = {name: run(measurement_named(name), images) for name in plain}
    return found | {"journey_loss(7,2,2)": run(journey_loss([7, 2, 2]), several)}

  parts = [linear_errors(schedule, image * s, slope)[t] for t, s in ((7, 1), (2, 0.5), (2, 0.2))]
  expected = plain | {"journey_loss(7,2,2)": np.mean(parts)}
  for name, values in evaluate(images).items():
    values = np.float64(values)
    # Groups are independent; four standard errors of their mean.
    error = 4 * values.std(ddof=1) / np.sqrt(num)
    assert abs(values.mean() - expected[name]) < error, name


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_one_timestep_has_the_noise_of_the_loss(design, schedule):
  """ε by the design, antithetic where it is so, and nothing but t another."""
  images, keys = jnp.asarray(nets.random_images(3)), keys_of(3, 5)
  pairs = loss_at_timestep(4).pairs(schedule, images, keys, design=design)
  np.testing.assert_array_equal(pairs.t, np.full(15, 4))
  usual = LOSS.pairs(schedule, images, keys, design=design)
  np.testing.assert_array_equal(pairs.noise, usual.noise)
  at = lambda pairs: schedule.noise[pairs.t][:, None, None, None] * pairs.noise
  expected = schedule.signal[4] * jnp.repeat(images, 5, axis=0) + at(pairs)
  np.testing.assert_allclose(pairs.x_t, expected, atol=1e-6)  # rounding of float32


def test_the_weighted_elbo_is_the_elbo_but_for_its_constant(schedule):
  images, keys = jnp.asarray(nets.random_images(3)), keys_of(3, 4)
  run = lambda measurement: measurement.evaluate(network, PARAMS, schedule, images, keys)
  elbo = MEASUREMENTS["elbo"]
  # Float32 sums in another order.
  np.testing.assert_allclose(
    run(weighted_loss("elbo")), run(elbo) - elbo.constant(schedule, images), rtol=1e-5
  )
  np.testing.assert_allclose(
    run(weighted_loss(np.full(T, 2.0))), 2 * run(weighted_loss("uniform")), rtol=1e-6
  )
  np.testing.assert_array_equal(run(weighted_loss("uniform")), run(LOSS))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_weightings_are_finite_and_not_negative(name, num_steps):
  weights = WEIGHTINGS[name](Schedule.linear(num_steps, 1e-4, 0.02))
  assert weights.shape == (num_steps,) and weights.dtype == np.float64
  assert np.isfinite(weights).all() and (weights >= 0).all()


BYTES = [(name, np.uint8) for name in NAMES if measurement_named(name).of == "images"]


@pytest.mark.parametrize(("name", "dtype"), [*BYTES, *((name, np.float32) for name in NAMES)])
def test_a_measurement_equals_a_naive_loop_over_examples_and_draws(name, dtype, mlp, schedule):
  measurement = measurement_named(name)
  examples = random_examples(measurement, 3, T)
  if dtype == np.uint8:
    examples = np.uint8(np.round((examples + 1) * 127.5))
  params = mlp.init(stream(0, "init"), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32))["params"]
  apply_fn = lambda params, x_t, t: mlp.apply({"params": params}, x_t, t)
  keys = keys_of(3, 2)
  values = measurement.evaluate(apply_fn, params, schedule, jnp.asarray(examples), keys)

  expected = np.zeros(3)
  for n in range(3):
    example = float_images(jnp.asarray(examples[n : n + 1]))
    if measurement.constant is not None:
      expected[n] += measurement.constant(schedule, example)[0]
    for s in range(2):
      pair = measurement.draw(schedule, example, keys[n, s][None, None], UNIFORM)
      output = apply_fn(params, pair.x_t, pair.t)
      expected[n] += measurement.value(schedule, output, pair)[0] / 2
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order


@named
def test_conditioning_changes_no_draw_and_stays_with_its_example(name, schedule):
  measurement = measurement_named(name)
  examples, keys = jnp.asarray(random_examples(measurement, 3, T)), keys_of(3, 2)
  text = jax.random.normal(stream(4, "test"), (3, 5, 2))
  conditioning = {"label": jnp.array([2, 0, 1]), "text": text}
  without = measurement.pairs(schedule, examples, keys)
  pairs = measurement.pairs(schedule, examples, keys, conditioning)
  assert without.conditioning is None
  jax.tree.map(np.testing.assert_array_equal, pairs._replace(conditioning=None), without)
  np.testing.assert_array_equal(pairs.conditioning["label"], [2, 2, 0, 0, 1, 1])
  np.testing.assert_array_equal(pairs.conditioning["text"], np.repeat(text, 2, axis=0))


@named
def test_a_conditional_measurement_equals_a_loop_over_closed_over_labels(name):
  """Every example by itself, under the unconditional network that its label makes."""
  measurement, task = measurement_named(name), nets.conditional_task()
  examples = jnp.asarray(random_examples(measurement, 4, task.schedule.num_steps))
  labels, keys = jnp.array([2, 0, 1, 2]), keys_of(4, 3)
  values = measurement.evaluate(task.apply_fn, task.params, task.schedule, examples, keys, labels)
  expected = []
  for n in range(4):

    def apply_fn(params, x_t, t, label=labels[n]):
      return task.apply_fn(params, x_t, t, jnp.full(len(x_t), label))

    one = measurement.evaluate(
      apply_fn, task.params, task.schedule, examples[n : n + 1], keys[n : n + 1]
    )
    expected.append(one[0])
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order
  others = measurement.evaluate(
    task.apply_fn, task.params, task.schedule, examples, keys, (labels + 1) % 3
  )
  assert not np.isclose(values, others, rtol=1e-5).any()


@named
def test_cotangents_are_the_derivative_of_an_examples_mean_over_draws(name, schedule):
  measurement = measurement_named(name)
  examples = jnp.asarray(random_examples(measurement, 3, T, (2, 2, 1)))
  pairs = measurement.pairs(schedule, examples, keys_of(3, 2))
  out = jax.random.normal(stream(2, "test"), pairs.x_t.shape)
  change = jax.random.normal(stream(3, "test"), pairs.x_t.shape)

  def total(y):
    return float(np.sum(np.float64(measurement.value(schedule, y, pairs)).reshape(3, 2).mean(1)))

  difference = (total(out + 0.1 * change) - total(out - 0.1 * change)) / 0.2
  inner = np.sum(np.float64(measurement.cotangents(schedule, pairs, draws=2)(out)) * change)
  # Central differences are exact for a square, up to float32 rounding of values, 1e-7 of them, over
  # a step of 0.2.
  scale = abs(total(out)) + abs(difference)
  np.testing.assert_allclose(inner, difference, rtol=0, atol=1e-5 * scale)


def test_the_loss_of_the_true_noise_is_zero(schedule):
  pairs = LOSS.pairs(schedule, jnp.zeros((3, 2, 2, 1)), keys_of(3, 1))
  np.testing.assert_array_equal(LOSS.value(schedule, pairs.noise, pairs), np.zeros(3))


def test_every_measurement_has_one_name():
  assert {m.name for m in MEASUREMENTS.values()} == set(MEASUREMENTS)
  for name in NAMES:
    measurement = measurement_named(name)
    assert measurement.name == name
    assert measurement_named(name) is measurement  # so that its kernel compiles once
    assert measurement_named(measurement) is measurement
  assert {name.split("(")[0] for name in NAMES} == {*MEASUREMENTS, *PARAMETERISED}
  assert measurement_named("loss") is measurements.LOSS
  first, second = weighted_loss(np.ones(3)), weighted_loss(np.array([1.0, 1.0, 2.0]))
  assert first.name != second.name


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("lost", r"Unknown measurement 'lost'; there are: loss, .*, loss_at_timestep\(…\)"),
    ("loss(3)", "Unknown measurement"),
    ("loss_at_timestep", "Unknown measurement"),
    ("loss_at_timestep(one)", "A timestep is an integer, counted from 0; got 'one'"),
    ("loss_at_timestep(1,2)", "of one timestep"),
    ("weighted_loss(heavy)", "Unknown weighting 'heavy'; there are: uniform, elbo"),
    ("journey_loss()", "A timestep is an integer"),
  ],
)
def test_names_that_say_nothing_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    measurement_named(name)


@pytest.mark.parametrize(
  ("measurement", "shape", "message"),
  [
    (loss_at_timestep(T), (1, 2, 2, 1), r"must lie in \[0, 10\), counted from 0; got \[10\]"),
    (loss_at_timestep(-1), (1, 2, 2, 1), r"must lie in \[0, 10\)"),
    (weighted_loss(np.ones(9)), (1, 2, 2, 1), "There are 10 timesteps, but 9 weights"),
    (journey_loss([]), (1, 0, 2, 2, 1), "must lie in"),
    (journey_loss([3, 1]), (1, 3, 2, 2, 1), r"of images \[B, 2, H, W, C\]"),
    (MEASUREMENTS["trajectory"], (1, T, 2, 2, 1), "must have the 11 states"),
    (MEASUREMENTS["trajectory"], (1, 2, 2, 1), "must have the 11 states"),
  ],
)
def test_what_does_not_fit_the_schedule_is_refused(measurement, shape, message, schedule):
  with pytest.raises(ValueError, match=message):
    measurement.evaluate(network, PARAMS, schedule, jnp.zeros(shape), keys_of(1, 2))


@pytest.mark.parametrize("weights", [np.ones((2, 2)), np.array([1.0, -1.0]), np.array([np.nan])])
def test_weights_that_are_no_weights_are_refused(weights):
  with pytest.raises(ValueError, match="finite numbers that are not negative"):
    weighted_loss(weights)


def test_a_measurement_is_of_images_trajectories_or_predictions():
  with pytest.raises(ValueError, match="images, trajectories, predictions; got 'videos'"):
    Measurement(LOSS.draw, LOSS.value, of="videos")


def test_a_traced_schedule_is_refused_with_what_to_do(schedule):
  images = jnp.zeros((1, 2, 2, 1))
  run = lambda s: MEASUREMENTS["elbo"].evaluate(network, PARAMS, s, images, keys_of(1, 2))
  with pytest.raises(ValueError, match="Close over the schedule"):
    jax.jit(run)(schedule)
