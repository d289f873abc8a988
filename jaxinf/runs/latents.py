"""The stages before training of a model of latents: an autoencoder, and the images' moments."""

from typing import Any

import flax.traverse_util
import numpy as np

from jaxinf.data.moments_file import MomentsFile
from jaxinf.engine.artifacts import Outcome
from jaxinf.networks import autoencoder_training as training
from jaxinf.networks import num_params
from jaxinf.networks.latent_cache import encode_moments
from jaxinf.runs.resuming import trained
from jaxinf.runs.run import TRAINED, Run, moments_folder


def preparations(run: Run) -> tuple[str, ...]:
  """The stages that come before train, for this run."""
  if not run.is_latent:
    return ()
  return ("train-vae", "encode") if run.config.latent.autoencoder == TRAINED else ("encode",)


def train_autoencoder(run: Run) -> Outcome:
  """Trains the autoencoder, from its last checkpoint on; the arrays are its parameters."""
  config, seed, images = run.config.vae, run.config.seed, run.dataset.examples
  if len(images.shape) != 3:
    raise ValueError(f"Autoencoders are of images [N, H, W, C]; these data are {images.shape}.")
  module = run.autoencoder_module
  state = training.init_autoencoder(module, config, seed, images.shape)
  fit = lambda state, hooks: training.fit_autoencoder(
    module, images, config, seed=seed, state=state, hooks=hooks, devices=run.devices
  )
  ended = trained(run.folder("train-vae"), "train-vae", state, fit, "Lower vae.learning_rate.")
  params = ended.state.params
  found = training.scaled_autoencoder(module, params, images.data)
  arrays = flax.traverse_util.flatten_dict(params, sep="/")
  notes = {"scaling_factor": found.scaling_factor, "last_metrics": ended.last_metrics}
  return arrays, notes, f"an autoencoder of {num_params(params):,} parameters"


def encode(run: Run) -> Outcome:
  """The moments of all images, and of their mirror images where training mirrors them."""
  folder = moments_folder(run)
  moments = encode_moments(
    run.autoencoder,
    run.dataset.images,
    folder,
    mirrored=run.dataset.random_flip,
    batch_size=run.config.latent.batch_size,
    devices=run.devices,
  )
  digest = np.frombuffer(bytes.fromhex(MomentsFile.read(folder).content), np.uint8)
  mib = moments.array.nbytes / 2**20
  notes = {"scaling_factor": moments.scaling_factor, "files": ["moments"]}
  return {"digest": digest}, notes, f"moments {list(moments.shape)} ({mib:,.1f} MiB)"


def autoencoder_key(run: Run) -> dict[str, Any]:
  """What the moments depend on beside the images."""
  return {"autoencoder": run.autoencoder.fingerprint}
