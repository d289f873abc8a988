"""Training of an autoencoder of one's own, small enough for a CPU.

  loss = mean over pixels of |x̂ − x|² + kl_weight · KL(N(mean, exp(logvar)) ‖ N(0, 1)) a pixel

with x̂ decoded from one sample of the posterior (Rombach et al. 2022, without its perceptual and
adversarial terms, which need networks of their own). The images of a step, their flips and the
samples follow from (seed, step), so that an interrupted run that resumes ends the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinf.core.augmentation import Augmentation
from jaxinf.core.examples import Examples
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.core.types import Params
from jaxinf.networks.autoencoder import AutoencoderKL
from jaxinf.networks.latents import Autoencoder
from jaxinf.networks.training import Hooks, TrainRows, check_counts, optimised

_SCALED_BY = 1_024  # images whose latents give the scaling factor


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """The autoencoder that the stage train-vae trains, and how.

  Attributes:
    channels: by level, highest resolution first; each level but the last halves the resolution.
    blocks_per_level: residual blocks of a level.
    latent_channels: of a latent.
    norm_groups: of GroupNorm.
    steps, batch_size, learning_rate: of Adam, with cosine decay to zero.
    kl_weight: of the divergence from a standard normal, in the loss of a pixel.
    checkpoint_every, log_every: steps between checkpoints, and between lines of the log.
  """

  channels: tuple[int, ...] = (32, 64, 64)
  blocks_per_level: int = 1
  latent_channels: int = 4
  norm_groups: int = 8
  steps: int = 2_000
  batch_size: int = 64
  learning_rate: float = 1e-3
  kl_weight: float = 1e-6
  checkpoint_every: int = 500
  log_every: int = 100


@flax.struct.dataclass
class AutoencoderState:
  """Everything that a step changes."""

  step: jax.Array  # [] int32, steps done
  params: Params
  opt_state: optax.OptState


def module_of(config: AutoencoderConfig, image_channels: int) -> AutoencoderKL:
  """The net of a config; ValueError where its fields do not fit."""
  return AutoencoderKL(
    in_channels=image_channels,
    out_channels=image_channels,
    channels=tuple(config.channels),
    blocks_per_level=config.blocks_per_level,
    latent_channels=config.latent_channels,
    norm_groups=config.norm_groups,
  )


def init_autoencoder(module: AutoencoderKL, config: AutoencoderConfig, seed: int, shape: tuple):
  """The state that training begins from; `shape` is that of an image."""
  check_counts(config, "vae")
  images = jnp.zeros((1, *shape))
  params = jax.jit(module.init)(stream(seed, "autoencoder"), images)["params"]
  return AutoencoderState(jnp.zeros((), jnp.int32), params, _optimiser(config).init(params))


def fit_autoencoder(
  module: AutoencoderKL,
  train: Examples,
  config: AutoencoderConfig,
  *,
  seed: int,
  state: AutoencoderState | None = None,
  hooks: Hooks = Hooks(),
  devices: Sequence[jax.Device] | None = None,
) -> AutoencoderState:
  """Trains from `state` (from scratch where None) to config.steps; returns the final state.

  Args:
    module: the net.
    train: images; random_flip counts.
    config: settings.
    seed: of initialisation, batches, flips and samples.
    state: where to go on from.
    hooks: save is called every config.checkpoint_every steps and at the end, log every
      config.log_every steps.
    devices: local devices; all of them where None.

  Raises:
    NonFiniteLoss: with the step; states saved before it are sound.
    ValueError: a number in `config` is below 1.
  """
  state = init_autoencoder(module, config, seed, train.shape) if state is None else state
  halves = _step(module, config, train.augmentation, seed)
  return optimised(
    halves, state, train, config, seed=seed, label="train-vae", hooks=hooks, devices=devices
  )


def scaled_autoencoder(module: AutoencoderKL, params: Params, images: Any) -> Autoencoder:
  """The trained autoencoder, with the scaling that gives latents of these images unit variance."""
  plain = Autoencoder(module, params, 1.0)
  num = min(len(images), _SCALED_BY)
  few = np.asarray(images[np.linspace(0, len(images) - 1, num).astype(int)])
  return Autoencoder(module, params, float(1 / np.std(plain.encode(few, batch_size=64).mean)))


def _step(
  module: AutoencoderKL, config: AutoencoderConfig, augmentation: Augmentation, seed: int
) -> tuple[Callable, Callable]:
  """The two halves of a step, as of `training.train_step`."""
  transform = _optimiser(config)

  def total_loss(params, step, rows: TrainRows):
    keys = fold_in_each(jax.random.fold_in(stream(seed, "train autoencoder"), step), rows.places)
    images = augmentation.data(rows.data, keys)
    apply: Any = lambda *given, method: module.apply({"params": params}, *given, method=method)
    posterior = apply(images, method="encode")
    latents = posterior.sample(substreams(keys, "posterior"))
    axes = tuple(range(1, images.ndim))
    errors = jnp.mean(jnp.square(apply(latents, method="decode") - images), axis=axes)
    variances = jnp.exp(posterior.logvar)
    kl = 0.5 * jnp.sum(posterior.mean**2 + variances - 1 - posterior.logvar, axis=axes)
    each = errors + config.kl_weight * kl / np.prod(images.shape[1:])
    return jnp.sum(rows.mask * each), jnp.sum(rows.mask * errors)

  def sums(state, rows):
    (loss, errors), grads = jax.value_and_grad(total_loss, has_aux=True)(
      state.params, state.step, rows
    )
    return grads, loss, errors, jnp.sum(rows.mask)

  def update(state, totals):
    grads, loss, errors, count = totals
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": loss / count,
      "squared_error": errors / count,
      "grad_norm": optax.global_norm(grads),
    }
    return AutoencoderState(state.step + 1, params, opt_state), metrics

  return sums, update


def _optimiser(config: AutoencoderConfig) -> optax.GradientTransformation:
  decay = optax.cosine_decay_schedule(config.learning_rate, config.steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(decay))
