"""The stage `self-influence`: which training images are learned from themselves alone."""

import numpy as np

from jaxinf.attribution.self_influence import self_influence
from jaxinf.engine.artifacts import Artifact, Outcome
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.runs.run import Run, load_curvature, load_model
from jaxinf.scores.self_influence import SelfInfluence

_SHOWN = 10


def self_influences(run: Run) -> Outcome:
  """The self-influence of every training image."""
  config = run.config.self_influence
  kept = Checkpointing(run.folder("self-influence") / "sums", config.checkpoint_every)
  found = self_influence(
    load_curvature(run, load_model(run)),
    train=run.train,
    damping=config.damping,
    draws=run.draws(config.draws, config.replicates, config.design),
    compute=run.compute(config.batch_size, checkpoint=kept),
  )
  arrays = {"values": found.values, "std_errors": found.std_errors, "ids": found.ids}
  return arrays, {"settings": found.settings}, f"the self-influence of {len(found.ids)} images"


def largest(artifact: Artifact) -> str:
  """The images of the largest self-influence as aligned text."""
  found = SelfInfluence(settings=artifact.notes["settings"], **artifact.arrays)
  best = found.top(min(_SHOWN, len(found.ids)))
  rows = zip(best.ids, best.values, best.std_errors, strict=True)
  lines = [f"  {i!s:24} {v:12.5g}" + (f" ± {e:.2g}" if np.isfinite(e) else "") for i, v, e in rows]
  title = (
    "The training images that are learned from themselves most: self-influence ± standard error"
  )
  return "\n".join([title, *lines])
