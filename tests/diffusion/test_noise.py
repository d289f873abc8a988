"""Draws of (t, ε): distributions, designs that are each unbiased, and the loss of a pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.augmentation import Augmentation
from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import Noised, draw_pairs, losses, noised, squared_errors
from tests.processes import PROCESSES

EPSILON = PROCESSES["epsilon"]
NUM_STEPS = EPSILON.num_steps
SHAPE = (2, 1, 1)
NUM = 20_000
DESIGNS = [
  Draws(1, timesteps=timesteps, antithetic=antithetic, shared=shared)
  for timesteps, antithetic, shared in itertools.product(
    ("uniform", "stratified"), (False, True), (False, True)
  )
]
NAMES = [f"{d.timesteps}-{d.antithetic}-{d.shared}" for d in DESIGNS]
named = pytest.mark.parametrize("draws", DESIGNS, ids=NAMES)


def keys_of(num: int, size: int) -> jax.Array:
  """[num, size] keys, of as many replicates."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  return jax.vmap(lambda key: draw_keys(key, size))(keys)


def pairs_of(num: int, size: int, draws: Draws):
  """The target of EPSILON is the noise."""
  return jax.tree.map(
    np.asarray, draw_pairs(EPSILON, jnp.zeros((num, *SHAPE)), keys_of(num, size), draws)
  )


@pytest.fixture(scope="module")
def singles():
  """Many single draws of (t, ε)."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(NUM))
  return jax.tree.map(np.asarray, noised(EPSILON, jnp.zeros((NUM, *SHAPE)), keys))


def test_timesteps_are_uniform(singles):
  counts = np.bincount(singles.t, minlength=NUM_STEPS)
  assert len(counts) == NUM_STEPS == 10
  expected = NUM / 10
  # Chi-square with 9 degrees of freedom passes 27.9 once in a thousand seeds.
  assert np.sum((counts - expected) ** 2 / expected) < 27.9


def test_noise_is_independent_between_elements_and_of_the_timestep(singles):
  first, second = singles.target.reshape(NUM, 2).T
  # Correlations of independent numbers have standard error 1/√n.
  for a, b in ((first, second), (first, singles.t), (first**2, singles.t)):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(NUM)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_noise_is_independent_of_what_others_draw_from_the_same_key(singles, number):
  """Curvature folds a small number into the key of a draw for its sampled targets."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(NUM))
  keys = fold_in_each(keys, jnp.full(NUM, number))
  others = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
  correlation = np.corrcoef(singles.target.ravel(), np.ravel(others))[0, 1]
  assert abs(correlation) < 4 / np.sqrt(2 * NUM)  # standard error 1/√n


def test_a_draw_depends_on_its_key_and_example_alone():
  data = jax.random.normal(stream(1, "test"), (6, 2, 2, 1))
  keys = keys_of(6, 1)[:, 0]
  together = noised(EPSILON, data, keys)
  order = np.array([4, 1])
  apart = noised(EPSILON, data[order], keys[order])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), apart, together)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_pairs_are_the_processs_own_of_one_draw(process, shape=(3, 2)):
  """Inputs, target and weights belong to the same t and ε; uint8 data are mapped to [-1, 1]."""
  data = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
  pairs = draw_pairs(process, jnp.asarray(data), keys_of(3, 4), Draws(4))
  data = jnp.repeat(jnp.asarray(data / 127.5 - 1, jnp.float32), 4, axis=0)
  scale = process.inputs(jnp.ones((12, *shape)), pairs.t)[0]
  noise = process.noise(pairs.inputs / scale, pairs.t, pairs.target)
  again = process.inputs(process.noised(data, pairs.t, noise), pairs.t)
  np.testing.assert_allclose(pairs.inputs, again[0], rtol=0, atol=1e-4)  # float32, through 1 / b
  np.testing.assert_array_equal(pairs.time, again[1])
  np.testing.assert_array_equal(pairs.weights, process.weights(pairs.t))
  assert pairs.conditioning is None


@named
@pytest.mark.parametrize("size", [1, 5])
def test_the_loss_of_a_linear_denoiser_is_unbiased(draws, size):
  """ε̂ = a x_t has the loss E_t [a² ᾱ_t |x|²/D + (1 − a √(1 − ᾱ_t))²], for every design."""
  num, slope = 4_000, 0.7
  image = np.array([0.5, -0.8], np.float32).reshape(1, *SHAPE)
  images = jnp.asarray(np.repeat(image, num, axis=0))
  apply_fn = lambda params, x_t, t: params * x_t
  evaluate = jax.jit(
    lambda: LOSS.evaluate(apply_fn, slope, EPSILON, images, keys_of(num, size), draws=draws)
  )
  values = np.asarray(evaluate(), np.float64)
  signal, noise = EPSILON.exact.a, EPSILON.exact.b
  expected = np.mean(slope**2 * signal**2 * np.mean(image**2) + (1 - slope * noise) ** 2)
  # Replicates are independent; four standard errors of their mean.
  assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / np.sqrt(num)


@named
@pytest.mark.parametrize("size", [1, 7, 24])
def test_every_draw_is_uniform_in_time_and_normal_in_noise(draws, size):
  """Over many replicates, all timesteps are as frequent, and the noise has moments 0, 1, 0, 3."""
  num = 8_000 // size
  pairs = pairs_of(num, size, draws)
  frequencies = np.bincount(pairs.t, minlength=NUM_STEPS) / len(pairs.t)
  # Pairs share t, so half as many are independent; four standard deviations of a frequency.
  assert (abs(frequencies - 1 / NUM_STEPS) < 4 * np.sqrt(0.09 / (len(pairs.t) / 2))).all()
  for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
    error = np.sqrt(variance / (pairs.target.size / 2))
    assert abs(np.mean(pairs.target.astype(np.float64) ** power) - moment) < 4 * error


@pytest.mark.parametrize("size", [2, 5, 20])
def test_stratified_draws_lie_one_in_each_part(size):
  pairs = pairs_of(50, size, Draws(1, timesteps="stratified", antithetic=False))
  parts = pairs.t.reshape(50, size) * size / NUM_STEPS
  # A part's border may lie within a timestep, which then belongs to both.
  assert (parts > np.arange(size) - size / NUM_STEPS).all()
  assert (parts < np.arange(size) + 1).all()


@named
@pytest.mark.parametrize("process", [EPSILON, PROCESSES["flow"]], ids=["discrete", "continuous"])
def test_antithetic_draws_come_in_pairs(draws, process, size=5):
  """Of zeros, targets are multiples of the noise."""
  pairs = draw_pairs(process, jnp.zeros((3, *SHAPE)), keys_of(3, size), draws)
  t, noise = pairs.t.reshape(3, size), pairs.target.reshape(3, size, *SHAPE)
  even = slice(0, size // 2 * 2, 2)
  opposite = np.array_equal(noise[:, even], -noise[:, 1::2])
  assert opposite == draws.antithetic
  assert np.array_equal(t[:, even], t[:, 1::2]) == draws.antithetic


@named
def test_shared_draws_are_those_of_every_example(draws):
  """The numbers that keys are made from are one and the same, or each example's own."""
  ids = jnp.array([7, 3, 9], jnp.uint32)
  keys = fold_in_each(stream(0, "test"), draws.numbers(ids))
  drawn = [jax.random.normal(key) for key in keys]
  assert (drawn[0] == drawn[1] == drawn[2]) == draws.shared


@named
def test_flips_mirror_half_of_the_images_and_change_no_draw(draws, size=5):
  """Pairs share theirs, with shared draws all images do, and the noise is not mirrored."""
  images = jnp.asarray(np.random.default_rng(0).normal(size=(400, 2, 3, 1)), jnp.float32)
  ids = draws.numbers(jnp.arange(400))
  keys = jax.vmap(lambda key: draw_keys(key, size))(fold_in_each(stream(0, "test"), ids))
  pairs, plain = (
    draw_pairs(EPSILON, images, keys, draws, Augmentation(flip)) for flip in (True, False)
  )
  np.testing.assert_array_equal(pairs.t, plain.t)
  np.testing.assert_array_equal(pairs.target, plain.target)
  repeated = jnp.repeat(images, size, axis=0)
  kept, turned = (
    np.asarray(EPSILON.noised(x, pairs.t, pairs.target)) for x in (repeated, repeated[:, :, ::-1])
  )
  mirrored = (np.asarray(pairs.inputs) == turned).all(axis=(1, 2, 3))
  np.testing.assert_array_equal(np.asarray(pairs.inputs)[~mirrored], kept[~mirrored])
  mirrored = mirrored.reshape(400, size)
  if draws.antithetic:
    np.testing.assert_array_equal(mirrored[:, 0], mirrored[:, 1])
  if draws.shared:
    assert (mirrored == mirrored[0]).all()
  else:
    # Pairs share theirs: four standard errors of 800 fair coins.
    assert abs(mirrored.mean() - 0.5) < 4 * np.sqrt(0.25 / 800)


def test_flips_are_of_images_alone():
  message = r"random_flip mirrors images \[B, H, W, C\]; got data of shape \(3, 5\)"
  with pytest.raises(ValueError, match=message):
    Augmentation(random_flip=True).data(jnp.zeros((3, 5)), keys_of(3, 1)[:, 0])


def test_the_papers_design_draws_each_pair_by_itself():
  data = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
  keys = keys_of(3, 4)
  ours = draw_pairs(EPSILON, data, keys, INDEPENDENT)
  theirs = noised(EPSILON, jnp.repeat(data, 4, axis=0), keys.reshape(-1))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_keys_give_the_draws_that_they_gave_before():
  """Random numbers of the streams "t" and "noise", which results on disk were made with."""
  pairs = noised(EPSILON, jnp.zeros((3, 2)), keys_of(3, 1)[:, 0])
  np.testing.assert_array_equal(pairs.t, [5, 2, 8])
  # A quantile in float32.
  np.testing.assert_allclose(pairs.target[:, 0], [-0.6166981, -2.666231, -3.483953], rtol=1e-6)


def test_the_loss_is_a_weighted_mean_over_all_elements():
  predicted, target = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
  t = jnp.zeros(3, jnp.int32)
  weights = np.float32([1, 0.5, 3])
  pairs = Noised(jnp.zeros_like(target), t, jnp.asarray(target), jnp.asarray(weights), t)
  expected = [
    sum((float(p) - float(e)) ** 2 for p, e in zip(a.flat, b.flat, strict=True)) / 40
    for a, b in zip(predicted, target, strict=True)
  ]
  # Sums of 40 positive float32 numbers.
  np.testing.assert_allclose(squared_errors(jnp.asarray(predicted), pairs), expected, rtol=1e-6)
  np.testing.assert_allclose(losses(predicted, pairs), weights * expected, rtol=1e-6)


def test_any_process_has_the_loss_of_its_law_and_weights():
  """Zero predicted for ones: E[w_t (c_t² + d_t²)], by a sum over the law's quantiles."""
  keys = keys_of(200, 20)
  apply_fn = lambda params, inputs, time: 0 * inputs
  ones, zeros = jnp.ones((2_000, 1)), jnp.zeros((2_000, 1))
  for name, process in PROCESSES.items():
    values = LOSS.evaluate(apply_fn, None, process, jnp.ones((200, 30)), keys, draws=Draws(20))
    t = process.times((jnp.arange(2_000, dtype=jnp.float32) + 0.5) / 2_000)
    squares = process.target(zeros, ones, t) ** 2 + process.target(ones, zeros, t) ** 2
    expected = np.mean(np.float64(process.weights(t) * squares[:, 0]))
    error = np.std(values, ddof=1) / np.sqrt(200)
    # Four standard errors, and the sum's own error at the law's ends.
    assert abs(np.mean(values) - expected) < 4 * error + 1e-3 * expected, name
