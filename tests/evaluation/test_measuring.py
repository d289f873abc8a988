"""Measurements of retrained models that compare with the attributed one."""

import jax
import numpy as np

from jaxinf import DiffusionModel, Draws, Examples
from jaxinf.diffusion.measurements import MEASUREMENTS
from jaxinf.diffusion.noise import predict
from jaxinf.evaluation.measuring import measure
from tests import nets
from tests.processes import PROCESSES

NUM_STEPS = 4


def test_distances_are_from_the_attributed_model_and_zero_at_itself():
  """Every step of a trajectory once; losses measured beside them keep their targets."""
  process = PROCESSES["epsilon"]
  params = [nets.random_params(nets.VECTOR_SHAPES, seed) for seed in (0, 1)]
  model = DiffusionModel(nets.vector_net, params[0], process)
  states = nets.random_images(3, (NUM_STEPS + 1, 4))
  distance = MEASUREMENTS["trajectory_distance"]
  found = measure(
    model, params, Examples(states), {"distance": distance}, draws=Draws(NUM_STEPS, 1)
  )["distance"].values
  pairs = distance.pairs(
    process, states, jax.random.split(jax.random.key(0), (3, NUM_STEPS)), draws=Draws(NUM_STEPS, 1)
  )
  outputs = [np.float64(predict(nets.vector_net, p, pairs)) for p in params]
  expected = np.square(outputs[1] - outputs[0]).mean(axis=1).reshape(3, NUM_STEPS).mean(axis=1)
  np.testing.assert_array_equal(found[0], 0)
  np.testing.assert_allclose(found[1], expected, rtol=1e-5)  # float32 sums in another order
