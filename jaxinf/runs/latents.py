"""The stages before training of a model of latents: an autoencoder, and the images' moments."""

import logging
from typing import Any

import flax.traverse_util
import numpy as np

from jaxinf.data.moments_file import MomentsFile
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.networks import autoencoder_training as training
from jaxinf.networks import num_params
from jaxinf.networks.latent_cache import encode_moments
from jaxinf.networks.training import Hooks, NonFiniteLoss
from jaxinf.runs.run import TRAINED, Run, moments_folder

_LOG = logging.getLogger("jaxinf")


def preparations(run: Run) -> tuple[str, ...]:
  """The stages that come before train, for this run."""
  if not run.is_latent:
    return ()
  return ("train-vae", "encode") if run.config.latent.autoencoder == TRAINED else ("encode",)


def train_autoencoder(run: Run) -> Outcome:
  """Trains the autoencoder, from its last checkpoint on; the arrays are its parameters."""
  config, folder, seed = run.config.vae, run.folder("train-vae"), run.config.seed
  images = run.dataset.examples
  if len(images.shape) != 3:
    raise ValueError(f"Autoencoders are of images [N, H, W, C]; these data are {images.shape}.")
  module = training.module_of(config, images.shape[-1])
  state = training.init_autoencoder(module, config, seed, images.shape)
  checkpoints = artifacts.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
    _LOG.info("train-vae: resuming from the checkpoint at step %d", step)
  log = artifacts.MetricsLog(folder, step or 0)
  try:
    hooks = Hooks(save=checkpoints.save, log=log.write)
    state = training.fit_autoencoder(
      module, images, config, seed=seed, state=state, hooks=hooks, devices=run.devices
    )
  except NonFiniteLoss as error:
    raise ValueError(f"{error} Lower vae.learning_rate.") from error
  finally:
    checkpoints.close()
    log.close()
  found = training.scaled_autoencoder(module, state.params, images.data)
  arrays = flax.traverse_util.flatten_dict(state.params, sep="/")
  notes = {"scaling_factor": found.scaling_factor, "last_metrics": log.last()}
  return arrays, notes, f"an autoencoder of {num_params(state.params):,} parameters"


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
