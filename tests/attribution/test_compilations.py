"""What has been compiled is not compiled again: the second call of everything compiles nothing."""

import contextlib

import jax
import numpy as np
import pytest

import jaxinf
from jaxinf import Compute, Draws, Examples
from tests import nets
from tests.compilations import counted_compilations

DRAWS = Draws(4, 2, seed=5)

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random


@contextlib.contextmanager
def nothing_compiles():
  with counted_compilations() as found:
    yield
  assert not found


def queries(seed: int) -> Examples:
  return Examples(nets.random_images(3, seed=seed))


@pytest.fixture(scope="module")
def ask(problem):
  """influence with the defaults but for the number of draws."""

  def asked(seed: int = 1, **changes):
    settings = dict(damping=1e-3, draws=DRAWS, measurement="loss_at_timestep(5)") | changes
    return jaxinf.influence(**(problem | {"queries": queries(seed)}), **settings)

  with counted_compilations() as found:
    asked()
  assert found  # the listener hears
  return asked


@pytest.mark.parametrize(
  "change",
  [
    {"seed": 2},
    {"draws": Draws(4, 2, seed=6)},
    {"damping": 1e-2},
    {"measurement": jaxinf.loss_at_timestep(5)},
    {"compute": Compute()},
  ],
  ids=["queries", "draws", "damping", "measurement", "compute"],
)
def test_a_second_influence_of_other_numbers_compiles_nothing(ask, change):
  with nothing_compiles():
    ask(**change)


def test_other_parameters_of_a_network_compile_nothing(problem):
  """A curvature fitted again, of a model trained further, finds all programs there."""
  model, train = problem["curvature"].model, problem["train"]

  def trained_further(scale: float):
    params = jax.tree.map(lambda x: scale * x, model.params)
    curvature = jaxinf.fit_curvature(model.with_params(params), train, draws=Draws(20, seed=1))
    jaxinf.influence(
      curvature, queries=queries(3), train=train, damping=1e-3, draws=DRAWS,
      measurement="loss_at_timestep(5)",
    )  # fmt: skip

  trained_further(0.7)
  with nothing_compiles():
    trained_further(0.5)


def test_a_second_query_of_a_store_compiles_nothing(problem, tmp_path):
  store = jaxinf.build_store(
    tmp_path, problem["curvature"], train=problem["train"], draws=DRAWS, compression="int8"
  )
  first = store.query(queries(1), damping=1e-3, draws=DRAWS)
  with nothing_compiles():
    second = store.query(queries(2), damping=1e-2, draws=Draws(4, 2, seed=7))
  assert not np.allclose(first.values, second.values)


def journey_trak(model, queries, **settings):
  """Of the same states at every step."""
  states = np.repeat(queries.data[:, None], model.process.num_steps + 1, axis=1)
  return jaxinf.journey_trak(model, queries=Examples(states), timesteps=[700, 300], **settings)


@pytest.mark.parametrize("method", [jaxinf.trak, jaxinf.dtrak, jaxinf.das, journey_trak])
def test_a_second_call_of_projected_methods_compiles_nothing(problem, method):
  model, train = problem["curvature"].model, problem["train"]
  ask = lambda seed: method(
    model, queries=queries(seed), train=train, damping=1e-3, projection=8,
    draws=Draws(4, 2, seed=seed),
  )  # fmt: skip
  ask(1)
  with nothing_compiles():
    ask(2)
