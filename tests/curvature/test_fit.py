"""fit_curvature: its sums against plain ones over pairs, the same however they are computed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Curvature, Resume, Schedule, Task, fit_curvature
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.curvature.decompose import decomposed
from jaxinf.curvature.fit import Fit
from jaxinf.curvature.targets import monte_carlo
from jaxinf.diffusion.objective import Noised, noised
from jaxinf.engine import Rows
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import PartialSums
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from tests import nets
from tests.curvature import naive

NUM, DRAWS, SEED, SHAPE = 7, 3, 4, (2, 2, 2)
SHAPES = {"first": {"kernel": (2, 3), "bias": (3,)}, "second": {"kernel": (3, 2), "bias": (2,)}}
IDS = np.array([5, 3, 6, 0, 1, 4, 2], np.uint32)
ROUNDING = 1e-5  # float32 sums of a hundred terms


def pixelwise_net(params, x_t, t):
  """Two dense layers on every pixel's two channels, tanh between."""
  del t
  tokens = x_t.reshape(len(x_t), -1, 2)
  h = jnp.tanh(nets.dense(params["first"], tokens))
  return nets.dense(params["second"], h).reshape(x_t.shape)


def uint8_images() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (NUM, *SHAPE)).astype(np.uint8)


@pytest.fixture(scope="module")
def task():
  return Task(pixelwise_net, nets.random_params(SHAPES), nets.SCHEDULE)


def fitted(task, **options) -> Curvature:
  """EK-FAC of the images in batches with a remainder, on one device."""
  defaults = dict(
    draws=DRAWS, seed=SEED, ids=IDS, method="ekfac", batch_size=4, devices=jax.local_devices()[:1]
  )
  return fit_curvature(task, uint8_images(), **(defaults | options))


@pytest.fixture(scope="module")
def whole(task):
  return fitted(task)


def assert_equal_blocks(found: Curvature, expected: Curvature, tolerance: float = ROUNDING):
  """The blocks of two fits, which eigenvectors up to sign and order are free to express."""
  assert list(found.bases) == list(expected.bases)
  for name, basis in expected.bases.items():
    block = naive.dense(basis)
    scale = np.abs(block).max()
    np.testing.assert_allclose(
      naive.dense(found.bases[name]) / scale, block / scale, rtol=0, atol=tolerance
    )


def plain_sums(params, pairs: Noised, targets) -> dict[str, tuple]:
  """A, G and pairs' matrices of both layers in float64: one position at a time, by hand."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  factors = {name: [0.0, 0.0] for name in SHAPES}
  matrices: dict[str, list] = {name: [] for name in SHAPES}
  for x_t, target in zip(np.asarray(pairs.x_t), np.asarray(targets), strict=True):
    cotangent = np.sqrt(2 / np.prod(SHAPE)) * np.asarray(target, np.float64)
    for name in SHAPES:
      matrices[name].append(0.0)
    for a, g in zip(x_t.reshape(4, 2), cotangent.reshape(4, 2), strict=True):
      hidden = np.tanh(a @ params["first"]["kernel"] + params["first"]["bias"])
      g_first = (params["second"]["kernel"] @ g) * (1 - hidden**2)
      for name, inputs, gradient in (("first", a, g_first), ("second", hidden, g)):
        inputs = np.append(inputs, 1.0)
        factors[name][0] += np.outer(inputs, inputs) / (4 * len(pairs.t))
        factors[name][1] += np.outer(gradient, gradient) / len(pairs.t)
        matrices[name][-1] += np.outer(gradient, inputs)
  return {name: (a, g, np.stack(matrices[name])) for name, (a, g) in factors.items()}


@pytest.mark.parametrize("random_flip", [False, True])
def test_factors_and_eigenvalues_equal_plain_sums_over_pairs(task, devices, random_flip):
  """uint8 images, permuted ids, batches that need padding, one device and two; each draw's flip."""
  model = register(task.apply_fn, task.params, SHAPE, Selection())
  settings = dict(sharing="expand", estimator="mc", targets=1, seed=SEED, random_flip=random_flip)
  rows = Rows(uint8_images(), IDS, DRAWS)
  fit = Fit(task, model, rows, settings, batch_size=4, devices=devices)
  factors = model.factors(fit.first_pass(model), total=len(rows))
  bases = fit.second_pass(model, decomposed(factors, "host")[0])

  examples, draws = np.repeat(np.arange(NUM), DRAWS), np.tile(np.arange(DRAWS), NUM)
  keys = fold_in_each(fold_in_each(stream(SEED, "curvature"), IDS[examples]), draws)
  images = uint8_images()[examples].astype(np.float32) / 127.5 - 1
  if random_flip:
    flips = np.asarray(jax.vmap(jax.random.bernoulli)(substreams(keys, "flip")))
    assert 0 < flips.sum() < len(flips)
    images[flips] = images[flips][:, :, ::-1]
  pairs = noised(nets.SCHEDULE, images, keys)
  streams = fold_in_each(substreams(keys, "targets"), np.zeros(len(keys), np.uint32))
  targets = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(streams)
  for name, (a, g, matrices) in plain_sums(task.params, pairs, targets).items():
    basis = bases[name]
    eigenvalues = np.mean((basis.q_out.T @ matrices @ basis.q_in) ** 2, axis=0)
    found = (factors[name].a, factors[name].g, basis.eigenvalues)
    for ours, plain in zip(found, (a, g, eigenvalues), strict=True):
      np.testing.assert_allclose(ours, plain, rtol=0, atol=ROUNDING * np.abs(plain).max())


@pytest.mark.parametrize(
  ("method", "estimator"),
  [
    ("kfac", "mc"), ("kfac", "empirical"), ("kfac", "exact"), ("ekfac", "mc"),
    ("diagonal", "exact"), ("cg", "mc"),
  ],
)  # fmt: skip
def test_with_flips_curvature_is_the_mean_over_an_image_and_its_mirror_image(method, estimator):
  """ε̂ = W x_t + b at W = b = 0, where the GGN and the empirical Fisher are known.

  K-FAC of both is (2/D) I ⊗ E[x xᵀ] where D = 2, so that 2/D = 4/D² = 1.
  """
  image, shape, draws = np.array([0.9, -0.5], np.float32), (1, 2, 1), 4_000
  schedule = Schedule.linear(5, 0.01, 0.5)
  params = {"linear": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
  apply_fn = lambda params, x_t, t: nets.dense(params["linear"], x_t.reshape(-1, 2)).reshape(
    x_t.shape
  )
  curvature = fit_curvature(
    Task(apply_fn, params, schedule), image.reshape(1, *shape), draws=draws, seed=0, method=method,
    estimator=estimator, random_flip=True, batch_size=1000, devices=jax.local_devices()[:1],
  )  # fmt: skip
  assert curvature.settings["random_flip"] is True
  moments = []
  for x in (image, image[::-1]):
    for signal, noise in zip(np.float64(schedule.signal), np.float64(schedule.noise), strict=True):
      ones = np.append(signal * x, 1.0)
      moments.append(np.outer(ones, ones) + noise**2 * np.diag([1.0, 1.0, 0.0]))
  expected = np.kron(np.eye(2), np.mean(moments, axis=0))
  if method == "cg":
    units = np.eye(6).reshape(6, 2, 3)
    trees = [{"linear": {"kernel": unit[:, :2].T, "bias": unit[:, 2]}} for unit in units]
    products = [curvature.exact.multiply(tree, 1.0)["linear"] for tree in trees]
    found = np.stack(
      [np.concatenate([p["kernel"].T, p["bias"][:, None]], axis=1).ravel() for p in products]
    ) - np.eye(6)
  else:
    found = naive.dense(curvature.bases["linear"])
  if method == "diagonal":
    expected = np.diag(np.diag(expected))
  # Means over 4,000 draws of squares and products, which deviate by 2 % to 5 %. Without flips the
  # first two diagonal entries would differ by a third from each other.
  np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * expected.max())
  assert abs(found[0, 0] - found[1, 1]) < 0.1


def test_more_targets_are_further_ones_and_independent_of_the_noise(task):
  """No two numbers among ε and the targets correlate by more than chance."""
  keys = fold_in_each(stream(0, "curvature"), np.arange(500))
  pairs = noised(nets.SCHEDULE, np.zeros((500, *SHAPE), np.float32), keys)
  targets = np.asarray(monte_carlo(keys, pairs, 3)(pairs.noise))
  assert targets.shape == (3, 500, *SHAPE)
  np.testing.assert_array_equal(monte_carlo(keys, pairs, 1)(pairs.noise), targets[:1])
  rows = np.stack([np.ravel(pairs.noise), *(np.ravel(target) for target in targets)])
  correlations = np.corrcoef(rows)[np.triu_indices(4, 1)]
  assert np.abs(correlations).max() < 5 / np.sqrt(pairs.noise.size)
  # of second moment 2/D, within 5 standard errors of a mean of squares
  assert abs(np.mean(targets**2) * np.prod(SHAPE) / 2 - 1) < 5 * np.sqrt(2 / targets.size)


def test_partitions_change_nothing(task, whole):
  """Three, where there are two layers; each sum is over the same terms in the same order."""
  assert_equal_blocks(fitted(task, partitions=3), whole, tolerance=1e-6)


def test_decomposing_on_devices_agrees_with_the_host(task, whole):
  assert_equal_blocks(fitted(task, decompose="devices", devices=jax.local_devices()), whole)


_EIGHT_DEVICES = """
import sys
import jax
from tests.curvature import test_fit
from tests import nets
task = test_fit.Task(test_fit.pixelwise_net, nets.random_params(test_fit.SHAPES), nets.SCHEDULE)
devices = jax.local_devices()
assert len(devices) == 8
one, all_eight = (
  test_fit.fitted(task, draws=2, batch_size=8, decompose="devices", devices=some)
  for some in (devices[:1], devices)
)
test_fit.assert_equal_blocks(all_eight, one)
print("equal")
"""


def test_eight_devices_agree_with_one():
  """14 pairs in batches of 8: in the second, two devices have nothing but padding."""
  root = Path(__file__).parents[2]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(root)}
  command = [sys.executable, "-c", _EIGHT_DEVICES]
  run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
  assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.parametrize(
  ("method", "message"),
  [
    ("kfac", "input factor A of layer second is not finite: its activations overflow"),
    ("diagonal", "eigenvalues of layer first are not finite"),
  ],
)
def test_what_is_not_finite_stops_with_the_name_of_the_layer(task, method, message):
  """NaN among the first layer's parameters reach the second's inputs and the first's gradients."""
  broken = jax.tree.map(lambda x: x, task.params)
  broken["first"]["bias"] = broken["first"]["bias"].at[1].set(jnp.nan)
  only = ("second",) if method == "kfac" else None
  with pytest.raises(ValueError, match=message):
    fitted(dataclasses.replace(task, params=broken), method=method, only=only)


@pytest.fixture(scope="module")
def left(task, tmp_path_factory):
  """The sums of a fit that was not cleared away."""
  resume = Resume(tmp_path_factory.mktemp("sums"), every=1)
  fitted(task, method="kfac", resume=resume)
  return resume


class Killed(KeyboardInterrupt):
  """Stands in for what a user or a scheduler does."""


@pytest.mark.parametrize("saves", [2, 8], ids=["first pass", "second pass"])
def test_an_interrupted_fit_goes_on_to_bitwise_the_same(task, whole, tmp_path, monkeypatch, saves):
  """21 pairs in batches of 4: each pass makes six batches and, saving after each, six saves."""
  done = []
  save = PartialSums.save

  def count_saves(self, rows_done, sums):
    save(self, rows_done, sums)
    done.append(rows_done)
    if len(done) == saves:
      raise Killed

  monkeypatch.setattr(PartialSums, "save", count_saves)
  with pytest.raises(Killed):
    fitted(task, resume=Resume(tmp_path, every=1))
  resumed = fitted(task, resume=Resume(tmp_path, every=1))
  assert len(done) == 12 and done[-1] == NUM * DRAWS  # no batch was computed twice
  for name, basis in whole.bases.items():
    for part in ("q_in", "q_out", "eigenvalues"):
      np.testing.assert_array_equal(getattr(resumed.bases[name], part), getattr(basis, part))


@pytest.mark.parametrize(
  ("change", "difference"),
  [
    ({"seed": 5}, "seed: 4 → 5"),
    ({"random_flip": True}, "random_flip: False → True"),
    ({"ids": np.arange(NUM)}, "inputs: "),
  ],
)
def test_sums_of_other_settings_are_refused(task, left, change, difference):
  with pytest.raises(StaleArtifact, match=difference):
    fitted(task, method="kfac", resume=left, **change)


def test_exact_targets_of_a_large_network_are_refused_with_what_they_would_cost():
  images = np.zeros((1000, 64, 64, 1), np.uint8)
  with pytest.raises(ValueError, match=r"4,096 outputs of 100,000 pairs: about \d\.\de\+1[4-6]"):
    fit_curvature(nets.conv_task(), images, draws=100, seed=0, estimator="exact")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"ids": np.arange(3)}, "ids must be 7 different ids"),
    ({"ids": np.zeros(NUM, int)}, "ids must be 7 different ids"),
    ({"skip": "norm"}, r"write skip=\('norm',\)"),
    ({"draws": 0}, "draws must be at least 1"),
    ({"targets": 0}, "targets must be at least 1"),
    ({"targets": 2, "estimator": "empirical"}, "targets counts model-sampled ones"),
    ({"partitions": 0}, "partitions must be at least 1"),
    ({"method": "shampoo"}, "Unknown method 'shampoo'; there are: kfac"),
    ({"sharing": "both"}, "there are: expand, reduce"),
    ({"estimator": "fisher"}, "there are: mc, empirical, exact"),
    ({"decompose": "cloud"}, "there are: host, devices"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
  ],
)
def test_bad_arguments_are_refused(task, change, message):
  with pytest.raises(ValueError, match=message):
    fitted(task, **change)
