"""Training of a network on the loss of its process: AdamW, EMA; the loop that resumes exactly.

The batch of a step, its draws of (t, ε), flips and dropout follow from (seed, step) alone, so an
interrupted run that resumes from a checkpoint ends with the same parameters. EMA parameters are
the model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinf import engine
from jaxinf.core.arrays import read_rows
from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.examples import Examples
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.types import Array, Params, PyTree
from jaxinf.diffusion.noise import losses, noised, predict
from jaxinf.diffusion.process import Process
from jaxinf.engine import processes, rehearsal
from jaxinf.engine.progress import Progress
from jaxinf.networks import apply_fn_of

# Steps that the host may be ahead of the devices. More gain nothing, and with hundreds of them CPU
# devices that wait for each other's sums have been seen to run out of threads.
_MOST_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Settings of the optimisation; the defaults are the paper's for CIFAR-10.

  Attributes:
    steps: updates of the parameters.
    batch_size: examples in a step.
    learning_rate: the peak.
    warmup_steps: of the linear rise from 0 to the peak.
    decay: after it, "cosine" (to zero) or "constant".
    weight_decay: of AdamW.
    clip_norm: global norm that gradients are clipped to.
    ema_max_decay, ema_warmup_power: see `ema_decay`.
    conditioning_dropout: share of draws in which the conditioning is left out, for guidance.
    checkpoint_every, log_every: steps between checkpoints, and between lines of the log.
    num_models: trained on all examples with seeds of their own, each by a call of `fit`.
  """

  steps: int = 160_000
  batch_size: int = 128
  learning_rate: float = 1e-4
  warmup_steps: int = 16_000
  decay: str = "constant"
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  ema_max_decay: float = 0.999
  ema_warmup_power: float = 0.75
  # Not part of the keys of results while it has this value, which gave those before it came.
  conditioning_dropout: float = dataclasses.field(default=0.0, metadata={"before": 0.0})
  checkpoint_every: int = 5_000
  log_every: int = 100
  num_models: int = 1


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes."""

  step: jax.Array  # [] int32, steps done
  params: Params
  ema_params: Params
  opt_state: optax.OptState


@flax.struct.dataclass
class TrainRows:
  """Rows of one step: examples with their place in the step's batch, which their draws follow."""

  data: Array  # [B, …]
  places: Array  # [B] uint32
  mask: Array  # [B]
  weights: Array | None = None  # [B] of the examples in the loss; None: 1
  conditioning: PyTree = None  # of arrays [B, …]; None where the network takes nothing else


def learning_rate(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then cosine to 0 or constant."""
  if not 0 <= config.warmup_steps < config.steps:
    raise ValueError(
      f"train.warmup_steps ({config.warmup_steps}) must be below train.steps ({config.steps})."
    )
  peak, warmup = config.learning_rate, config.warmup_steps
  if config.decay == "cosine":
    after = optax.cosine_decay_schedule(peak, config.steps - warmup)
  elif config.decay == "constant":
    after = optax.constant_schedule(peak)
  else:
    raise ValueError(f"train.decay must be cosine or constant; got {config.decay!r}.")
  # Joined even for the constant: without warm-up, a linear schedule alone would stay at 0.
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW (0.9, 0.999) on gradients clipped to a global norm."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(learning_rate(config), weight_decay=config.weight_decay),
  )


def ema_decay(step: jax.Array, max_decay: float, power: float) -> jax.Array:
  """min(max_decay, 1 − (1 + step)^(−power)) for the update after `step` steps (from 0)."""
  return jnp.minimum(max_decay, 1 - (1.0 + step) ** -power)


def init_state(network: nn.Module, train: Examples, config: TrainConfig, seed: int) -> TrainState:
  """Initial parameters from the seed; the EMA starts there.

  Args:
    network: a module of jaxinf.networks.
    train: the training examples, of which shapes and types count.
    config: settings of the optimisation.
    seed: of the parameters.

  Raises:
    ValueError: impossible settings.
  """
  check_counts(config, "train")
  variables = jax.jit(network.init)(stream(seed, "init"), *example_inputs(train))
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=params,
    opt_state=optimiser(config).init(params),
  )


def example_inputs(train: Examples) -> tuple:
  """Zeros in the shapes of what a network is given of an example: data, time, conditioning."""
  inputs = jnp.zeros((1, *train.shape)), jnp.zeros(1, jnp.int32)
  if train.conditioning is None:
    return inputs
  zeros = lambda struct: jnp.zeros((1, *struct.shape), struct.dtype)
  return *inputs, jax.tree.map(zeros, train.conditioning_structs)


def train_step(
  network: nn.Module,
  process: Process,
  config: TrainConfig,
  *,
  augmentation: Augmentation = PLAIN,
  seed: int | jax.Array,
) -> tuple[Callable, Callable]:
  """The two halves of a step: sums over rows, and the update from their totals.

  With w = mask · weights, sums(state, rows) → (Σ w · ∇ℓ, Σ w · ℓ, Σ mask), and
  update(state, totals) → (state, metrics); ℓ is the loss of the process, its own weights included.
  The seed may be traced.
  """
  losses_of = step_losses(network, process, augmentation=augmentation, seed=seed)

  def total_loss(params, step, rows):
    each = losses_of(params, step, rows)
    return jnp.sum(rows.mask * each if rows.weights is None else rows.mask * rows.weights * each)

  def sums(state, rows):
    loss, grads = jax.value_and_grad(total_loss)(state.params, state.step, rows)
    return grads, loss, jnp.sum(rows.mask)

  return sums, step_update(optimiser(config), config)


def step_losses(
  network: nn.Module,
  process: Process,
  *,
  augmentation: Augmentation = PLAIN,
  seed: int | jax.Array,
) -> Callable:
  """losses_of(params, step, rows) → the losses ℓ [B] of a step's examples, without weights.

  What is drawn is float32 whatever JAX's mode: under x64 the same keys would give other numbers.
  """
  own = apply_fn_of(network, process)

  def losses_of(params, step, rows):
    with jax.enable_x64(False):
      key = jax.random.fold_in(stream(seed, "train"), step)
      keys = fold_in_each(key, rows.places)
      dropout = {"dropout": jax.random.fold_in(stream(seed, "dropout"), step)}
      pairs = noised(process, rows.data, keys, augmentation)
      given = augmentation.conditioning(rows.conditioning, keys)

    def apply_fn(params, inputs, time, *given):
      return own(params, inputs, time, *given, dropout_ids=rows.places, rngs=dropout)

    pairs = pairs._replace(conditioning=given)
    return losses(predict(apply_fn, params, pairs), pairs)

  return losses_of


def step_update(transform: optax.GradientTransformation, config: TrainConfig) -> Callable:
  """update(state, totals) → (state, metrics): AdamW by `transform`, and the EMA; see train_step."""

  def update(state, totals):
    grads, loss, count = totals
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, config.ema_max_decay, config.ema_warmup_power)
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    metrics = {"loss": loss / count, "grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, ema_params, opt_state), metrics

  return update


class NonFiniteLoss(ValueError):
  """Training met a loss, or a gradient of it, that is infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What the loop tells the outside: both are called with host values."""

  save: Callable[[int, TrainState], Any] = lambda step, state: None
  log: Callable[[int, dict[str, float]], Any] = lambda step, metrics: None


def fit(
  network: nn.Module,
  process: Process,
  train: Examples,
  config: TrainConfig,
  *,
  seed: int,
  state: TrainState | None = None,
  hooks: Hooks = Hooks(),
  stop_after: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> TrainState:
  """Trains from `state` (from scratch where None) to config.steps; returns the final state.

  Args:
    network: a module of jaxinf.networks.
    process: how examples are noised, what the network predicts, and the weights of its loss.
    train: the training examples.
    config: optimisation settings.
    seed: of initialisation, batches, draws, flips and dropout.
    state: where to go on from.
    hooks: save is called every config.checkpoint_every steps and at the end, log every
      config.log_every steps.
    stop_after: stop once that many steps are done in all (an interruption, for tests).
    devices: local devices; all of them where None.

  Raises:
    NonFiniteLoss: with the step; states saved before it are sound.
    ValueError: a number of steps or examples in `config` is below 1.
  """
  state = init_state(network, train, config, seed) if state is None else state
  halves = train_step(network, process, config, augmentation=train.augmentation, seed=seed)
  return optimised(
    halves,
    state,
    train,
    config,
    seed=seed,
    label="train",
    hooks=hooks,
    stop_after=stop_after,
    devices=devices,
  )


def optimised(
  halves: tuple[Callable, Callable],
  state: Any,
  train: Examples,
  config: Any,
  *,
  seed: int,
  label: str,
  hooks: Hooks,
  stop_after: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Any:
  """The loop of every training: steps from state.step to config.steps on shuffled examples.

  Args:
    halves: of a step; see `train_step`.
    state: where to go on from; it has a field `step`.
    train: the training examples.
    config: with steps, batch_size, checkpoint_every and log_every.
    seed: of the batches.
    label: what the progress bar says.
    hooks, stop_after, devices: as for `fit`.
  """
  step_fn = engine.parallel_step(*halves, devices=devices)
  start = int(state.step)
  end = config.steps if stop_after is None else min(config.steps, stop_after)
  num_devices = engine.num_step_devices(devices)
  batches = Batches(len(train), config.batch_size, seed)
  replicated = engine.replicate(state, devices)
  recent: list[Any] = []  # metrics not yet looked at, so that the host need not wait each step
  trial = rehearsal.trial(label, None, end - start)

  with Progress(processes.label(label), config.steps, "steps", start) as progress:
    for step in trial.few(range(start, end)):
      rows = engine.shard_of_step(batches.rows(train, step, num_devices), devices)
      replicated, metrics = step_fn(replicated, rows)
      recent.append(metrics)
      if len(recent) > _MOST_AHEAD:
        jax.block_until_ready(recent[-1 - _MOST_AHEAD])
      done = step + 1
      saving = done % config.checkpoint_every == 0 or done == end
      if done % config.log_every == 0 or saving:
        means = checked_means([engine.first(metrics) for metrics in recent], done)
        trial.done(len(recent), batches=len(recent))
        recent.clear()
        hooks.log(done, means)
        progress.advance_to(done, f"loss {means['loss']:.4f}")
      if saving:
        hooks.save(done, engine.first(replicated))
  return engine.first(replicated)


def checked_means(recent: list[dict[str, np.ndarray]], done: int) -> dict[str, float]:
  """Means of the metrics of the last len(recent) steps, all of which must be finite."""
  for step, metrics in enumerate(recent, done - len(recent) + 1):
    if not all(np.isfinite(value).all() for value in metrics.values()):
      raise NonFiniteLoss(
        f"The loss of step {step} is {metrics['loss']} and its gradient's norm is "
        f"{metrics['grad_norm']}. Training stopped; lower train.learning_rate or train.clip_norm, "
        "or look for bad examples."
      )
  return {name: float(np.mean([m[name] for m in recent])) for name in recent[0]}


def check_counts(config: Any, section: str) -> None:
  """Raises ValueError where a count that every training has is below 1; `section` is its name."""
  for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
    if getattr(config, name) < 1:
      raise ValueError(f"{section}.{name} must be at least 1; got {getattr(config, name)}.")


@dataclasses.dataclass
class Batches:
  """The examples of each step: epochs of shuffled examples, a function of (seed, step)."""

  num_examples: int
  batch_size: int
  seed: int

  def examples(self, step: int, places: np.ndarray) -> np.ndarray:
    """Which of the examples stand at `places` in the batch of a step; beyond it, its last one."""
    positions = step * self.batch_size + np.minimum(places, self.batch_size - 1)
    epochs, offsets = np.divmod(positions, self.num_examples)
    examples = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      examples[here] = self._order(int(epoch))[offsets[here]]
    return examples

  def rows(self, train: Examples, step: int, num_devices: int = 1) -> TrainRows:
    """The rows of a step, padded to as many for each of the devices."""
    places = np.arange(-(-self.batch_size // num_devices) * num_devices)
    examples = self.examples(step, places)
    return TrainRows(
      data=read_rows(train.data, examples),
      places=places.astype(np.uint32),
      mask=(places < self.batch_size).astype(np.float32),
      conditioning=jax.tree.map(lambda x: read_rows(x, examples), train.conditioning),
    )

  def _order(self, epoch: int) -> np.ndarray:
    if getattr(self, "_epoch", None) != epoch:
      self._epoch = epoch
      self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)
    return self._permutation
