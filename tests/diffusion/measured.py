"""Every measurement, what each is of, and which processes have it, for tests that hold for all."""

import numpy as np

from jaxinf.diffusion.measurements import MEASUREMENTS, Measurement
from tests import nets

# With an argument for those that take one.
OF_ALL = ("loss", "square_norm")
OF_CONTINUOUS = ("loss_at_time(0.4)", "loss_in_band(0.25,0.5)")
# It has no gradient at the attributed model, and is tested by itself.
OF_RETRAINED = ("trajectory_distance",)
OF_DISCRETE = (
  *(name for name in MEASUREMENTS if name not in (*OF_ALL, *OF_RETRAINED)),
  "loss_at_timestep(5)",
  "loss_in_band(2,7)",
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
