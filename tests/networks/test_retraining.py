"""Models trained together are those that training alone gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.augmentation import Augmentation
from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.noise import noised
from jaxinf.networks import training
from jaxinf.networks.retraining import Member, Retraining
from jaxinf.networks.training import TrainConfig
from tests.processes import PROCESSES

PROCESS = PROCESSES["epsilon_min_snr"]  # whose weights count in every loss

CONFIG = TrainConfig(
  steps=7, batch_size=4, learning_rate=1e-2, warmup_steps=1, decay="cosine", weight_decay=0.01,
  clip_norm=1.0, ema_max_decay=0.9, ema_warmup_power=0.75, checkpoint_every=3, log_every=2,
)  # fmt: skip
MEMBERS = [Member(np.array(e)) for e in ([0, 2, 3, 5, 8], [1, 2, 4, 6, 9], [0, 1, 2, 3, 4, 5, 6])]


@pytest.fixture(scope="module")
def together(mlp, dataset):
  return Retraining(mlp, PROCESS, dataset.examples, CONFIG, jax.local_devices()[:1])


@pytest.fixture(scope="module")
def states(together):
  return together.fit(MEMBERS, seed=3, label=None)


def member(states, i):
  return jax.tree.map(lambda x: x[i], states)


def assert_close(a, b):
  # The same float32 sums in the order of a vmapped and of a single matrix product, through 7 steps
  # of Adam, which divides by their square roots.
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("i", [0, 2])
def test_a_member_is_the_model_trained_alone_on_its_examples(mlp, dataset, states, i):
  alone = training.fit(
    mlp, PROCESS, dataset.examples.take(MEMBERS[i].examples), CONFIG, seed=3,
    devices=jax.local_devices()[:1],
  )  # fmt: skip
  together = member(states, i)
  assert int(together.step) == 7
  assert_close(alone.ema_params, together.ema_params)
  assert_close(alone.params, together.params)


def test_members_do_not_depend_on_devices_or_company(mlp, dataset, states):
  """Three models on two devices: two each, the last place a repetition."""
  on_two = Retraining(mlp, PROCESS, dataset.examples, CONFIG, jax.local_devices()[:2])
  found = on_two.fit([MEMBERS[2], MEMBERS[0], MEMBERS[1]], seed=3, label=None)
  for i, j in enumerate((2, 0, 1)):
    assert_close(member(found, i).ema_params, member(states, j).ema_params)


def test_a_member_alone_is_the_same(together, states):
  alone = together.fit(MEMBERS[1:2], seed=3, label=None)
  assert_close(member(alone, 0).ema_params, member(states, 1).ema_params)


def test_an_interrupted_group_ends_alike(together, states):
  saved = {}
  hooks = training.Hooks(save=lambda step, state: saved.update({step: state}))
  together.fit(MEMBERS, seed=3, hooks=hooks, label=None)
  assert sorted(saved) == [3, 6]
  resumed = together.fit(MEMBERS, seed=3, state=saved[3], label=None)
  # Bitwise: the same program on the same numbers.
  for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(states), strict=True):
    np.testing.assert_array_equal(x, y)


def test_weights_weigh_losses_and_gradients_but_not_their_number(mlp, dataset):
  """Σ w ∇ℓ, Σ w ℓ and Σ mask against sums by hand, of one example at a time."""
  mask = np.array([1, 1, 0, 1, 1], np.float32)  # one place pads the batch
  weights = np.array([1, 0.5, 1, 0, 2], np.float32)
  places = np.arange(5, dtype=np.uint32)
  state = training.init_state(mlp, dataset.examples, CONFIG, seed=3)
  keys = fold_in_each(jax.random.fold_in(stream(3, "train"), 0), places)

  @jax.jit
  def loss_of(params, image, key):
    """The process's loss of one example, at its place's flip, t and ε."""
    pair = noised(PROCESS, Augmentation(random_flip=True).data(image[None], key[None]), key[None])
    errors = (mlp.apply({"params": params}, pair.inputs, pair.time) - pair.target) ** 2
    return PROCESS.weights(pair.t)[0] * jnp.mean(errors)

  alone = [
    jax.value_and_grad(loss_of)(state.params, *pair)
    for pair in zip(dataset.images[:5], keys, strict=True)
  ]
  by_hand = lambda *parts: sum(
    float(w) * np.float64(part) for w, part in zip(mask * weights, parts, strict=True)
  )
  loss, gradients = jax.tree.map(by_hand, *alone)
  sums, _ = training.train_step(
    mlp, PROCESS, CONFIG, augmentation=Augmentation(random_flip=True), seed=3
  )
  rows = training.TrainRows(dataset.images[:5], places, mask, weights)
  found, total, count = sums(state, rows)
  assert count == 4
  # Float32 products, of one example or of five, and sums over the examples in float64 or not.
  np.testing.assert_allclose(total, loss, rtol=1e-6)
  for ours, expected in zip(*map(jax.tree.leaves, (found, gradients)), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_weights_are_by_position_in_the_data_set(together):
  """Weights 1 for a member's own examples, whatever they are for others, are as good as none."""
  examples = MEMBERS[0].examples
  weights = np.where(np.isin(np.arange(10), examples), 1.0, 0.0)
  weighted, plain = (
    together.fit([Member(examples, w)], seed=3, label=None) for w in (weights, None)
  )
  assert_close(weighted.ema_params, plain.ema_params)


def test_bad_input_is_refused(together):
  with pytest.raises(ValueError, match="at least one training example"):
    together.fit([Member(np.array([], int))], seed=0)
  with pytest.raises(ValueError, match="at least one training example"):
    together.fit([], seed=0)


def test_a_member_that_diverges_stops_all(mlp, dataset):
  config = dataclasses.replace(CONFIG, learning_rate=1e38, clip_norm=1e9)
  with pytest.raises(training.NonFiniteLoss):
    Retraining(mlp, PROCESS, dataset.examples, config).fit(MEMBERS, seed=0, label=None)
