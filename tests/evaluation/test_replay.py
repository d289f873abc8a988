"""Scores by replay are derivatives of what training ends with, by each example's weight."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinf import Checkpointing, Compute, Draws, Examples
from jaxinf.attribution.kernels import QUERY
from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.noise import noised
from jaxinf.evaluation import replay
from jaxinf.evaluation.replay import ReplayTraining, replay_scores
from jaxinf.networks import training
from jaxinf.networks.training import TrainConfig
from tests import nets, twins
from tests.processes import PROCESSES

PROCESS = PROCESSES["epsilon_min_snr"]  # whose weights count in every loss
# Half of the six gradients are longer than clip_norm; epochs end within batches.
CONFIG = TrainConfig(
  steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=1, decay="cosine", weight_decay=0.1,
  clip_norm=0.35, ema_max_decay=0.6, ema_warmup_power=0.75, checkpoint_every=6, log_every=1,
)  # fmt: skip
SEED = 3
DRAWS = Draws(4, 1)
QUERIES = Examples(nets.random_images(3, seed=1))
ONE = Compute(devices=jax.local_devices()[:1])


@pytest.fixture(scope="module")
def run(mlp):
  return ReplayTraining(mlp, PROCESS, CONFIG, SEED)


@pytest.fixture(scope="module")
def scores(run, dataset):
  """In float64."""
  return scores_of(run, dataset, x64=True)


def scores_of(run, dataset, compute=ONE, **how):
  train = dataset.examples
  return replay_scores(
    run, queries=QUERIES, train=train, query_draws=DRAWS, compute=compute, **how
  ).values


def drawn(dataset, examples):
  """What each step's batch becomes: pairs [T, B, …], in float32."""
  places = np.arange(CONFIG.batch_size, dtype=np.uint32)

  @jax.jit
  def one(step, data):
    keys = fold_in_each(jax.random.fold_in(stream(SEED, "train"), step), places)
    return noised(PROCESS, data, keys, dataset.examples.augmentation)

  steps = [one(step, dataset.images[batch]) for step, batch in enumerate(examples)]
  return jax.tree.map(lambda *x: np.stack(x), *steps)


def measured(mlp, dataset, weights):
  """Measurements [V, Q] after training with weights [V, N]: plain Optax, in float64."""
  batches = training.Batches(len(dataset), CONFIG.batch_size, SEED)
  examples = np.stack([batches.examples(t, np.arange(4)) for t in range(CONFIG.steps)])
  start = training.init_state(mlp, dataset.examples, CONFIG, SEED).params
  asked = twins.pairs_of(types.SimpleNamespace(process=PROCESS), QUERIES, QUERY, DRAWS)
  asked = jax.tree.map(lambda *x: np.stack(x), *asked)
  transform = training.optimiser(CONFIG)

  def errors(params, pairs):
    outputs = mlp.apply({"params": params}, pairs.inputs, pairs.time)
    return twins.weighted_errors(outputs, pairs)

  def trained(weights, start, pairs, asked):
    def step(carry, given):
      params, ema, state, t = carry
      pairs, batch = given
      loss = lambda p: jnp.sum(weights[batch] * errors(p, pairs)) / CONFIG.batch_size
      updates, state = transform.update(jax.grad(loss)(params), state, params)
      params = optax.apply_updates(params, updates)
      decay = training.ema_decay(t, CONFIG.ema_max_decay, CONFIG.ema_warmup_power)
      ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
      return (params, ema, state, t + 1), None

    first = start, start, transform.init(start), jnp.zeros((), jnp.int32)
    (_, ema, _, _), _ = jax.lax.scan(step, first, (pairs, examples))
    return jax.vmap(lambda pairs: errors(ema, pairs).mean())(asked)

  everyone = jax.vmap(trained, in_axes=(0, None, None, None))
  return twins.in_float64(everyone, weights, start, drawn(dataset, examples), asked)


def test_scores_are_finite_differences_of_trained_models(mlp, dataset, scores):
  """−N ∂m/∂w of each example, by four models each: an error of the fourth order in the step."""
  num, step = len(dataset), 1e-3
  offsets = np.array([-2, -1, 1, 2]) * step
  weights = np.ones((4, num, num)) + offsets[:, None, None] * np.eye(num)
  values = measured(mlp, dataset, weights.reshape(-1, num)).reshape(4, num, -1)
  slopes = np.einsum("onq,o->qn", values, np.array([1, -8, 8, -1]) / (12 * step))
  # Scores are kept in float32.
  np.testing.assert_allclose(scores, -num * slopes, rtol=0, atol=1e-6 * np.abs(scores).max())


def test_scores_do_not_depend_on_segments_chunks_or_devices(run, dataset, scores):
  """Three queries, of which two are on two devices at a time."""
  compute = Compute(devices=jax.local_devices()[:2], query_chunk=2)
  found = scores_of(run, dataset, compute, x64=True, segment=4)
  # Sums of float64 in another order, kept in float32.
  np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-7 * np.abs(scores).max())
  for segment in (1, 6):
    np.testing.assert_array_equal(scores_of(run, dataset, x64=True, segment=segment), scores)


def test_a_replay_ends_where_training_did(mlp, run, dataset, scores):
  state = training.fit(mlp, PROCESS, dataset.examples, CONFIG, seed=SEED, devices=ONE.devices)
  trained = dataclasses.replace(run, params=state.ema_params)
  found = replay_scores(
    trained, queries=QUERIES, train=dataset.examples, query_draws=DRAWS, compute=ONE
  )
  assert found.settings["distance"] == 0  # the same program on the same numbers
  # Float32, through six steps of Adam and back.
  np.testing.assert_allclose(found.values, scores, rtol=0, atol=1e-3 * np.abs(scores).max())
  with pytest.raises(ValueError, match="The replay ends at a relative distance of"):
    scores_of(dataclasses.replace(trained, seed=4), dataset)


def test_a_killed_replay_goes_on_from_its_last_segment(run, dataset, scores, tmp_path, monkeypatch):
  kept = dataclasses.replace(ONE, checkpoint=Checkpointing(tmp_path))
  back, begun = replay._Loop.back, []

  def killed_at_second(self, cotangents, states, size):
    begun.append(min(states))
    if len(begun) == 2:
      raise twins.Killed
    return back(self, cotangents, states, size)

  monkeypatch.setattr(replay._Loop, "back", killed_at_second)
  with pytest.raises(twins.Killed):
    scores_of(run, dataset, kept, x64=True, segment=2)
  found = scores_of(run, dataset, kept, x64=True, segment=2)
  assert begun == [4, 2, 2, 0]
  np.testing.assert_array_equal(found, scores)


def test_bad_input_is_refused(run, dataset):
  with pytest.raises(ValueError, match="segment must be at least 1"):
    scores_of(run, dataset, segment=0)
  with pytest.raises(ValueError, match="do not match training examples"):
    replay_scores(run, queries=Examples(nets.random_images(2, (3, 3, 1))), train=dataset.examples)
