"""Training resumes exactly, does not depend on devices, and follows its schedules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import networks
from jaxinf.configs.base import get_config
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.examples import Examples
from jaxinf.core.random import fold_in_each, stream
from jaxinf.data import Dataset
from jaxinf.diffusion.noise import noised
from jaxinf.engine.artifacts import Checkpoints
from jaxinf.networks import modules, training
from jaxinf.networks.training import TrainConfig
from tests.processes import PROCESSES

PROCESS = PROCESSES["epsilon"]
SHAPE = (4, 4, 1)


def settings(**changes):
  fields = dict(
    steps=6, batch_size=5, learning_rate=1e-2, warmup_steps=2, decay="cosine", weight_decay=0.01,
    clip_norm=1.0, ema_max_decay=0.6, ema_warmup_power=0.75, checkpoint_every=3, log_every=1,
  )  # fmt: skip
  return TrainConfig(**(fields | changes))


def host(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_identical(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(host(actual), host(expected), strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


class Saved:
  """Hooks that keep the states and metrics of a run."""

  def __init__(self):
    self.states, self.metrics = {}, {}
    self.hooks = training.Hooks(save=self.states.__setitem__, log=self.metrics.__setitem__)


class Dropping(nn.Module):
  """A convolution and a residual block of the U-Net, with its dropout."""

  @nn.compact
  def __call__(self, x_t, t, *, dropout_ids=None):
    time = modules.timestep_embedding(t, 4, sin_first=True, freq_shift=1.0)
    block = modules.ResnetBlock(
      4, norm_groups=2, norm_eps=1e-6, scale_shift=True, dropout=0.5, name="block"
    )
    h = block(modules.conv3x3(4, "in")(x_t), time, dropout_ids)
    return modules.conv3x3(x_t.shape[-1], "out")(h)


@pytest.fixture(scope="module")
def start():
  return training.init_state(Dropping(), Examples(np.zeros((1, *SHAPE))), settings(), seed=3)


@pytest.fixture(scope="module")
def run(dataset, start):
  """Trains the network with dropout and flips on the first so many devices."""
  assert dataset.random_flip

  def fit(num_devices, state=start, **options):
    devices = jax.local_devices()[:num_devices]
    return training.fit(
      Dropping(),
      PROCESS,
      dataset.examples,
      settings(),
      seed=3,
      state=state,
      devices=devices,
      **options,
    )

  return fit


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(run, checkpoints):
  """The state after all 6 steps on two devices, with checkpoints of steps 3 and 6 on disk."""
  saved = Checkpoints(checkpoints)
  state = run(2, hooks=training.Hooks(save=saved.save))
  saved.close()
  return state


def test_resumed_training_gives_the_same_state_bit_for_bit(run, start, uninterrupted, checkpoints):
  saved = Checkpoints(checkpoints)
  restored = saved.restore(3, like=start)
  saved.close()
  assert int(restored.step) == 3
  assert_identical(run(2, state=restored), uninterrupted)


def test_one_and_two_devices_give_the_same_state(run, start, uninterrupted):
  # Parameters move by up to 0.03 in these steps. Sums over 5 examples in another order differ by
  # 1e-7 relative, and Adam's quotients pass that on.
  for one, two, before in zip(host(run(1)), host(uninterrupted), host(start), strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert not before.size or (two != before).any()


def test_a_batch_that_devices_do_not_divide_weighs_every_example_once(mlp, dataset, devices):
  """A step's gradient is the mean over the batch of 5, whose padding to 6 counts nothing."""
  config = settings(steps=1, warmup_steps=0, clip_norm=1e9)
  saved = Saved()
  start = training.init_state(mlp, dataset.examples, config, seed=0)
  training.fit(
    mlp, PROCESS, dataset.examples, config, seed=0, state=start, hooks=saved.hooks, devices=devices
  )
  rows = training.Batches(len(dataset), 5, seed=0).rows(dataset.examples, 0)
  keys = fold_in_each(jax.random.fold_in(stream(0, "train"), 0), jnp.arange(5, dtype=jnp.uint32))
  images = Augmentation(random_flip=True).mirrored(rows.data / np.float32(127.5) - 1, keys)
  pairs = noised(PROCESS, images, keys)

  def loss(params):
    return jnp.mean((mlp.apply({"params": params}, pairs.inputs, pairs.t) - pairs.target) ** 2)

  value, grads = jax.jit(jax.value_and_grad(loss))(start.params)
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in host(grads)))
  # The same float32 numbers summed in another order.
  np.testing.assert_allclose(saved.metrics[1]["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(saved.metrics[1]["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine_to_zero(warmup):
  config = settings(steps=20, warmup_steps=warmup, learning_rate=3e-3)
  steps = np.arange(21)
  cosine = 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (20 - warmup)))
  expected = 3e-3 * np.where(steps < warmup, steps / max(warmup, 1), cosine)
  # float32: the cosine near its zero is known to 1e-7 of the peak.
  actual = [training.learning_rate(config)(step) for step in steps]
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_constant_learning_rate_stays_at_its_peak_after_the_warm_up(warmup):
  config = settings(steps=20, warmup_steps=warmup, decay="constant", learning_rate=3e-3)
  steps = np.arange(21)
  expected = 3e-3 * np.minimum(1, steps / warmup if warmup else 1)
  actual = [training.learning_rate(config)(step) for step in steps]
  np.testing.assert_allclose(actual, np.broadcast_to(expected, 21), rtol=1e-6)  # float32


def test_an_unknown_decay_names_the_valid_ones():
  with pytest.raises(ValueError, match="must be cosine or constant; got 'linear'"):
    training.learning_rate(settings(decay="linear"))


@pytest.mark.parametrize("warmup", [6, 7, -1])
def test_a_warm_up_that_does_not_end_in_the_run_is_refused(warmup):
  with pytest.raises(ValueError, match=rf"train.warmup_steps \({warmup}\) must be below"):
    training.learning_rate(settings(warmup_steps=warmup))


@pytest.mark.parametrize("field", ["steps", "batch_size", "checkpoint_every", "log_every"])
def test_counts_below_one_are_refused_by_name(mlp, dataset, field):
  with pytest.raises(ValueError, match=f"train.{field} must be at least 1; got 0"):
    training.fit(mlp, PROCESS, dataset.examples, settings(**{field: 0}), seed=0)


def test_the_ema_decay_warms_up_to_its_maximum():
  steps = np.arange(2000)
  expected = np.minimum(0.99, 1 - (1.0 + steps) ** -0.75)
  # float32 near 1.
  np.testing.assert_allclose(training.ema_decay(steps, 0.99, 0.75), expected, atol=2e-7)
  assert expected[0] == 0 and expected[-1] == 0.99


@pytest.fixture(scope="module")
def mlp_run(mlp, dataset):
  """(initial state, the states after each of 6 steps, metrics)."""
  saved = Saved()
  config = settings(checkpoint_every=1)
  start = training.init_state(mlp, dataset.examples, config, seed=0)
  training.fit(mlp, PROCESS, dataset.examples, config, seed=0, state=start, hooks=saved.hooks)
  return start, saved.states, saved.metrics


def test_an_interrupted_run_stops_in_the_state_that_others_pass_through(mlp, dataset, mlp_run):
  start, states, _ = mlp_run
  config, saved = settings(checkpoint_every=1), Saved()
  stopped = training.fit(
    mlp, PROCESS, dataset.examples, config, seed=0, state=start, hooks=saved.hooks, stop_after=4
  )
  assert list(saved.states) == [1, 2, 3, 4]
  assert_identical(stopped, states[4])


def test_the_ema_follows_the_parameters(mlp_run):
  start, states, _ = mlp_run
  means = [np.float64(leaf) for leaf in host(start.params)]  # the EMA starts there
  for step in range(6):
    decay = min(0.6, 1 - (1 + step) ** -0.75)
    params = host(states[step + 1].params)
    means = [decay * m + (1 - decay) * p for m, p in zip(means, params, strict=True)]
    for actual, expected in zip(host(states[step + 1].ema_params), means, strict=True):
      np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)  # float32


def test_states_are_saved_and_metrics_logged_at_the_declared_steps(mlp, dataset, mlp_run):
  _, _, every_step = mlp_run
  saved = Saved()
  config = settings(steps=7, checkpoint_every=3, log_every=2, decay="constant")
  state = training.fit(mlp, PROCESS, dataset.examples, config, seed=0, hooks=saved.hooks)
  assert list(saved.states) == [3, 6, 7]  # the last step as well
  assert list(saved.metrics) == [2, 3, 4, 6, 7]  # saving looks at the metrics too
  assert_identical(saved.states[7], state)
  # The warm-up of both runs is the same, so steps 1 and 2 are: a line is the mean since the last.
  mean = (every_step[1]["loss"] + every_step[2]["loss"]) / 2
  np.testing.assert_allclose(saved.metrics[2]["loss"], mean, rtol=1e-6)  # float32


def decoded(batches, step, num_devices=1):
  """The examples of a step, from images that hold their own number, and the mask."""
  num = batches.num_examples
  images = np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 1, 1, 1))
  dataset = Dataset("numbers", images, np.arange(num).astype(str))
  rows = batches.rows(dataset.examples, step, num_devices)
  np.testing.assert_array_equal(rows.places, np.arange(len(rows.places)))
  return rows.data[:, 0, 0, 0], rows.mask


@pytest.mark.parametrize("batch_size", [1, 4, 7, 17])  # of 7 examples
@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_every_epoch_visits_every_example_once(batch_size, num_devices):
  batches = training.Batches(7, batch_size, seed=1)
  visited = []
  for step in range(28):
    examples, mask = decoded(batches, step, num_devices)
    assert len(examples) % num_devices == 0 and len(examples) - batch_size < num_devices
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < batch_size)
    visited.extend(examples[mask == 1])
  epochs = np.array(visited[: len(visited) // 7 * 7]).reshape(-1, 7)
  assert (np.sort(epochs) == np.arange(7)).all()
  assert len(np.unique(epochs, axis=0)) > 1  # each in its own order


def test_a_batch_is_a_function_of_seed_and_step():
  batches = lambda seed: training.Batches(7, 4, seed)
  forward = [decoded(batches(1), step)[0] for step in range(10)]
  one = batches(1)
  for step in (9, 0, 5, 4, 5):  # in any order, from one object
    np.testing.assert_array_equal(decoded(one, step)[0], forward[step])
    np.testing.assert_array_equal(decoded(batches(1), step, 3)[0][:4], forward[step])
  assert any((decoded(batches(2), step)[0] != forward[step]).any() for step in range(10))


def test_flips_mirror_half_of_the_images_whatever_their_noise():
  keys = fold_in_each(stream(0, "test"), jnp.arange(4000))
  images = jnp.broadcast_to(jnp.arange(6.0).reshape(1, 2, 3, 1), (4000, 2, 3, 1))
  after = np.asarray(Augmentation(random_flip=True).mirrored(images, keys))
  mirrored = after[:, 0, 0, 0] == 2
  np.testing.assert_array_equal(after[mirrored], np.asarray(images[mirrored])[:, :, ::-1])
  np.testing.assert_array_equal(after[~mirrored], images[~mirrored])
  # Four standard errors of a fair coin: 4 · ½ / √4000.
  assert abs(mirrored.mean() - 0.5) < 0.032
  pairs = noised(PROCESS, images, keys)
  for sign in (*(pairs.target.reshape(4000, -1) < 0).T, pairs.t < 5):
    assert abs((mirrored == sign).mean() - 0.5) < 0.032


def test_a_non_finite_loss_stops_with_its_step(mlp, dataset, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  # The rate of step 1 is 0; step 2 makes the parameters absurd, and step 3 meets them.
  config = settings(steps=20, learning_rate=1e30, warmup_steps=3, checkpoint_every=2, log_every=100)
  with pytest.raises(training.NonFiniteLoss, match="loss of step 3 is .*learning_rate"):
    training.fit(
      mlp, PROCESS, dataset.examples, config, seed=0, hooks=training.Hooks(save=checkpoints.save)
    )
  # The last good state is on disk, and nothing after it.
  assert checkpoints.latest() == 2
  checkpoints.close()


class Kink(nn.Module):
  """Predicts √scale at scale = 0: a finite value with an infinite slope."""

  @nn.compact
  def __call__(self, x_t, t, *, dropout_ids=None):
    scale = self.param("scale", nn.initializers.zeros, ())
    return jnp.broadcast_to(jnp.sqrt(scale), x_t.shape)


def test_a_finite_loss_with_a_non_finite_gradient_is_not_saved(dataset):
  saved = Saved()
  with pytest.raises(training.NonFiniteLoss, match="step 1 .* gradient's norm is (inf|nan)"):
    training.fit(
      Kink(), PROCESS, dataset.examples, settings(checkpoint_every=1), seed=0, hooks=saved.hooks
    )
  assert not saved.states


class Probe(nn.Module):
  """Predicts 100 times a number drawn from the dropout key, and nothing with dropout off."""

  @nn.compact
  def __call__(self, x_t, t, *, dropout_ids=None):
    number = self.param("number", nn.initializers.zeros, ())
    if dropout_ids is not None:
      number = number + 100 * jax.random.uniform(self.make_rng("dropout"))
    return jnp.broadcast_to(number, x_t.shape)


def test_dropout_is_on_and_new_in_every_step(dataset):
  saved = Saved()
  training.fit(Probe(), PROCESS, dataset.examples, settings(), seed=0, hooks=saved.hooks)
  drawn = [np.sqrt(metrics["loss"]) for metrics in saved.metrics.values()]
  # What is drawn is of size 50, ε of size 1: distinct draws show, and absent ones would be 1.
  assert len(np.unique(np.round(drawn))) > 3 and max(drawn) > 30


def test_training_learns_to_tell_noise_from_a_constant_image():
  images = np.full((3, *SHAPE), 200, np.uint8)
  dataset = Dataset("constant", images, np.array(["a", "b", "c"]))
  saved = Saved()
  config = settings(
    steps=150,
    batch_size=32,
    learning_rate=1e-2,
    warmup_steps=10,
    log_every=50,
    checkpoint_every=150,
  )
  network = networks.MLP(hidden=(32,), time_features=4)
  training.fit(network, PROCESS, dataset.examples, config, seed=0, hooks=saved.hooks)
  losses = [metrics["loss"] for metrics in saved.metrics.values()]
  # Predicting nothing costs 1; ε = (x_t − √ᾱ x_0) / √(1 − ᾱ) is a function of x_t and t here.
  assert losses[-1] < 0.3


class Affine(nn.Module):
  """slope · inputs + offset, whatever the time."""

  @nn.compact
  def __call__(self, inputs, time, *, dropout_ids=None):
    slope = self.param("slope", nn.initializers.zeros, ())
    return slope * inputs + self.param("offset", nn.initializers.zeros, ())


def normal_equations(process, mean, square):
  """(M, r) of the loss E[w_t (slope · u + offset − y)²] = θᵀ M θ − 2 θᵀ r + …, in float64.

  u is the network's input and y its target; given t both are affine in x_0 and ε. The data have
  this mean and mean square.
  """
  num = 20_000
  t = process.times((jnp.arange(num, dtype=jnp.float32) + 0.5) / num)
  a, b = (np.float64(level) for level in process.levels(t))
  column = lambda values: np.float64(values)[:, 0]
  one, zero = jnp.ones((num, 1)), jnp.zeros((num, 1))
  scale, w = column(process.inputs(one, t)[0]), np.float64(process.weights(t))
  c, d = column(process.target(zero, one, t)), column(process.target(one, zero, t))
  first = np.mean(w * scale * a * mean)
  matrix = [[np.mean(w * scale**2 * (a**2 * square + b**2)), first], [first, np.mean(w)]]
  product = np.mean(w * scale * (a * d * square + b * c))
  return np.array(matrix), np.array([product, np.mean(w * d * mean)])


@pytest.mark.parametrize("name", ["v", "sample_table", "flow", "flow_logit_normal", "edm"])
def test_the_gradient_of_a_step_is_that_of_the_loss_of_each_process(name):
  """The mean over many steps' draws, at two places, against the normal equations."""
  process, num = PROCESSES[name], 1000
  images = np.random.default_rng(0).normal(0.3, 0.3, (num, *SHAPE)).astype(np.float32)
  matrix, right = normal_equations(process, images.mean(), np.mean(np.float64(images) ** 2))
  state = training.init_state(Affine(), Examples(images), settings(), seed=0)
  sums, _ = training.train_step(Affine(), process, settings(), seed=0)
  places = np.arange(num, dtype=np.uint32)
  rows = training.TrainRows(images, places, np.ones(num, np.float32))

  @jax.jit
  def gradient(theta, step):
    params = {"slope": theta[0], "offset": theta[1]}
    grads, _, count = sums(state.replace(params=params, step=step), rows)
    return jnp.stack([grads["slope"], grads["offset"]]) / count

  for theta in (np.linalg.solve(matrix, right), np.array([0.7, -0.4])):
    found = np.array([gradient(jnp.asarray(theta, jnp.float32), step) for step in range(50)])
    errors = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    expected = 2 * (matrix @ theta - right)
    # Four standard errors of 50 steps, which are small beside what a wrong weight would change.
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4 * errors)
    assert (errors < 0.02 * np.diag(matrix)).all()


def test_defaults_are_those_of_the_configs():
  assert TrainConfig(**get_config().train) == TrainConfig()
