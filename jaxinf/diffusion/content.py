"""A hash of what results are computed from: work on disk is continued only where it is the same."""

import jax
import numpy as np

from jaxinf.core.arrays import fingerprint
from jaxinf.core.examples import Examples
from jaxinf.diffusion.model import DiffusionModel


def content_of(model: DiffusionModel, **examples: Examples) -> dict:
  """Parameters, process and examples, by name; all that counts but the network's code."""
  leaves = {f"params_{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(model.params))}
  arrays = leaves | {k: a for name, each in examples.items() for k, a in each.arrays(name).items()}
  return {"process": model.process.settings, "inputs": fingerprint(arrays)}
