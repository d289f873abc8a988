"""Measurements: textbook twins in float64, closed forms of linear denoisers, a naive loop."""

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
  measurement_named,
  weighted_loss,
)
from jaxinf.diffusion.noise import predict
from jaxinf.diffusion.sampler import sample
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.weightings import WEIGHTINGS
from tests import nets
from tests.diffusion.measured import NAMES, OF_ALL, OF_CONTINUOUS, OF_DISCRETE, random_examples
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
  inner = np.sum(np.float64(measurement.cotangents(process, pairs, draws=2)(out)) * change)
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


def test_every_measurement_has_one_name():
  assert {m.name for m in MEASUREMENTS.values()} == set(MEASUREMENTS)
  for name in (*NAMES, *OF_CONTINUOUS):
    measurement = measurement_named(name)
    assert measurement.name == name
    assert measurement_named(name) is measurement  # so that its kernel compiles once
    assert measurement_named(measurement) is measurement
  every = {name.split("(")[0] for name in (*NAMES, *OF_CONTINUOUS)}
  assert every == {*MEASUREMENTS, *PARAMETERISED}
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
      for kind in ("flow", "edm")
    ),
    ("loss_at_time(0.4)", "v", r"loss_at_time\(0.4\) is of continuous.*v.*Take loss_at_timestep"),
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
