"""One small problem that most tests of attribution share, with the curvature fitted once."""

import pytest

from jaxinf import Draws, Examples, fit_curvature, influence
from tests import nets
from tests.twins import INDEPENDENT

NUM_TRAIN, NUM_QUERIES = 11, 3
DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)


@pytest.fixture(scope="session")
def problem():
  """Arguments of `influence` but for damping: a convolutional network on 4 × 4 images."""
  train = Examples(nets.random_images(NUM_TRAIN))
  queries = Examples(nets.random_images(NUM_QUERIES, seed=1))
  with pytest.warns(UserWarning, match="worse than predicting zero"):  # the network is random
    curvature = fit_curvature(nets.conv_model(), train, draws=Draws(20))
  return dict(curvature=curvature, queries=queries, train=train)


@pytest.fixture(scope="session")
def settings():
  """Further arguments: float32 queries, four independent draws in two replicates."""
  return dict(damping=1e-3, draws=DRAWS, compression=None)


@pytest.fixture(scope="session")
def scores(problem, settings):
  return influence(**problem, **settings)
