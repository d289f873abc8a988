"""Retraining, the referee of attribution: many models at once, each on examples of its own.

The models of one call share a seed, and with it the initial weights, the order in which batches
visit their examples, and the draws of (t, ε), flips and dropout of every place in a batch (paper,
Eq. 23: a subset is retrained with seeds k = 1 … K). What tells them apart is their examples alone.
Each device trains models of its own, several at once as one vmapped step, so that no step waits
for another device. Examples stay on the devices; a step is sent their numbers.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.core.arrays import read_rows
from jaxinf.core.examples import Examples
from jaxinf.diffusion.process import Process
from jaxinf.engine import rehearsal
from jaxinf.engine.progress import Progress
from jaxinf.networks.training import (
  Batches,
  Hooks,
  TrainConfig,
  TrainRows,
  TrainState,
  checked_means,
  init_state,
  train_step,
)

# Axes of a state of several models: the step is one for all of them, and so are its random keys,
# so that the noise of a step is drawn once, however many models it trains.
_MODELS: Any = TrainState(step=None, params=0, ema_params=0, opt_state=0)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Member:
  """One of the models that are trained together.

  Attributes:
    examples: [n] positions in the data set of the examples it trains on.
    weights: [N] of every example of the data set in the loss; None: 1.
  """

  examples: np.ndarray
  weights: np.ndarray | None = None


class Retraining:
  """Trains groups of models; compiled once for groups of one size.

  Args:
    network: a module of jaxinf.networks.
    process: how examples are noised, what the network predicts, and the weights of its loss.
    train: all examples; they are put on every device.
    config: optimisation settings of every model.
    devices: local devices; all of them where None.

  Raises:
    ValueError: impossible settings.
  """

  def __init__(
    self,
    network: nn.Module,
    process: Process,
    train: Examples,
    config: TrainConfig,
    devices: Sequence[jax.Device] | None = None,
  ):
    self._network, self._train, self._config = network, train, config
    self._devices = engine.local_devices(devices)
    self._starts: dict[int, TrainState] = {}  # of the last seed

    def step(state, rows, examples, weights, seed):
      sums, update = train_step(
        network, process, config, augmentation=train.augmentation, seed=seed
      )
      places = jnp.arange(config.batch_size, dtype=jnp.uint32)

      def one(state, examples, weights):
        own = None if weights is None else weights[examples]
        data, given = jax.tree.map(lambda x: x[examples], rows)
        batch = TrainRows(data, places, jnp.ones(config.batch_size), own, given)
        return update(state, sums(state, batch))

      if len(examples) > 1:
        together = jax.vmap(one, in_axes=(_MODELS, 0, 0), out_axes=(_MODELS, 0))
        return together(state, examples, weights)
      # One alone goes without the axis, which costs a fifth of the speed even if it has one place.
      first = lambda tree: jax.tree.map(lambda x: x[0], tree)
      with_axis = lambda tree: jax.tree.map(lambda x: x[None], tree)
      trees = (state.params, state.ema_params, state.opt_state)
      after, metrics = one(TrainState(state.step, *first(trees)), examples[0], first(weights))
      trees = with_axis((after.params, after.ema_params, after.opt_state))
      return TrainState(after.step, *trees), with_axis(metrics)

    self._step = engine.on_all(step, self._devices, donate=True)
    every = np.arange(len(train))
    rows = jax.tree.map(lambda x: read_rows(x, every), (train.data, train.conditioning))
    self._rows = engine.replicate(rows, self._devices)

  def fit(
    self,
    members: Sequence[Member],
    *,
    seed: int,
    state: TrainState | None = None,
    hooks: Hooks = Hooks(),
    label: str | None = "retrain",
  ) -> TrainState:
    """Trains one model a member for config.steps steps, all at once.

    Each equals `training.fit` with this seed on `train.take(member.examples)`, up to rounding,
    where it has no weights.

    Args:
      members: what each trains on. Each of D devices trains V = ⌈len(members) / D⌉ of them; places
        left over repeat the last.
      seed: of initialisation, order, draws, flips and dropout, of all.
      state: where to go on from, [D, V, …] as hooks.save was given it; None: from scratch.
      hooks: save is called every config.checkpoint_every steps before the last, log every
        config.log_every steps with means over the models.
      label: what the progress bar says; None for none.

    Returns:
      The final states, NumPy arrays with a leading axis of members.

    Raises:
      ValueError: no members, or one without examples.
      NonFiniteLoss: of any member.
    """
    if not members or not all(len(member.examples) for member in members):
      raise ValueError("Every model to retrain needs at least one training example.")
    config, num_devices = self._config, len(self._devices)
    num_each = math.ceil(len(members) / num_devices)
    padded = [*members, *[members[-1]] * (num_devices * num_each - len(members))]
    by_device = lambda x: x.reshape(num_devices, num_each, *x.shape[1:])
    if state is None:
      state = self.start(len(members), seed)
    weights = None
    if any(member.weights is not None for member in members):
      even = np.ones(len(self._train), np.float32)
      weights = [even if m.weights is None else m.weights.astype(np.float32) for m in padded]
      weights = by_device(np.stack(weights))
    seeds = np.full(num_devices, seed, np.uint32)
    batches = {n: Batches(n, config.batch_size, seed) for n in {len(m.examples) for m in members}}
    places, recent = np.arange(config.batch_size), []
    start = int(np.asarray(state.step)[0])
    trial = rehearsal.trial(label, None, config.steps - start)
    with Progress(label, config.steps, "steps", start) as progress:
      for step in trial.few(range(start, config.steps)):
        order = {n: each.examples(step, places) for n, each in batches.items()}
        examples = np.stack([m.examples[order[len(m.examples)]] for m in padded])
        state, metrics = self._step(
          state, self._rows, by_device(examples.astype(np.int32)), weights, seeds
        )
        recent.append(metrics)
        done = step + 1
        saving = done % config.checkpoint_every == 0 and done < config.steps
        if done % config.log_every == 0 or saving or done == config.steps:
          means = checked_means([jax.tree.map(np.asarray, metrics) for metrics in recent], done)
          trial.done(len(recent), batches=len(recent))
          recent.clear()
          hooks.log(done, means)
          progress.advance_to(done, f"loss {means['loss']:.4f}")
        if saving:
          hooks.save(done, jax.tree.map(np.asarray, state))
    steps = np.repeat(np.asarray(state.step)[:, None], num_each, axis=1)
    return jax.tree.map(
      lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: len(members)],
      dataclasses.replace(state, step=steps),
    )

  def start(self, num_members: int, seed: int) -> TrainState:
    """The states [D, V, …] that so many models begin from, all alike."""
    if seed not in self._starts:
      self._starts = {seed: init_state(self._network, self._train, self._config, seed)}
    one, devices = self._starts[seed], len(self._devices)
    num_each = math.ceil(num_members / devices)
    copies = lambda x: np.broadcast_to(x, (devices, num_each, *np.shape(x)))
    return dataclasses.replace(
      jax.tree.map(copies, one), step=np.broadcast_to(one.step, (devices,))
    )
