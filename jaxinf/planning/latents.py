"""What the stages before training of a model of latents take."""

from collections.abc import Iterator

from jaxinf.data.moments_file import BLOCK_ROWS
from jaxinf.planning.cost import StageCost
from jaxinf.planning.line import OFTEN, cost_of
from jaxinf.planning.reduced import Subject, examples_of_batches, num_bytes
from jaxinf.runs.latents import preparations
from jaxinf.runs.stage import STAGES


def latent_costs(subject: Subject) -> Iterator[StageCost]:
  """Of the stages that this run has, in order."""
  for name in preparations(subject.run):
    yield _COSTS[name](subject)


def autoencoder_cost(subject: Subject) -> StageCost:
  """Steps of training, and the state that they change: parameters and two moments of Adam."""
  config = subject.run.config.vae
  often = {**OFTEN, "checkpoint_every": config.steps}
  run = subject.reduced("train-vae", config.batch_size, vae=often)
  with subject.rehearsal(run) as found:
    STAGES["train-vae"].function(run)
  written, saves = num_bytes(run.autoencoder.params), -(-config.steps // config.checkpoint_every)
  return cost_of(
    subject, "train-vae", config.steps, "steps", found,
    written=saves * 3 * written,
    device={"state": 2 * written, "gradients": written},
    host={"state": 3 * written},
    disk={"checkpoints": min(2, saves) * 3 * written, "parameters": written},
  )  # fmt: skip


def encode_cost(subject: Subject) -> StageCost:
  """All images through the encoder, and their mirror images where training mirrors them."""
  config, num = subject.run.config.latent, len(subject.run.dataset)
  # Fewer than a block of rows: they go through the encoder in one call, by which they are known.
  few = min(examples_of_batches(config.batch_size, 1), BLOCK_ROWS - 2)
  run = subject.reduced("encode", few)
  with subject.rehearsal(run) as found:
    STAGES["encode"].function(run)
  moments = subject.images_bytes
  return cost_of(
    subject, "encode", num, "images", found,
    written=moments,
    device={"parameters": num_bytes(run.autoencoder.params)},
    host={},
    disk={"moments": moments},
  )  # fmt: skip


_COSTS = {"train-vae": autoencoder_cost, "encode": encode_cost}
