"""fit_curvature: its sums against plain ones over pairs, the same however they are computed."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import (
  EKFAC,
  KFAC,
  Checkpointing,
  Compute,
  Curvature,
  Diagonal,
  DiffusionModel,
  Draws,
  ExactGGN,
  Examples,
  Process,
  Schedule,
  Shampoo,
  fit_curvature,
)
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.curvature.decompose import decomposed
from jaxinf.curvature.fit import Fit
from jaxinf.curvature.targets import monte_carlo
from jaxinf.diffusion.noise import Noised, noised
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import PartialSums
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import layers_of
from tests import nets, twins

NUM, DRAWS, SEED, SHAPE = 7, 3, 4, (2, 2, 2)
SHAPES = {"first": {"kernel": (2, 3), "bias": (3,)}, "second": {"kernel": (3, 2), "bias": (2,)}}
IDS = np.array([5, 3, 6, 0, 1, 4, 2], np.uint32)


def pixelwise_net(params, x_t, t):
  """Two dense layers on every pixel's two channels, tanh between."""
  del t
  tokens = x_t.reshape(len(x_t), -1, 2)
  h = jnp.tanh(nets.dense(params["first"], tokens))
  return nets.dense(params["second"], h).reshape(x_t.shape)


def uint8_images(**fields) -> Examples:
  images = np.random.default_rng(0).integers(0, 256, (NUM, *SHAPE)).astype(np.uint8)
  return Examples(images, **({"ids": IDS} | fields))


def pixelwise_model() -> DiffusionModel:
  return DiffusionModel(pixelwise_net, nets.random_params(SHAPES), nets.PROCESS)


@pytest.fixture(scope="module")
def model():
  return pixelwise_model()


def fitted(model, kind=EKFAC(), examples=None, draws=DRAWS, seed=SEED, **options) -> Curvature:
  """EK-FAC of the images in batches with a remainder, on one device."""
  compute = {"batch_size": 4, "devices": jax.local_devices()[:1]}
  compute |= {name: options.pop(name) for name in list(options) if name in COMPUTE}
  examples = uint8_images() if examples is None else examples
  return fit_curvature(
    model, examples, kind, draws=Draws(draws, seed=seed), compute=Compute(**compute), **options
  )


COMPUTE = ("batch_size", "devices", "checkpoint")


@pytest.fixture(scope="module")
def whole(model):
  return fitted(model)


def assert_equal_blocks(found: Curvature, expected: Curvature, tolerance: float = twins.ROUNDING):
  """The blocks of two fits, which eigenvectors up to sign and order are free to express."""
  assert list(found.bases) == list(expected.bases)
  blocks = lambda curvature: {name: twins.block(b) for name, b in curvature.bases.items()}
  twins.assert_close(blocks(found), blocks(expected), tolerance)


def plain_sums(params, pairs: Noised, targets) -> dict[str, tuple]:
  """A, G and pairs' matrices of both layers in float64: one position at a time, by hand."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  factors = {name: [0.0, 0.0] for name in SHAPES}
  matrices: dict[str, list] = {name: [] for name in SHAPES}
  for x_t, target in zip(np.asarray(pairs.inputs), np.asarray(targets), strict=True):
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
def test_factors_and_eigenvalues_equal_plain_sums_over_pairs(model, devices, random_flip):
  """uint8 images, permuted ids, batches that need padding, one device and two; each draw's flip."""
  train, compute = uint8_images(random_flip=random_flip), Compute(batch_size=4, devices=devices)
  layers, draws = layers_of(model, train, Selection()), Draws(DRAWS, seed=SEED)
  fit = Fit(model, train, layers, EKFAC(), draws, Selection(), "host", compute)
  factors = layers.factors(fit.first_pass(layers), total=NUM * DRAWS)
  bases = fit.second_pass(layers, decomposed(factors, "host")[0])

  examples, draws = np.repeat(np.arange(NUM), DRAWS), np.tile(np.arange(DRAWS), NUM)
  keys = fold_in_each(fold_in_each(stream(SEED, "curvature"), IDS[examples]), draws)
  images = uint8_images().data[examples].astype(np.float32) / 127.5 - 1
  if random_flip:
    flips = np.asarray(jax.vmap(jax.random.bernoulli)(substreams(keys, "flip")))
    assert 0 < flips.sum() < len(flips)
    images[flips] = images[flips][:, :, ::-1]
  pairs = noised(nets.PROCESS, images, keys)
  streams = fold_in_each(substreams(keys, "targets"), np.zeros(len(keys), np.uint32))
  targets = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(streams)
  for name, (a, g, matrices) in plain_sums(model.params, pairs, targets).items():
    basis = bases[name]
    eigenvalues = np.mean((basis.q_out.T @ matrices @ basis.q_in) ** 2, axis=0)
    found = (factors[name].a, factors[name].g, basis.eigenvalues)
    for ours, plain in zip(found, (a, g, eigenvalues), strict=True):
      twins.assert_close(ours, plain)


@pytest.mark.parametrize(
  "kind",
  [
    KFAC(), KFAC(fisher="empirical"), KFAC(fisher="exact"), EKFAC(), Diagonal(fisher="exact"),
    ExactGGN(),
  ],
  ids=lambda kind: kind.name,
)  # fmt: skip
def test_with_flips_curvature_is_the_mean_over_an_image_and_its_mirror_image(kind):
  """ε̂ = W x_t + b at W = b = 0, where the GGN and the empirical Fisher are known.

  K-FAC of both is (2/D) I ⊗ E[x xᵀ] where D = 2, so that 2/D = 4/D² = 1.
  """
  image, draws = np.array([0.9, -0.5], np.float32), 4_000
  schedule = Schedule.linear(5, 0.01, 0.5)
  params = {"linear": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
  apply_fn = lambda params, x_t, t: nets.dense(params["linear"], x_t.reshape(-1, 2)).reshape(
    x_t.shape
  )
  model = DiffusionModel(apply_fn, params, Process.epsilon(schedule))
  train = Examples(image.reshape(1, 1, 2, 1), random_flip=True)
  curvature = fitted(model, kind, train, draws=draws, seed=0, batch_size=1000)
  assert curvature.settings["random_flip"] is True
  moments = []
  for x in (image, image[::-1]):
    for signal, noise in zip(np.float64(schedule.signal), np.float64(schedule.noise), strict=True):
      ones = np.append(signal * x, 1.0)
      moments.append(np.outer(ones, ones) + noise**2 * np.diag([1.0, 1.0, 0.0]))
  expected = np.kron(np.eye(2), np.mean(moments, axis=0))
  if isinstance(kind, ExactGGN):
    units = np.eye(6).reshape(6, 2, 3)
    trees = [{"linear": {"kernel": unit[:, :2].T, "bias": unit[:, 2]}} for unit in units]
    products = [curvature.multiply(tree, 1.0)["linear"] for tree in trees]
    found = np.stack(
      [np.concatenate([p["kernel"].T, p["bias"][:, None]], axis=1).ravel() for p in products]
    ) - np.eye(6)
  else:
    found = twins.block(curvature.bases["linear"])
  if isinstance(kind, Diagonal):
    expected = np.diag(np.diag(expected))
  # Means over 4,000 draws of squares and products, which deviate by 2 % to 5 %. Without flips the
  # first two diagonal entries would differ by a third from each other.
  np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * expected.max())
  assert abs(found[0, 0] - found[1, 1]) < 0.1


def test_more_targets_are_further_ones_and_independent_of_the_noise():
  """No two numbers among ε and the targets correlate by more than chance."""
  keys = fold_in_each(stream(0, "curvature"), np.arange(500))
  pairs = noised(nets.PROCESS, np.zeros((500, *SHAPE), np.float32), keys)
  targets = np.asarray(monte_carlo(keys, pairs, 3)(pairs.target))
  assert targets.shape == (3, 500, *SHAPE)
  np.testing.assert_array_equal(monte_carlo(keys, pairs, 1)(pairs.target), targets[:1])
  rows = np.stack([np.ravel(pairs.target), *(np.ravel(target) for target in targets)])
  correlations = np.corrcoef(rows)[np.triu_indices(4, 1)]
  assert np.abs(correlations).max() < 5 / np.sqrt(pairs.target.size)
  # of second moment 2/D, within 5 standard errors of a mean of squares
  assert abs(np.mean(targets**2) * np.prod(SHAPE) / 2 - 1) < 5 * np.sqrt(2 / targets.size)


def test_partitions_change_nothing(model, whole):
  """Three, where there are two layers; each sum is over the same terms in the same order."""
  assert_equal_blocks(fitted(model, partitions=3), whole, tolerance=1e-6)


def test_decomposing_on_devices_agrees_with_the_host(model, whole):
  assert_equal_blocks(fitted(model, decompose="devices", devices=jax.local_devices()), whole)


_EIGHT_DEVICES = """
import sys
import jax
from tests.curvature import test_fit
model = test_fit.pixelwise_model()
devices = jax.local_devices()
assert len(devices) == 8
one, all_eight = (
  test_fit.fitted(model, draws=2, batch_size=8, decompose="devices", devices=some)
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
  ("kind", "message"),
  [
    (KFAC(), "input factor A of layer second is not finite: its activations overflow"),
    (Diagonal(), "eigenvalues of layer first are not finite"),
  ],
)
def test_what_is_not_finite_stops_with_the_name_of_the_layer(model, kind, message):
  """NaN among the first layer's parameters reach the second's inputs and the first's gradients."""
  broken = jax.tree.map(lambda x: x, model.params)
  broken["first"]["bias"] = broken["first"]["bias"].at[1].set(jnp.nan)
  only = ("second",) if kind == KFAC() else None
  with pytest.raises(ValueError, match=message):
    fitted(model.with_params(broken), kind, only=only)


@pytest.fixture(scope="module")
def left(model, tmp_path_factory):
  """The sums of a fit that was not cleared away."""
  checkpoint = Checkpointing(tmp_path_factory.mktemp("sums"), every=1)
  fitted(model, KFAC(), checkpoint=checkpoint)
  return checkpoint


@pytest.mark.parametrize("saves", [2, 8], ids=["first pass", "second pass"])
def test_an_interrupted_fit_goes_on_to_bitwise_the_same(model, whole, tmp_path, monkeypatch, saves):
  """21 pairs in batches of 4: each pass makes six batches and, saving after each, six saves."""
  done = []
  save = PartialSums.save

  def count_saves(self, rows_done, sums):
    save(self, rows_done, sums)
    done.append(rows_done)
    if len(done) == saves:
      raise twins.Killed

  monkeypatch.setattr(PartialSums, "save", count_saves)
  with pytest.raises(twins.Killed):
    fitted(model, checkpoint=Checkpointing(tmp_path, every=1))
  resumed = fitted(model, checkpoint=Checkpointing(tmp_path, every=1))
  assert len(done) == 12 and done[-1] == NUM * DRAWS  # no batch was computed twice
  for name, basis in whole.bases.items():
    for part in ("q_in", "q_out", "eigenvalues"):
      np.testing.assert_array_equal(getattr(resumed.bases[name], part), getattr(basis, part))


def test_shampoo_is_the_same_on_two_devices_in_parts_and_after_an_interruption(
  model, tmp_path, monkeypatch
):
  """Killed in the first pass over the first of two layers, whose sums are of whole gradients."""
  save = PartialSums.save

  def save_and_stop(self, rows_done, sums):
    save(self, rows_done, sums)
    raise twins.Killed

  how = {"partitions": 2, "devices": jax.local_devices()}
  how["checkpoint"] = Checkpointing(tmp_path, every=2)
  monkeypatch.setattr(PartialSums, "save", save_and_stop)
  with pytest.raises(twins.Killed):
    fitted(model, Shampoo(), **how)
  monkeypatch.setattr(PartialSums, "save", save)
  assert_equal_blocks(fitted(model, Shampoo(), **how), fitted(model, Shampoo()))


@pytest.mark.parametrize(
  ("change", "difference"),
  [
    ({"seed": 5}, "seed: 4 → 5"),
    ({"examples": {"random_flip": True}}, "random_flip: False → True"),
    ({"examples": {"ids": np.arange(NUM)}}, "inputs: "),
  ],
)
def test_sums_of_other_settings_are_refused(model, left, change, difference):
  if "examples" in change:
    change = {"examples": uint8_images(**change["examples"])}
  with pytest.raises(StaleArtifact, match=difference):
    fitted(model, KFAC(), checkpoint=left, **change)


def test_exact_targets_of_a_large_network_are_refused_with_what_they_would_cost():
  images = Examples(np.zeros((1000, 64, 64, 1), np.uint8))
  with pytest.raises(ValueError, match=r"4,096 outputs of 100,000 pairs: about \d\.\de\+1[4-6]"):
    fit_curvature(nets.conv_model(), images, KFAC(fisher="exact"), draws=Draws(100))


def test_exact_targets_that_do_not_fit_in_memory_are_refused_with_a_batch_that_does():
  """12,288 outputs a pair: 0.6 GB for themselves, and 3.3 times as much at the layers' outputs."""
  params = nets.random_params({"out": {"kernel": (1, 1, 3, 3), "bias": (3,)}})
  model = DiffusionModel(lambda p, x, t: nets.conv(p["out"], x), params, nets.PROCESS)
  images = Examples(np.zeros((20, 64, 64, 3), np.uint8))
  with pytest.raises(ValueError, match=r"12,288 outputs of 20 pairs.*22\.5 GiB.*at most 7 pairs"):
    fitted(model, KFAC(fisher="exact"), images, draws=1, batch_size=32)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"skip": "first"}, r"write skip=\('first',\)"),
    ({"skip": ("third",)}, "skip: 'third' finds no parameter"),
    ({"partitions": 0}, "partitions must be at least 1"),
    ({"decompose": "cloud"}, "there are: host, devices"),
    ({"draws": Draws.until_stable()}, "a fixed number of draws"),
  ],
)
def test_bad_arguments_are_refused(model, change, message):
  with pytest.raises(ValueError, match=message):
    fit_curvature(model, uint8_images(), **change)


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    (KFAC, {"samples": 0}, "samples must be at least 1"),
    (EKFAC, {"samples": 2, "fisher": "empirical"}, "samples counts model-sampled targets"),
    (KFAC, {"approx": "both"}, "there are: expand, reduce"),
    (Diagonal, {"fisher": "true"}, "there are: mc, empirical, exact"),
  ],
)
def test_bad_kinds_are_refused(kind, fields, message):
  with pytest.raises(ValueError, match=message):
    kind(**fields)


def linear_model(scale: float) -> DiffusionModel:
  """`scale` times the best linear estimate of the noise for data around zero."""
  process = Process.epsilon(Schedule.linear(10, 0.01, 0.5))
  times = jnp.arange(10)
  params = {"gain": {"kernel": jnp.asarray(scale * process.levels(times)[1])[:, None]}}

  def apply_fn(params, x_t, t):
    gain = jnp.take(params["gain"]["kernel"], t, axis=0, mode="clip")
    return x_t * gain[:, :, None, None]

  return DiffusionModel(apply_fn, params, process)


@pytest.mark.parametrize(("scale", "partitions"), [(3.0, 1), (30.0, 2)])
def test_a_loss_above_that_of_predicting_zero_is_said_once(scale, partitions):
  """As a wrong process, other data or untrained parameters give."""
  with pytest.warns(
    UserWarning, match=r"mean training loss .*: worse than predicting zero"
  ) as seen:
    fitted(linear_model(scale), KFAC(), partitions=partitions)
  assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_model_that_has_learnt_something_is_not_warned_about(scale):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    fitted(linear_model(scale), KFAC())
