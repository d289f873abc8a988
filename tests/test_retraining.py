"""Models trained together are those that training alone gives."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxinf import training
from jaxinf.retraining import Member, Retraining
from jaxinf.sections import TrainConfig

CONFIG = TrainConfig(
  steps=7, batch_size=4, learning_rate=1e-2, warmup_steps=1, decay="cosine", weight_decay=0.01,
  clip_norm=1.0, ema_max_decay=0.9, ema_warmup_power=0.75, checkpoint_every=3, log_every=2,
)  # fmt: skip
MEMBERS = [Member(np.array(e)) for e in ([0, 2, 3, 5, 8], [1, 2, 4, 6, 9], [0, 1, 2, 3, 4, 5, 6])]


@pytest.fixture(scope="module")
def together(mlp, schedule, dataset):
  return Retraining(mlp, schedule, dataset, CONFIG, jax.local_devices()[:1])


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
def test_a_member_is_the_model_trained_alone_on_its_examples(mlp, schedule, dataset, states, i):
  alone = training.fit(
    mlp, schedule, dataset.take(MEMBERS[i].examples), CONFIG, seed=3,
    devices=jax.local_devices()[:1],
  )  # fmt: skip
  together = member(states, i)
  assert int(together.step) == 7
  assert_close(alone.ema_params, together.ema_params)
  assert_close(alone.params, together.params)


def test_members_do_not_depend_on_devices_or_company(mlp, schedule, dataset, states):
  """Three models on two devices: two each, the last place a repetition."""
  on_two = Retraining(mlp, schedule, dataset, CONFIG, jax.local_devices()[:2])
  found = on_two.fit([MEMBERS[2], MEMBERS[0], MEMBERS[1]], seed=3, label=None)
  for i, j in enumerate((2, 0, 1)):
    assert_close(member(found, i).ema_params, member(states, j).ema_params)


def test_an_interrupted_group_ends_alike(together, states):
  saved = {}
  hooks = training.Hooks(save=lambda step, state: saved.update({step: state}))
  together.fit(MEMBERS, seed=3, hooks=hooks, label=None)
  assert sorted(saved) == [3, 6]
  resumed = together.fit(MEMBERS, seed=3, state=saved[3], label=None)
  # Bitwise: the same program on the same numbers.
  for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(states), strict=True):
    np.testing.assert_array_equal(x, y)


def test_an_example_of_weight_nought_is_as_good_as_absent(together, dataset):
  """One step from all ten examples, of which five weigh nothing, against sums by hand."""
  weights = np.where(np.isin(np.arange(10), MEMBERS[0].examples), 1.0, 0.0)
  everyone = np.arange(10)
  none, half, full = (
    together.fit([Member(everyone, w * np.ones(10))], seed=3, label=None)
    for w in (weights, 0.5, 1.0)
  )
  plain = together.fit([Member(everyone)], seed=3, label=None)
  assert_close(full.ema_params, plain.ema_params)
  # Adam does not see the scale of a loss (but for its ε = 1e-8), nor does clipping at first.
  difference = lambda a, b: max(
    np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
  )
  assert difference(half.ema_params, plain.ema_params) < 0.3 * difference(
    none.ema_params, plain.ema_params
  )


def test_bad_input_is_refused(together):
  with pytest.raises(ValueError, match="at least one training example"):
    together.fit([Member(np.array([], int))], seed=0)
  with pytest.raises(ValueError, match="at least one training example"):
    together.fit([], seed=0)


def test_a_member_that_diverges_stops_all(mlp, schedule, dataset):
  config = dataclasses.replace(CONFIG, learning_rate=1e38, clip_norm=1e9)
  with pytest.raises(training.NonFiniteLoss):
    Retraining(mlp, schedule, dataset, config).fit(MEMBERS, seed=0, label=None)
