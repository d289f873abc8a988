"""Training of autoencoders: the loss by hand, resuming to the bit, and latents of unit variance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Examples
from jaxinf.core.augmentation import PLAIN
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.networks import autoencoder_training as training
from jaxinf.networks.training import Hooks, TrainRows

CONFIG = training.AutoencoderConfig(
  channels=(2, 4),
  latent_channels=2,
  norm_groups=2,
  steps=6,
  batch_size=4,
  kl_weight=0.1,
  checkpoint_every=3,
  log_every=3,
)
MODULE = training.module_of(CONFIG, 1)


@pytest.fixture(scope="module")
def train():
  images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1)).astype(np.uint8)
  return Examples(images, random_flip=True)


def test_the_loss_is_the_squared_error_and_the_divergence_a_pixel(train):
  sums, _ = training._step(MODULE, CONFIG, PLAIN, seed=3)
  state = training.init_autoencoder(MODULE, CONFIG, 3, train.shape)
  places = np.arange(3, dtype=np.uint32)
  mask = np.array([1, 1, 0], np.float32)
  _, loss, errors, count = jax.jit(sums)(state, TrainRows(train.data[:3], places, mask))
  keys = fold_in_each(jax.random.fold_in(stream(3, "train autoencoder"), 0), places)
  expected, plain = 0.0, 0.0
  encode, decode = (
    jax.jit(functools.partial(MODULE.apply, method=method)) for method in ("encode", "decode")
  )
  for n in range(2):
    image = jnp.asarray(train.data[n], jnp.float32)[None] / 127.5 - 1
    given = {"params": state.params}
    posterior = encode(given, image)
    mean, logvar = posterior.mean, posterior.logvar
    noise = jax.random.normal(substreams(keys[n : n + 1], "posterior")[0], mean.shape[1:])
    decoded = decode(given, mean + jnp.exp(logvar / 2) * noise)
    error = np.mean(np.square(np.float64(decoded - image)))
    mean, logvar = np.float64(mean), np.float64(logvar)
    kl = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar)
    expected, plain = expected + error + 0.1 * kl / 16, plain + error
  np.testing.assert_allclose([loss, errors, count], [expected, plain, 2], rtol=1e-5)  # float32


def test_resumed_training_ends_the_same_and_learns(train):
  states, losses = {}, []
  hooks = Hooks(save=states.__setitem__, log=lambda step, means: losses.append(means["loss"]))
  how = {"seed": 1, "devices": jax.local_devices()[:1]}
  whole = training.fit_autoencoder(MODULE, train, CONFIG, hooks=hooks, **how)
  assert list(states) == [3, 6] and losses[1] < losses[0]
  resumed = training.fit_autoencoder(MODULE, train, CONFIG, state=states[3], **how)
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  found = training.scaled_autoencoder(MODULE, whole.params, train.data)
  latents = found.scaled(found.encode(train.data).mean)
  np.testing.assert_allclose(np.std(latents), 1, rtol=1e-5)


def test_counts_below_one_are_refused(train):
  config = dataclasses.replace(CONFIG, batch_size=0)
  with pytest.raises(ValueError, match="vae.batch_size must be at least 1; got 0"):
    training.fit_autoencoder(MODULE, train, config, seed=0)
