"""Every measurement, and what each is of, for tests that hold for them all."""

import numpy as np

from jaxinf.diffusion.measurements import MEASUREMENTS, Measurement
from tests import nets

# With an argument for those that take one.
NAMES = (*MEASUREMENTS, "loss_at_timestep(5)", "weighted_loss(min_snr)", "journey_loss(8,5,1)")


def random_examples(
  measurement: Measurement, num: int, num_steps: int, shape=(4, 4, 1), seed: int = 0
) -> np.ndarray:
  """Images [num, H, W, C], or trajectories or predictions [num, K, H, W, C], in [-1, 1]."""
  several = {"images": (), "trajectories": (num_steps + 1,), "predictions": (3,)}
  shape = (*several[measurement.of], *shape)
  return nets.random_images(num, shape, seed)
