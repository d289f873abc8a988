"""Posterior weights of patches: closed forms, a float64 twin over loops, invariances."""

import itertools
import re

import jax
import numpy as np
import pytest

from jaxinf import Compute, Draws, Examples, Moments, NearestPatch, Process, nearest_patch
from jaxinf.attribution.kernels import QUERY
from jaxinf.core.random import draw_keys, stream
from jaxinf.diffusion.noise import draw_noise, draw_times
from tests import nets
from tests.processes import PROCESSES
from tests.twins import assert_close

EPSILON = PROCESSES["epsilon"]
DRAWS = Draws(6, 1, seed=3)
WHOLE = 9  # a side that covers images of 4 × 4 and less from every position


def noised(process: Process, query: np.ndarray, draws: Draws):
  """x_t [S, …], a [S], b [S] of all draws of one replicate of a query, in float64."""
  keys = draw_keys(jax.random.fold_in(stream(draws.seed, QUERY), 0), draws.num)[None]
  t = draw_times(process, keys, draws)
  a, b = (np.asarray(level, np.float64) for level in process.levels(t))
  noise = np.asarray(draw_noise(query.shape, keys, draws), np.float64)
  column = (-1, *[1] * query.ndim)
  return a.reshape(column) * query + b.reshape(column) * noise, a, b


def twin(process, queries, train, draws, *, window, smallest, growth, flip=False) -> np.ndarray:
  """[Q, N] mean weights, by loops over draws, positions, images and moves."""
  views = [(n, image) for n, image in enumerate(train.astype(float))]
  if flip:
    views += [(n, image[:, ::-1]) for n, image in views]
  sides = train.shape[1:-1]
  found = np.zeros((len(queries), len(train)))
  for q, query in enumerate(queries.astype(float)):
    for x_t, a, b in zip(*noised(process, query, draws), strict=True):
      radius = int(min(max(np.round(growth * b / a / 2), smallest // 2), max(sides, default=1)))
      for place in itertools.product(*map(range, sides)):
        low = np.maximum(np.array(place) - radius, 0)
        high = np.minimum(np.array(place) + radius, np.array(sides) - 1)
        logs, images = [], []
        for move in itertools.product(range(-window, window + 1), repeat=len(sides)):
          if (low + move < 0).any() or (high + move >= sides).any():
            continue
          cut = lambda x, by: x[tuple(map(slice, low + by, high + 1 + np.array(by)))]  # noqa: B023
          for n, image in views:
            difference = cut(x_t, np.zeros_like(low)) - a * cut(image, np.array(move))
            logs.append(-np.square(difference).sum() / (2 * b**2))
            images.append(n)
        weights = np.exp(np.array(logs) - max(logs))
        np.add.at(found[q], images, weights / weights.sum())
  return found / draws.num / np.prod(sides)


@pytest.mark.parametrize(
  ("process", "shape", "options"),
  [
    ("epsilon", (4, 3, 2), dict(window=1, smallest=1, growth=3.0)),
    ("edm", (5, 1), dict(window=2, smallest=3, growth=1.0)),
    ("flow", (4,), dict(window=1, smallest=3, growth=1.0)),  # one patch
  ],
  ids=["images", "series", "vectors"],
)
def test_weights_equal_a_loop_over_positions_and_moves(process, shape, options):
  process, flip = PROCESSES[process], len(shape) == 3
  queries, train = nets.random_images(2, shape), nets.random_images(5, shape, seed=1)
  examples = Examples(train, random_flip=flip)
  found = nearest_patch(process, queries=Examples(queries), train=examples, draws=DRAWS, **options)
  expected = twin(process, queries, train, DRAWS, **options, flip=flip)
  assert_close(found.values, expected, 1e-4)  # float32 distances over the smallest b²
  assert found.settings["random_flip"] == flip


def test_a_patch_that_is_the_whole_image_gives_the_optimal_denoiser():
  """Two images: the weight of the first is the mean of a logistic function of x_t alone."""
  train = nets.random_images(2, (3, 4, 1))
  query = train[:1]
  found = nearest_patch(
    EPSILON, queries=Examples(query), train=Examples(train), draws=DRAWS, smallest=WHOLE
  )
  x_t, a, b = noised(EPSILON, query[0].astype(float), DRAWS)
  squares = [
    np.square(x_t - a[:, None, None, None] * y).sum(axis=(1, 2, 3)) for y in train.astype(float)
  ]
  first = np.mean(1 / (1 + np.exp((squares[0] - squares[1]) / (2 * b**2))))
  assert_close(found.values, np.array([[first, 1 - first]]), 1e-5)
  assert first > 0.5


def test_the_query_itself_comes_first_and_a_moved_copy_within_the_window():
  train = nets.random_images(6, (6, 6, 1))
  queries = Examples(np.roll(train[[4]], 1, axis=1))  # one pixel down
  shares = {
    window: nearest_patch(
      EPSILON, queries=queries, train=Examples(train), draws=DRAWS, window=window, growth=2.0
    )
    for window in (0, 1)
  }
  for scores in shares.values():
    np.testing.assert_allclose(scores.values.sum(axis=1), 1, rtol=1e-5)
    assert (scores.values >= 0).all()
  assert shares[1].top(1).ids[0, 0] == 4
  assert shares[1].values[0, 4] > 2 * shares[0].values[0, 4]


def test_weights_depend_on_neither_batches_nor_blocks(devices, monkeypatch):
  """Blocks of two images, chunks of one, queries one at a time; each has two replicates."""
  queries, train = nets.random_images(3), nets.random_images(5, seed=1)
  ask = lambda **how: nearest_patch(
    EPSILON, queries=Examples(queries), train=Examples(train), draws=Draws(4, 2), **how
  )
  expected = ask(compute=Compute(devices=jax.local_devices()[:1]))
  monkeypatch.setattr("jaxinf.attribution.nearest_patch._BLOCK_BYTES", 2 * train[0].nbytes)
  monkeypatch.setattr("jaxinf.attribution.nearest_patch._ELEMENTS", 1)
  found = ask(compute=Compute(batch_size=2, devices=devices))
  assert found.replicate_values.shape == (2, 3, 5) and np.isfinite(found.std_errors).all()
  # Log sums in another order, in float32.
  assert_close(found.replicate_values, expected.replicate_values, 1e-5)


def test_what_does_not_fit_is_refused():
  images = Examples(nets.random_images(2))
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  with refuse("smallest must be odd, so that a patch has a middle; got 4. Take 5."):
    NearestPatch(EPSILON, smallest=4)
  with refuse("window must be at least 0; got -1"):
    NearestPatch(EPSILON, window=-1)
  with refuse("growth must be a number of pixels, at least 0; got nan"):
    NearestPatch(EPSILON, growth=float("nan"))
  with refuse("do not match training examples"):
    nearest_patch(EPSILON, queries=Examples(nets.random_images(1, (3, 3, 1))), train=images)
  moments = Examples(Moments.of(*np.zeros((2, 2, 4, 4, 1), np.float32)))
  with refuse("give the images or latents, and no moments"):
    nearest_patch(EPSILON, queries=images, train=moments)
  with refuse("take a fixed number of draws"):
    nearest_patch(EPSILON, queries=images, train=images, draws=Draws.until_stable())
