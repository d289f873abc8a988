"""Retraining against a minimal training loop: steps a second, models an hour, one or many at once.

The minimal loop is one jitted step (value_and_grad, AdamW with clipping, EMA) on batches that lie
on the device already, with its draws of (t, ε); nothing else. Rounds of all of them alternate, so
that what else the machine does falls on all alike.
"""

import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from jaxinf.benchmark.retraining import train_config
from jaxinf.diffusion.noise import losses, noised
from jaxinf.networks import training
from jaxinf.networks.retraining import Member, Retraining
from jaxinf.runs.config import typed
from jaxinf.runs.run import Run

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits_mlp.py", "The experiment.")
AT_ONCE = flags.DEFINE_list("at_once", ["1", "4", "20"], "Models on a device at once.")
STEPS = flags.DEFINE_integer("steps", 200, "Of a round.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "After one that compiles.")


def minimal_loop(run: Run, config, examples: np.ndarray):
  """() → seconds for config.steps plain steps on a subset."""
  model, process = run.model, run.process
  transform = training.optimiser(config)
  images = jnp.asarray(run.dataset.images[examples])
  order = np.random.default_rng(0)
  batches = jnp.asarray(
    np.stack([order.permutation(len(examples))[: config.batch_size] for _ in range(config.steps)])
  )
  start = training.init_state(model, run.train, config, 1)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def step(params, ema, opt_state, images, batch, key, number):
    keys = jax.random.split(jax.random.fold_in(key, number), config.batch_size)
    pairs = noised(process, images[batch], keys)

    def loss(params):
      outputs = model.apply({"params": params}, pairs.inputs, pairs.time)
      return jnp.mean(losses(outputs, pairs))

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = transform.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = optax.incremental_update(params, ema, 1 - config.ema_max_decay)
    return params, ema, opt_state, value

  def seconds() -> float:
    copy = functools.partial(jax.tree.map, jnp.array)
    params, ema, opt_state = copy(start.params), copy(start.params), copy(start.opt_state)
    key = jax.random.key(0)
    jax.block_until_ready(params)
    began = time.perf_counter()
    for number in range(config.steps):
      params, ema, opt_state, value = step(
        params, ema, opt_state, images, batches[number], key, number
      )
    jax.block_until_ready(value)
    return time.perf_counter() - began

  return seconds


def main(argv: list[str]) -> None:
  del argv
  run = Run(typed(CONFIG.value), pathlib.Path("."), devices=jax.local_devices()[:1])
  config = dataclasses.replace(
    train_config(run, run.config.retrain.steps),
    steps=STEPS.value,
    warmup_steps=1,
    log_every=100,
    checkpoint_every=10**9,
  )
  num = len(run.dataset)
  half = lambda seed: np.sort(np.random.default_rng(seed).permutation(num)[: num // 2])
  engine = Retraining(run.model, run.process, run.train, config, run.devices)
  sizes = [int(size) for size in AT_ONCE.value]
  minimal = minimal_loop(run, config, half(0))

  def together(size: int) -> float:
    members = [Member(half(seed)) for seed in range(size)]
    engine.start(size, 1)  # initial weights are not part of a step
    began = time.perf_counter()
    engine.fit(members, seed=1, label=None)
    return time.perf_counter() - began

  for size in sizes:
    together(size)
  minimal()
  rounds = [(minimal(), *map(together, sizes)) for _ in range(ROUNDS.value)]
  plain, *others = zip(*rounds, strict=True)
  rate = lambda seconds, size=1: statistics.median(STEPS.value * size / s for s in seconds)
  print(f"{'':<22}{'model steps/s':>14}{'÷ minimal loop':>16}{'models/hour':>13}")
  hour = lambda steps: 3600 * steps / run.config.retrain.steps
  print(f"{'minimal loop':<22}{rate(plain):>14.1f}{1:>16.2f}{hour(rate(plain)):>13.0f}")
  for size, seconds in zip(sizes, others, strict=True):
    ratio = statistics.median(p * size / s for p, s in zip(plain, seconds, strict=True))
    steps = rate(seconds, size)
    print(f"{f'{size} at once':<22}{steps:>14.1f}{ratio:>16.2f}{hour(steps):>13.0f}")


if __name__ == "__main__":
  app.run(main)
