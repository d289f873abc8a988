"""Designs of draws: each is unbiased, and has the structure that its name says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import DrawDesign, Schedule
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import UNIFORM, draw_pairs
from jaxinf.diffusion.objective import noised
from jaxinf.diffusion.schedule import add_noise

NUM_STEPS = 10
SCHEDULE = Schedule.linear(NUM_STEPS, 0.01, 0.5)
SHAPE = (2, 1, 1)
DESIGNS = [
  DrawDesign(*choice)
  for choice in itertools.product(("uniform", "stratified"), (False, True), (False, True))
]
named = pytest.mark.parametrize("design", DESIGNS, ids=str)


def keys_of(num: int, size: int) -> jax.Array:
  """[num, size] keys, of as many groups."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  return jax.vmap(lambda key: draw_keys(key, size))(keys)


def pairs_of(num: int, size: int, design: DrawDesign):
  return jax.tree.map(
    np.asarray, draw_pairs(SCHEDULE, jnp.zeros((num, *SHAPE)), keys_of(num, size), design)
  )


@named
@pytest.mark.parametrize("size", [1, 4, 5])
def test_the_loss_of_a_linear_denoiser_is_unbiased(design, size):
  """ε̂ = a x_t has the loss E_t [a² ᾱ_t |x|²/D + (1 − a √(1 − ᾱ_t))²], for every design."""
  num, slope = 4_000, 0.7
  image = np.array([0.5, -0.8], np.float32).reshape(1, *SHAPE)
  images = jnp.asarray(np.repeat(image, num, axis=0))
  apply_fn = lambda params, x_t, t: params * x_t
  evaluate = jax.jit(
    lambda: LOSS.evaluate(
      apply_fn, slope, SCHEDULE, images, keys_of(num, size), design=design
    )
  )  # fmt: skip
  values = np.asarray(evaluate(), np.float64)
  signal, noise = (np.asarray(x, np.float64) for x in (SCHEDULE.signal, SCHEDULE.noise))
  expected = np.mean(slope**2 * signal**2 * np.mean(image**2) + (1 - slope * noise) ** 2)
  # Groups are independent; four standard errors of their mean.
  assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / np.sqrt(num)


@named
@pytest.mark.parametrize("size", [1, 4, 7, 25])
def test_every_draw_is_uniform_in_time_and_normal_in_noise(design, size):
  """Over many groups, all timesteps are as frequent, and the noise has moments 0, 1 and 3."""
  num = 8_000 // size
  pairs = pairs_of(num, size, design)
  frequencies = np.bincount(pairs.t, minlength=NUM_STEPS) / len(pairs.t)
  # Pairs share t, so half as many are independent; four standard deviations of a frequency.
  assert (abs(frequencies - 1 / NUM_STEPS) < 4 * np.sqrt(0.09 / (len(pairs.t) / 2))).all()
  for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
    error = np.sqrt(variance / (pairs.noise.size / 2))
    assert abs(np.mean(pairs.noise.astype(np.float64) ** power) - moment) < 4 * error


@pytest.mark.parametrize("size", [2, 5, 10, 20])
def test_stratified_draws_lie_one_in_each_part(size):
  pairs = pairs_of(50, size, DrawDesign("stratified", antithetic=False))
  parts = pairs.t.reshape(50, size) * size / NUM_STEPS
  # A part's border may lie within a timestep, which then belongs to both.
  assert (parts > np.arange(size) - size / NUM_STEPS).all()
  assert (parts < np.arange(size) + 1).all()


@named
@pytest.mark.parametrize("size", [4, 5])
def test_antithetic_draws_come_in_pairs(design, size):
  pairs = pairs_of(3, size, design)
  t, noise = pairs.t.reshape(3, size), pairs.noise.reshape(3, size, *SHAPE)
  even = slice(0, size // 2 * 2, 2)
  opposite = np.array_equal(noise[:, even], -noise[:, 1::2])
  assert opposite == design.antithetic
  if design.antithetic:
    np.testing.assert_array_equal(t[:, even], t[:, 1::2])


@named
def test_shared_draws_are_those_of_every_example(design):
  """The numbers that keys are made from are one and the same, or each example's own."""
  ids = jnp.array([7, 3, 9], jnp.uint32)
  keys = fold_in_each(stream(0, "test"), design.numbers(ids))
  drawn = [jax.random.normal(key) for key in keys]
  assert (drawn[0] == drawn[1] == drawn[2]) == design.shared


@named
@pytest.mark.parametrize("size", [4, 5])
def test_flips_mirror_half_of_the_images_and_change_no_draw(design, size):
  """Pairs share theirs, with shared draws all images do, and the noise is not mirrored."""
  images = jnp.asarray(np.random.default_rng(0).normal(size=(400, 2, 3, 1)), jnp.float32)
  ids = design.numbers(jnp.arange(400))
  keys = jax.vmap(lambda key: draw_keys(key, size))(fold_in_each(stream(0, "test"), ids))
  flips = dataclasses.replace(design, random_flip=True)
  pairs, plain = (draw_pairs(SCHEDULE, images, keys, chosen) for chosen in (flips, design))
  np.testing.assert_array_equal(pairs.t, plain.t)
  np.testing.assert_array_equal(pairs.noise, plain.noise)
  repeated = jnp.repeat(images, size, axis=0)
  kept, turned = (
    np.asarray(add_noise(SCHEDULE, images=x, t=pairs.t, noise=pairs.noise))
    for x in (repeated, repeated[:, :, ::-1])
  )
  mirrored = (np.asarray(pairs.x_t) == turned).all(axis=(1, 2, 3))
  np.testing.assert_array_equal(np.asarray(pairs.x_t)[~mirrored], kept[~mirrored])
  mirrored = mirrored.reshape(400, size)
  if design.antithetic:
    np.testing.assert_array_equal(mirrored[:, 0], mirrored[:, 1])
  if design.shared:
    assert (mirrored == mirrored[0]).all()
  else:
    # Pairs share theirs: four standard errors of 800 fair coins.
    assert abs(mirrored.mean() - 0.5) < 4 * np.sqrt(0.25 / 800)
  assert flips.without_flips() == design


def test_the_papers_design_draws_each_pair_by_itself():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
  keys = keys_of(3, 4)
  ours = draw_pairs(SCHEDULE, images, keys, UNIFORM)
  theirs = noised(SCHEDULE, jnp.repeat(images, 4, axis=0), keys.reshape(-1))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_unknown_timesteps_are_refused():
  with pytest.raises(ValueError, match="Unknown timesteps 'sobol'; there are: uniform, stratified"):
    DrawDesign("sobol")
