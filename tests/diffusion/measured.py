"""Every measurement, and what each is of, for tests that hold for them all."""

import numpy as np

from jaxinf.diffusion.measurements import MEASUREMENTS, Measurement
from tests import nets

# With an argument for those that take one.
NAMES = (*MEASUREMENTS, "loss_at_timestep(5)", "weighted_loss(min_snr)", "journey_loss(8,5,1)")


def random_examples(
  measurement: Measurement, num: int, num_steps: int, shape=(4, 4, 1), seed: int = 0
) -> np.ndarray:
  """Images [num, H, W, C], or the states [num, K, H, W, C] of trajectories, in [-1, 1]."""
  if measurement.of == "trajectories":
    states = 3 if str(measurement.name).startswith("journey") else num_steps + 1
    shape = (states, *shape)
  return nets.random_images(num, shape, seed)
