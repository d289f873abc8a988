"""Every measurement, what each is of, and which processes have it, for tests that hold for all."""

import numpy as np

from jaxinf.diffusion.measurements import MEASUREMENTS, Measurement
from tests import nets

# With an argument for those that take one.
OF_ALL = ("loss", "square_norm")
OF_CONTINUOUS = ("loss_at_time(0.4)",)
OF_DISCRETE = (
  *(name for name in MEASUREMENTS if name not in OF_ALL),
  "loss_at_timestep(5)",
  "weighted_loss(min_snr)",
  "journey_loss(8,5,1)",
)
NAMES = (*OF_ALL, *OF_DISCRETE)  # of a discrete process


def random_examples(
  measurement: Measurement, num: int, num_steps: int, shape=(4, 4, 1), seed: int = 0
) -> np.ndarray:
  """Data [num, …], or trajectories or predictions [num, K, …], in [-1, 1]."""
  several = {"examples": (), "trajectories": (num_steps + 1,), "predictions": (3,)}
  shape = (*several[measurement.of], *shape)
  return nets.random_images(num, shape, seed)
