"""Measurements: textbook twins in float64, closed forms of linear denoisers, a naive loop."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinf.core.arrays import as_float
from jaxinf.core.augmentation import PLAIN
from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion import measurements
from jaxinf.diffusion.measurements import (
  LOSS,
  MEASUREMENTS,
  PARAMETERISED,
  Measurement,
  journey_loss,
  loss_at_time,
  loss_at_timestep,
  loss_in_band,
  masked_loss,
  measurement_named,
  weighted_loss,
)
from jaxinf.diffusion.noise import predict
from jaxinf.diffusion.sampler import sample, sampler_times
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.weightings import WEIGHTINGS
from tests import nets
from tests.diffusion.measured import (
  NAMES,
  OF_ALL,
  OF_CONTINUOUS,
  OF_DISCRETE,
  OF_RETRAINED,
  random_examples,
)
from tests.processes import CONTINUOUS, DISCRETE, PROCESSES, best_network

EPSILON = DISCRETE["epsilon"]
T = EPSILON.num_steps
EVERY_STEP = Draws(T, timesteps="stratified", antithetic=False, shared=False)  # once, in T draws
DESIGNS = {"independent": INDEPENDENT, "default": Draws(1), "every-step": EVERY_STEP}
designs = pytest.mark.parametrize("draws", DESIGNS.values(), ids=DESIGNS)
named = pytest.mark.parametrize("name", NAMES)


def keys_of(num: int, size: int) -> jax.Array:
  """[num, size]."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  return jax.vmap(lambda key: draw_keys(key, size))(keys)


def tables(schedule):
  """β, ᾱ, ᾱ before each step, and β̃, in float64."""
  betas = schedule.exact_betas
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


def model_mean(process, t, x_t, output):
  """The same at the image that the network's output implies."""
  alpha_bar = tables(process.schedule)[1][t]
  signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
  image = {
    "epsilon": lambda: (x_t - noise * output) / signal,
    "sample": lambda: output,
    "v": lambda: signal * x_t - noise * output,
  }[process.name]()
  return posterior_mean(process.schedule, t, x_t, image)


def divergence(mean, variance, other_mean, other_variance):
  """KL of two Gaussians, dimension by dimension."""
  spread = (variance + np.square(mean - other_mean)) / other_variance
  return 0.5 * (np.log(other_variance / variance) + spread - 1)


def network(params, x_t, t):
  """Not linear, and another one at every timestep."""
  return params[0] * jnp.tanh(x_t) + params[1] * jnp.cos(t)[:, None, None, None]


PARAMS = jnp.array([0.7, 0.3])
discrete = pytest.mark.parametrize("process", DISCRETE.values(), ids=DISCRETE)


@discrete
@pytest.mark.parametrize("name", ["elbo", "elbo_large"])
def test_the_elbo_equals_textbook_divergences(name, process):
  """With each timestep drawn once: prior, decoder and the divergences of given means, summed."""
  images, keys = nets.random_images(3, (2, 2, 1)), keys_of(3, T)
  evaluate = functools.partial(measurement_named(name).evaluate, network, PARAMS, process)
  values = evaluate(jnp.asarray(images), keys, draws=EVERY_STEP)
  pairs = LOSS.pairs(process, jnp.asarray(images), keys, draws=EVERY_STEP)
  output = np.float64(network(PARAMS, pairs.inputs, pairs.time))
  schedule = process.schedule
  _, alpha_bars, _, posterior = tables(schedule)
  variances = step_variances(schedule, large=name == "elbo_large")
  images = np.float64(images)
  expected = np.mean(
    divergence(np.sqrt(alpha_bars[-1]) * images, 1 - alpha_bars[-1], 0.0, 1.0), axis=(1, 2, 3)
  )
  for row in range(3 * T):
    t, x_t, image = int(pairs.t[row]), np.float64(pairs.inputs[row]), images[row // T]
    mean = model_mean(process, t, x_t, output[row])
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

  def best(t, x_t):
    return shrink[t] * (x_t - np.sqrt(alpha_bars[t]) * centre)

  bound = divergence(np.sqrt(alpha_bars[-1]) * image, 1 - alpha_bars[-1], 0.0, 1.0)
  for t in range(T):
    # The gap between both means is offset + slope · ε.
    def gap(noise, t=t):
      x_t = np.sqrt(alpha_bars[t]) * image + np.sqrt(1 - alpha_bars[t]) * noise
      given = posterior_mean(schedule, t, x_t, image) if t else image
      return given - model_mean(EPSILON, t, x_t, best(t, x_t))

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

  apply_fn = best_network(EPSILON, centre, spread**2)
  num = 2_000
  images = jnp.asarray(np.repeat(image, num, axis=0), jnp.float32)
  evaluate = functools.partial(measurement_named(name).evaluate, apply_fn, None, EPSILON)
  values = np.float64(evaluate(images, keys_of(num, T), draws=EVERY_STEP))
  # Groups are independent; four standard errors of their mean.
  assert abs(values.mean() - bound) < 4 * values.std(ddof=1) / np.sqrt(num)


@pytest.mark.parametrize("name", ["epsilon", "v_zero_snr", "sample"])
def test_a_trajectorys_probability_is_the_product_of_its_steps(name):
  """Any states, step by step, with each timestep drawn once."""
  process = DISCRETE[name]
  trajectories = 2 * nets.random_images(3, (T + 1, 2, 2, 1))
  evaluate = functools.partial(
    measurement_named("trajectory").evaluate, network, PARAMS, process, jnp.asarray(trajectories)
  )
  values = evaluate(keys_of(3, T), draws=EVERY_STEP)
  states = np.float64(trajectories)
  expected = -stats.norm.logpdf(states[:, 0]).mean(axis=(1, 2, 3))
  for t in range(T):
    before, after = states[:, T - 1 - t], states[:, T - t]
    output = np.float64(network(PARAMS, jnp.asarray(before, jnp.float32), jnp.full(3, t)))
    mean = model_mean(process, t, before, output)
    scale = np.sqrt(step_variances(process.schedule, large=False)[t])
    expected -= stats.norm.logpdf(after, mean, scale).mean(axis=(1, 2, 3))
  # Float32 states, of which differences of a size √β_0 of their own are taken.
  np.testing.assert_allclose(values, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["epsilon", "v_zero_snr"])
def test_a_samplers_own_trajectories_have_the_entropy_of_its_noise(name):
  """Unclipped DDPM: every step's error is its noise, and the last one's is zero."""
  process, num = DISCRETE[name], 2_000
  keys = keys_of(num, 1)[:, 0]
  options = dict(keep_trajectory=True, clip=False)
  _, states = sample(network, PARAMS, process, keys, (2, 1, 1), **options)
  trajectories = jnp.moveaxis(states, 0, 1)
  evaluate = functools.partial(measurement_named("trajectory").evaluate, network, PARAMS, process)
  values = np.float64(evaluate(trajectories, keys_of(num, T), draws=EVERY_STEP))
  scales = np.append(1.0, step_variances(process.schedule, large=False))
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


@designs
@pytest.mark.parametrize("size", [4, 5])
def test_every_design_is_unbiased_for_a_linear_denoiser(draws, size, schedule):
  num, slope = 4_000, 0.7
  image = np.array([0.5, -0.8]).reshape(1, 2, 1, 1)
  images = jnp.asarray(np.repeat(image, num, axis=0), jnp.float32)
  apply_fn = lambda params, x_t, t: params * x_t
  plain = expectations(schedule, image, slope)

  @jax.jit
  def evaluate(images):
    several = jnp.stack([images, images[:, ::-1] * 0.5, images * 0.2], axis=1)
    run = lambda measurement, images: measurement.evaluate(
      apply_fn, slope, EPSILON, images, keys_of(num, size), draws=draws
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


@designs
def test_one_timestep_has_the_noise_of_the_loss(draws):
  """ε by the design, antithetic where it is so, and nothing but t another."""
  images, keys = jnp.asarray(nets.random_images(3)), keys_of(3, 5)
  pairs = loss_at_timestep(4).pairs(EPSILON, images, keys, draws=draws)
  np.testing.assert_array_equal(pairs.t, np.full(15, 4))
  usual = LOSS.pairs(EPSILON, images, keys, draws=draws)
  np.testing.assert_array_equal(pairs.target, usual.target)
  expected = EPSILON.noised(jnp.repeat(images, 5, axis=0), jnp.full(15, 4), usual.target)
  np.testing.assert_allclose(pairs.inputs, expected, atol=1e-6)  # rounding of float32


def test_the_weighted_elbo_is_the_elbo_but_for_its_constant():
  images, keys = jnp.asarray(nets.random_images(3)), keys_of(3, 4)
  run = lambda measurement: measurement.evaluate(network, PARAMS, EPSILON, images, keys)
  elbo = MEASUREMENTS["elbo"]
  # Float32 sums in another order.
  np.testing.assert_allclose(
    run(weighted_loss("elbo")), run(elbo) - elbo.constant(EPSILON, images), rtol=1e-5
  )
  np.testing.assert_allclose(
    run(weighted_loss(np.full(T, 2.0))), 2 * run(weighted_loss("uniform")), rtol=1e-6
  )
  np.testing.assert_array_equal(run(weighted_loss("uniform")), run(LOSS))


@pytest.mark.parametrize("name", ["v", "sample_table", "epsilon_p2"])
def test_likelihoods_are_of_the_noise_whatever_is_predicted_and_how_it_is_weighted(name):
  """One network, as a prediction of ε and rewritten as one of v or x_0."""
  process = DISCRETE[name]

  def rewritten(params, x_t, t):
    noise = network(params, x_t, t)
    a, b = (level[:, None, None, None] for level in process.levels(t))
    return process.target((x_t - b * noise) / a, noise, t)

  images, keys = jnp.asarray(nets.random_images(3)), keys_of(3, 4)
  for measurement in ("elbo", "elbo_large", "simple_elbo", "weighted_loss(snr)"):
    evaluate = measurement_named(measurement).evaluate
    expected = evaluate(network, PARAMS, EPSILON, images, keys)
    found = evaluate(rewritten, PARAMS, process, images, keys)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32, through quotients by a and b


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_weightings_are_finite_and_not_negative(name, num_steps):
  weights = WEIGHTINGS[name](Schedule.linear(num_steps, 1e-4, 0.02))
  assert weights.shape == (num_steps,) and weights.dtype == np.float64
  assert np.isfinite(weights).all() and (weights >= 0).all()


IMAGES = [name for name in NAMES if measurement_named(name).of == "examples"]
CASES = [
  *(("epsilon", name, np.uint8) for name in IMAGES),
  *(("v_zero_snr", name, np.float32) for name in NAMES),
  *(("edm", name, np.float32) for name in (*OF_ALL, *OF_CONTINUOUS)),
]


@pytest.mark.parametrize(("kind", "name", "dtype"), CASES)
def test_a_measurement_equals_a_naive_loop_over_examples_and_draws(kind, name, dtype, mlp):
  measurement, process = measurement_named(name), PROCESSES[kind]
  examples = random_examples(measurement, 3, T)
  if dtype == np.uint8:
    examples = np.uint8(np.round((examples + 1) * 127.5))
  params = mlp.init(stream(0, "init"), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32))["params"]
  apply_fn = lambda params, x_t, t: mlp.apply({"params": params}, x_t, t)
  keys = keys_of(3, 2)
  values = measurement.evaluate(apply_fn, params, process, jnp.asarray(examples), keys)

  expected = np.zeros(3)
  for n in range(3):
    example = as_float(jnp.asarray(examples[n : n + 1]))
    if measurement.constant is not None:
      expected[n] += measurement.constant(process, example)[0]
    for s in range(2):
      pair = measurement.draw(process, example, keys[n, s][None, None], INDEPENDENT, PLAIN)
      output = predict(apply_fn, params, pair)
      expected[n] += measurement.value(process, output, pair)[0] / 2
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order


@named
def test_conditioning_changes_no_draw_and_stays_with_its_example(name):
  measurement = measurement_named(name)
  examples, keys = jnp.asarray(random_examples(measurement, 3, T)), keys_of(3, 2)
  text = jax.random.normal(stream(4, "test"), (3, 5, 2))
  conditioning = {"label": jnp.array([2, 0, 1]), "text": text}
  without = measurement.pairs(EPSILON, examples, keys)
  pairs = measurement.pairs(EPSILON, examples, keys, conditioning)
  assert without.conditioning is None
  jax.tree.map(np.testing.assert_array_equal, pairs._replace(conditioning=None), without)
  np.testing.assert_array_equal(pairs.conditioning["label"], [2, 2, 0, 0, 1, 1])
  np.testing.assert_array_equal(pairs.conditioning["text"], np.repeat(text, 2, axis=0))


@named
def test_a_conditional_measurement_equals_a_loop_over_closed_over_labels(name):
  """Every example by itself, under the unconditional network that its label makes."""
  measurement, conditional = measurement_named(name), nets.conditional_net
  params = nets.random_params(nets.CONDITIONAL_SHAPES)
  examples = jnp.asarray(random_examples(measurement, 4, T))
  labels, keys = jnp.array([2, 0, 1, 2]), keys_of(4, 3)
  values = measurement.evaluate(conditional, params, EPSILON, examples, keys, labels)
  expected = []
  for n in range(4):

    def apply_fn(params, x_t, t, label=labels[n]):
      return conditional(params, x_t, t, jnp.full(len(x_t), label))

    one = slice(n, n + 1)
    expected.append(measurement.evaluate(apply_fn, params, EPSILON, examples[one], keys[one])[0])
  np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32 sums in another order
  others = measurement.evaluate(conditional, params, EPSILON, examples, keys, (labels + 1) % 3)
  assert not np.isclose(values, others, rtol=1e-5).any()


@pytest.mark.parametrize(
  ("kind", "name"),
  [*(("v", name) for name in NAMES), *(("edm_raw", name) for name in (*OF_ALL, *OF_CONTINUOUS))],
)
def test_cotangents_are_the_derivative_of_an_examples_mean_over_draws(kind, name):
  measurement, process = measurement_named(name), PROCESSES[kind]
  examples = jnp.asarray(random_examples(measurement, 3, T, (2, 2, 1)))
  pairs = measurement.pairs(process, examples, keys_of(3, 2))
  out = jax.random.normal(stream(2, "test"), pairs.inputs.shape)
  change = jax.random.normal(stream(3, "test"), pairs.inputs.shape)

  def total(y):
    return float(np.sum(np.float64(measurement.value(process, y, pairs)).reshape(3, 2).mean(1)))

  difference = (total(out + 0.1 * change) - total(out - 0.1 * change)) / 0.2
  inner = np.sum(np.float64(measurement.cotangents(process, pairs, size=2)(out)) * change)
  # Central differences are exact for a square, up to float32 rounding of values, 1e-7 of them, over
  # a step of 0.2.
  scale = abs(total(out)) + abs(difference)
  np.testing.assert_allclose(inner, difference, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_loss_is_the_models_own_and_zero_at_the_target(process):
  """Its weights count, and an output that errs by 1 everywhere costs w_t."""
  pairs = LOSS.pairs(process, jnp.zeros((3, 5)), keys_of(3, 1))
  np.testing.assert_array_equal(LOSS.value(process, pairs.target, pairs), np.zeros(3))
  # A difference of float32 numbers of the size of the target.
  np.testing.assert_allclose(
    LOSS.value(process, pairs.target + 1, pairs), process.weights(pairs.t), rtol=1e-5
  )


@pytest.mark.parametrize("process", CONTINUOUS.values(), ids=CONTINUOUS)
def test_the_loss_at_one_time_is_that_of_its_draws_there(process):
  data, keys = jnp.asarray(nets.random_images(3, (4,))), keys_of(3, 2)
  pairs = loss_at_time(0.4).pairs(process, data, keys)
  np.testing.assert_array_equal(pairs.t, np.full(6, np.float32(0.4)))
  usual = LOSS.pairs(process, data, keys)
  x_t = usual.inputs / process.inputs(jnp.ones((6, 4)), usual.t)[0]
  noise = process.noise(x_t, usual.t, usual.target)
  target = process.target(jnp.repeat(data, 2, axis=0), noise, pairs.t)
  # Float32, through a quotient by the noise level, which is 0.02 at least.
  np.testing.assert_allclose(pairs.target, target, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(pairs.weights, process.weights(pairs.t))


def test_bands_that_cover_all_times_add_up_to_the_loss():
  """Each timestep comes once in its band and once in all of them, whatever is measured there."""
  images = jnp.asarray(nets.random_images(3, (2, 2, 1)))
  own = loss_in_band(3, 7).pairs(EPSILON, images, keys_of(3, 4), draws=EVERY_STEP)
  np.testing.assert_array_equal(own.t, np.tile(np.arange(3, 7), 3))
  usual = LOSS.pairs(EPSILON, images, keys_of(3, 4), draws=EVERY_STEP)
  np.testing.assert_array_equal(own.target, usual.target)  # ε by the design, as ever
  of_time = lambda measurement, num: dataclasses.replace(
    measurement, value=lambda process, outputs, pairs: jnp.cos(1.0 * pairs.t)
  ).evaluate(network, PARAMS, EPSILON, images, keys_of(3, num), draws=EVERY_STEP)
  bands = [of_time(loss_in_band(low, high), high - low) for low, high in ((0, 3), (3, 7), (7, T))]
  total = sum(share * values for share, values in zip((0.3, 0.4, 0.3), bands, strict=True))
  np.testing.assert_allclose(total, of_time(LOSS, T), rtol=1e-6)


@pytest.mark.parametrize("name", ["flow", "flow_logit_normal", "edm"])
def test_times_of_a_band_have_the_law_of_times_given_the_band(name):
  """Those of the law that fall into it, by their distribution; and all bands have all times."""
  process, size = CONTINUOUS[name], 4_096
  draws = Draws(size, 1, antithetic=False)
  keys, data = keys_of(1, size), jnp.zeros((1, 2))
  usual = np.sort(LOSS.pairs(process, data, keys, draws=draws).t)
  low, high = float(np.round(usual[size // 5], 3)), float(np.round(usual[size // 2], 3))
  found = np.sort(loss_in_band(low, high).pairs(process, data, keys, draws=draws).t)
  assert low <= found[0] and found[-1] <= high
  inside = usual[(usual >= low) & (usual < high)]
  assert process.probability_below(high) - process.probability_below(low) == pytest.approx(
    len(inside) / size, abs=2 / size
  )
  # Both are stratified: the distributions differ by a part or two of the fewer.
  assert stats.ks_2samp(found, inside).statistic < 3 / len(inside)


def test_regions_weighted_by_their_shares_add_up_to_the_loss():
  process = EPSILON
  pairs = LOSS.pairs(process, jnp.asarray(nets.random_images(3, (4, 3, 2))), keys_of(3, 2))
  outputs = network(PARAMS, pairs.inputs, pairs.time)
  value = lambda mask: np.float64(masked_loss(mask).value(process, outputs, pairs))
  left = np.zeros((4, 3), bool)
  left[:, :1] = True
  total = value(left) / 3 + value(~left) * 2 / 3
  # Float32 sums in another order.
  np.testing.assert_allclose(total, LOSS.value(process, outputs, pairs), rtol=1e-5)
  whole = np.ones((4, 3, 2))
  np.testing.assert_allclose(value(whole * 7), LOSS.value(process, outputs, pairs), rtol=1e-6)
  one = np.zeros((4, 3, 2))
  one[1, 2, 0] = 0.5
  error = np.square(np.float64(outputs - pairs.target))[:, 1, 2, 0]
  np.testing.assert_allclose(value(one), np.float64(pairs.weights) * error, rtol=1e-5)
  with pytest.raises(ValueError, match=r"mask of shape \(4, 2\) does not fit.*\(4, 3, 2\)"):
    value(np.ones((4, 2)))


def test_a_mask_from_a_file_is_the_mask_that_the_file_holds_now(tmp_path):
  path = tmp_path / "left.npy"
  np.save(path, np.eye(4, dtype=bool))
  asked = measurement_named(f"masked_loss({path})")
  assert asked is masked_loss(np.eye(4)) and asked is not masked_loss(np.ones((4, 4)))
  np.save(path, np.ones((4, 4)))
  assert measurement_named(f"masked_loss({path})") is masked_loss(np.ones((4, 4)))
  (tmp_path / "broken.npy").write_text("no array")
  for name in ("none.npy", "broken.npy"):
    with pytest.raises(ValueError, match=f"{name}: expected an .npy file"):
      measurement_named(f"masked_loss({tmp_path / name})")


@pytest.mark.parametrize("mask", [np.zeros(3), np.array(1.0), -np.ones(3), np.array([np.nan])])
def test_masks_that_are_no_masks_are_refused(mask):
  with pytest.raises(ValueError, match="mask"):
    masked_loss(mask)


@pytest.mark.parametrize("name", ["epsilon", "v", "flow_logit_normal", "edm"])
def test_the_trajectory_distance_is_the_mean_square_between_predictions_of_noise(name):
  """Every step once, and outputs that differ by a known number: c of ε̂ in closed form."""
  process, num_steps = PROCESSES[name], 5
  states = jnp.asarray(nets.random_images(2, (num_steps + 1, 3)))
  measurement = MEASUREMENTS["trajectory_distance"]
  draws = Draws(num_steps, 1, antithetic=True)
  apply_fn = lambda params, x_t, t: params + 0.3 * x_t

  def evaluate(params):
    return measurement.evaluate(
      apply_fn, params, process, states, keys_of(2, num_steps), draws=draws, reference=0.5
    )

  np.testing.assert_array_equal(evaluate(0.5), 0)
  np.testing.assert_allclose(jax.grad(lambda p: evaluate(p).sum())(0.5), 0)
  times = jnp.asarray(sampler_times(process, num_steps)[:-1])
  times = times if process.is_discrete else times.astype(jnp.float32)
  x_t = states[:, :-1].swapaxes(0, 1).reshape(-1, 3)
  t = jnp.repeat(times, 2)
  inputs, _ = process.inputs(x_t, t)
  first, second = (process.noise(x_t, t, p + 0.3 * inputs) for p in (0.5, 0.7))
  expected = np.square(np.float64(first - second)).mean(axis=1).reshape(num_steps, 2).mean(axis=0)
  np.testing.assert_allclose(evaluate(0.7), expected, rtol=1e-4)  # differences of float32 numbers
  with pytest.raises(ValueError, match="give its parameters as reference"):
    measurement.evaluate(apply_fn, 0.5, process, states, keys_of(2, 5), draws=draws)
  with pytest.raises(ValueError, match="the states of K sampling steps"):
    measurement.pairs(process, states[:, 0], keys_of(2, 5))


def test_a_measurement_that_compares_has_no_gradient_and_says_what_to_take():
  measurement = MEASUREMENTS["trajectory_distance"]
  measurement.check(EPSILON)
  with pytest.raises(ValueError, match="no influence function.*square_norm or loss.*das"):
    measurement.check_gradient(EPSILON)
  pairs = measurement.pairs(EPSILON, jnp.zeros((1, 4, 3)), keys_of(1, 2))
  with pytest.raises(ValueError, match="no influence function"):
    measurement.cotangents(EPSILON, pairs, 2)


def test_every_measurement_has_one_name():
  assert {m.name for m in MEASUREMENTS.values()} == set(MEASUREMENTS)
  for name in (*NAMES, *OF_CONTINUOUS, *OF_RETRAINED):
    measurement = measurement_named(name)
    assert measurement.name == name
    assert measurement_named(name) is measurement  # so that its kernel compiles once
    assert measurement_named(measurement) is measurement
  every = {name.split("(")[0] for name in (*NAMES, *OF_CONTINUOUS, *OF_RETRAINED)}
  # A mask is known by what it holds, not by the name of its file.
  assert every == {*MEASUREMENTS, *PARAMETERISED} - {"masked_loss"}
  assert measurement_named("loss_in_band(2.0, 7)") is measurement_named("loss_in_band(2,7)")
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
    ("loss_at_time(noon)", "of one time, a number; got 'noon'"),
    ("loss_in_band(3)", "of two numbers, low,high; got '3'"),
    ("loss_in_band(noon,9)", "of two numbers, low,high; got 'noon,9'"),
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
    (journey_loss([3, 1]), (1, 3, 2, 2, 1), r"of data \[B, 2, …\]"),
    (MEASUREMENTS["trajectory"], (1, T, 2, 2, 1), "must have the 11 states"),
    (MEASUREMENTS["trajectory"], (1, 2, 2, 1), "must have the 11 states"),
  ],
)
def test_what_does_not_fit_the_schedule_is_refused(measurement, shape, message):
  with pytest.raises(ValueError, match=message):
    measurement.evaluate(network, PARAMS, EPSILON, jnp.zeros(shape), keys_of(1, 2))


@pytest.mark.parametrize(
  ("name", "process", "message"),
  [
    *(
      (
        name,
        kind,
        rf"{re.escape(name)} needs discrete.*{kind}.*is continuous. Take loss or loss_at",
      )
      for name in OF_DISCRETE
      if not name.startswith("loss_in_band")
      for kind in ("flow", "edm")
    ),
    ("loss_at_time(0.4)", "v", r"loss_at_time\(0.4\) is of continuous.*v.*Take loss_at_timestep"),
    ("loss_in_band(2,11)", "v", r"a band of Process.v.* is 0 ≤ low < high ≤ 10"),
    ("loss_in_band(3,3)", "v", "0 ≤ low < high"),
    ("loss_in_band(0.5,3)", "epsilon", "are whole numbers"),
    ("loss_in_band(0,1.5)", "flow", "0 ≤ low < high ≤ 1"),
    (
      "loss_in_band(0.5,0.5001)",
      "flow",
      r"1.0e-04 of the times.*Widen the band, or take loss_at_t",
    ),
    ("loss_at_time(1.1)", "flow", r"times of Process.flow.* must lie in \[0, 1\]"),
    ("loss_at_time(0)", "edm", "times of Process.edm.* must lie in the noise levels σ > 0"),
    (
      "weighted_loss(inverse_snr)",
      "v_zero_snr",
      r"no finite weight at timestep 9 of Process.v.* Take loss, elbo",
    ),
  ],
)
def test_a_process_without_the_measurement_is_named_with_what_to_take(name, process, message):
  measurement, process = measurement_named(name), PROCESSES[process]
  with pytest.raises(ValueError, match=message):
    measurement.check(process)
  with pytest.raises(ValueError, match=message):
    measurement.pairs(process, jnp.zeros((1, 3, 4)), keys_of(1, 2))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_every_process_has_the_measurements_of_its_kind(process):
  for name in (*OF_ALL, *(OF_DISCRETE if process.is_discrete else OF_CONTINUOUS)):
    measurement_named(name).check(process)


@pytest.mark.parametrize("weights", [np.ones((2, 2)), np.array([1.0, -1.0]), np.array([np.nan])])
def test_weights_that_are_no_weights_are_refused(weights):
  with pytest.raises(ValueError, match="finite numbers that are not negative"):
    weighted_loss(weights)


def test_a_measurement_is_of_examples_trajectories_or_predictions():
  with pytest.raises(ValueError, match="examples, trajectories, predictions; got 'videos'"):
    Measurement(LOSS.draw, LOSS.value, of="videos")
