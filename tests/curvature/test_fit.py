"""fit_curvature: its factors against a plain sum over pairs, and its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import fit_curvature
from jaxinf.curvature.fit import fit_factors
from jaxinf.curvature.registration import register
from jaxinf.diffusion.objective import Noised, noised
from jaxinf.parallel import Rows
from jaxinf.random import fold_in_each, stream, substreams
from tests import nets

NUM, DRAWS, SEED = 7, 3, 4
SHAPES = {"first": {"kernel": (2, 3), "bias": (3,)}, "second": {"kernel": (3, 2), "bias": (2,)}}


def pixelwise_net(params, x_t, t):
  """Two dense layers on every pixel's two channels, tanh between."""
  del t
  batch, height, width, channels = x_t.shape
  tokens = x_t.reshape(batch, height * width, channels)
  return nets.dense(params["second"], jnp.tanh(nets.dense(params["first"], tokens))).reshape(
    x_t.shape
  )


def uint8_images() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (NUM, 2, 2, 2)).astype(np.uint8)


def plain_factors(params, pairs: Noised, targets) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """A and G of both layers in float64: one pair and one position at a time, chain rule by hand."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  sums = {name: [0.0, 0.0] for name in SHAPES}
  size = 2 * 2 * 2
  for x_t, target in zip(np.asarray(pairs.x_t), np.asarray(targets), strict=True):
    cotangent = np.sqrt(2 / size) * np.asarray(target, np.float64)
    for a, g in zip(x_t.reshape(4, 2), cotangent.reshape(4, 2), strict=True):
      hidden = np.tanh(a @ params["first"]["kernel"] + params["first"]["bias"])
      g_first = (params["second"]["kernel"] @ g) * (1 - hidden**2)
      for name, inputs, gradient in (("first", a, g_first), ("second", hidden, g)):
        inputs = np.append(inputs, 1.0)
        sums[name][0] += np.outer(inputs, inputs) / (4 * len(pairs.t))
        sums[name][1] += np.outer(gradient, gradient) / len(pairs.t)
  return {name: (a, g) for name, (a, g) in sums.items()}


@pytest.mark.parametrize("batch_size", [4, 100])
def test_factors_equal_a_plain_sum_over_pairs(devices, batch_size):
  """uint8 images, permuted ids, batches that need padding, one device and two."""
  params = nets.random_params(SHAPES)
  images, ids = uint8_images(), np.array([5, 3, 6, 0, 1, 4, 2], np.uint32)
  model = register(pixelwise_net, params, (2, 2, 2), skip=())
  task = nets.Task(pixelwise_net, params, nets.SCHEDULE)
  rows = Rows(images, ids, DRAWS)
  factors = fit_factors(task, model, rows, SEED, batch_size, devices)

  examples, draws = np.repeat(np.arange(NUM), DRAWS), np.tile(np.arange(DRAWS), NUM)
  keys = fold_in_each(fold_in_each(stream(SEED, "curvature"), ids[examples]), draws)
  pairs = noised(nets.SCHEDULE, images[examples].astype(np.float32) / 127.5 - 1, keys)
  normal = lambda key: jax.random.normal(key, (2, 2, 2))
  targets = jax.vmap(normal)(substreams(keys, "targets"))
  for name, (a, g) in plain_factors(params, pairs, targets).items():
    # float32 sums of a hundred terms
    np.testing.assert_allclose(factors[name].a, a, rtol=0, atol=1e-5 * np.abs(a).max())
    np.testing.assert_allclose(factors[name].g, g, rtol=0, atol=1e-5 * np.abs(g).max())


def test_targets_are_independent_of_the_noise():
  """Model-sampled targets share no random numbers with ε: their correlation is that of chance."""
  keys = fold_in_each(stream(0, "curvature"), np.arange(500))
  noise = noised(nets.SCHEDULE, np.zeros((500, 2, 2, 2), np.float32), keys).noise
  targets = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 2)))(substreams(keys, "targets"))
  correlation = np.corrcoef(np.ravel(noise), np.ravel(targets))[0, 1]
  assert abs(correlation) < 5 / np.sqrt(noise.size)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"ids": np.arange(3)}, "ids must be 7 different ids"),
    ({"ids": np.zeros(NUM, int)}, "ids must be 7 different ids"),
    ({"skip": "norm"}, r"write skip=\('norm',\)"),
    ({"draws": 0}, "draws must be at least 1"),
    ({"method": "shampoo"}, "there are: kfac"),
    ({"estimator": "exact"}, "there are: mc"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
  ],
)
def test_bad_arguments_are_refused(change, message):
  task = nets.Task(pixelwise_net, nets.random_params(SHAPES), nets.SCHEDULE)
  with pytest.raises(ValueError, match=message):
    fit_curvature(task, uint8_images(), **({"draws": 1, "seed": 0} | change))
