"""Methods by name on every process: the same frame of scores whatever the method, or a refusal."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import (
  Compute,
  DiffusionModel,
  Draws,
  Examples,
  Projection,
  Unlearning,
  fit_curvature,
)
from jaxinf.attribution.methods import METHODS, Ingredients, method_named
from jaxinf.evaluation.replay import ReplayTraining
from jaxinf.networks import MLP
from jaxinf.networks.training import TrainConfig
from tests import nets
from tests.processes import CONTINUOUS, PROCESSES

NUM_TRAIN, NUM_QUERIES, SHAPE = 6, 2, (4, 4)
SWEEP = (1e-4, 1e-2)
QUERY_IDS, TRAIN_IDS = np.array(["q7", "q3"]), np.arange(10, 10 + NUM_TRAIN)
CURVED = [name for name, method in METHODS.items() if method.curved]
SHAPES = {"in": {"kernel": (4, 3), "bias": (3,)}, "out": {"kernel": (3, 4), "bias": (4,)}}
DRAWS = Draws(2, 1)
TRAINING = TrainConfig(steps=3, batch_size=2, warmup_steps=0)
# Queries and training examples in batches of the same size: both are one program.
COMPUTE = Compute(batch_size=4, devices=jax.local_devices()[:1])

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random


def net(params, x_t, t):
  """Two dense layers on the steps of a series, which share them: expand and reduce differ."""
  h = jnp.tanh(nets.dense(params["in"], x_t) + jnp.cos(t / 3)[:, None, None])
  return nets.dense(params["out"], h)


@functools.cache
def ingredients(process: str, measurement: str = "loss") -> Ingredients:
  """Whose curvatures, one for each kind, are fitted once."""
  model = DiffusionModel(net, nets.random_params(SHAPES), PROCESSES[process])

  @functools.cache
  def fitted(kind):
    given = () if kind is None else (kind,)
    return fit_curvature(model, train(), *given, draws=Draws(2), compute=COMPUTE)

  return Ingredients(
    model=model, curvature=fitted, dampings=SWEEP, measurement=measurement, query_draws=DRAWS,
    compression=None, projection=Projection(16, 0), journey_steps=2,
    embed=lambda examples: nets.random_images(len(examples), (5,)),
    training=lambda: ReplayTraining(MLP(hidden=(), time_features=2), model.process, TRAINING, 0),
  )  # fmt: skip


def train() -> Examples:
  return Examples(nets.random_images(NUM_TRAIN, SHAPE), TRAIN_IDS)


def queries(of: str, process: str) -> Examples:
  states = (PROCESSES[process].num_steps + 1,) if of == "trajectories" else ()
  return Examples(nets.random_images(NUM_QUERIES, (*states, *SHAPE), seed=1), QUERY_IDS)


@functools.cache
def answer(name: str, process: str):
  """Scores at the dampings of the method, computed once."""
  method, given = METHODS[name], ingredients(process)
  given = Ingredients(**(vars(given) | {"dampings": method.dampings(SWEEP)}))
  asked, made = queries(method.of, process), method.make(given)
  if isinstance(made, Unlearning):  # the network is random, and has nothing to forget
    made = dataclasses.replace(made, untrained_loss=1e3, max_steps=2)
  return made.scores(queries=asked, train=train(), draws=DRAWS, compute=COMPUTE)


def check_frame(name: str, process: str):
  method, found = METHODS[name], answer(name, process)
  dampings = [scores.settings.get("damping") for scores in found]
  if method.default_damping is None:
    assert dampings == [None]
  else:
    # Where damping but scales the scores, the default is enough.
    expected = {method.default_damping, *(SWEEP if method.sweeps else ())}
    assert dampings == sorted(expected)
  for scores in found:
    assert scores.values.shape == (NUM_QUERIES, NUM_TRAIN) and np.isfinite(scores.values).all()
    assert np.ptp(scores.values) > 0
    np.testing.assert_array_equal(scores.query_ids, QUERY_IDS)
    np.testing.assert_array_equal(scores.train_ids, TRAIN_IDS)


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_one_for_each_damping_query_and_training_example(name):
  check_frame(name, "epsilon_min_snr")


# One method for each way of computing, and processes that share little: other kinds of curvature
# are influence after another fit, and influence is pinned for each process in test_processes.py.
@pytest.mark.parametrize("name", ["ekfac", "exact", "trak", "dtrak", "das", "journey-trak"])
@pytest.mark.parametrize("process", ["v_zero_snr", "flow_logit_normal", "edm_raw"])
def test_every_method_is_of_every_process_or_says_that_it_is_not(process, name):
  if name == "journey-trak" and process in CONTINUOUS:
    with pytest.raises(ValueError, match="journey-trak goes along discrete timesteps"):
      METHODS[name].make(ingredients(process))
  else:
    check_frame(name, process)


@pytest.mark.parametrize("process", CONTINUOUS)
def test_a_measurement_that_a_process_has_not_is_refused_by_name(process):
  for name in ("influence", "trak"):
    method = METHODS[name].make(ingredients(process, "elbo"))
    with pytest.raises(ValueError, match="elbo needs discrete timesteps; .* is continuous"):
      method.scores(queries=queries("images", process), train=train(), draws=DRAWS)


@pytest.mark.parametrize("name", ["exact", "astra"])
def test_scores_by_solves_say_how_well_each_row_was_solved(name):
  for scores in answer(name, "epsilon_min_snr"):
    solves = scores.settings["solves"]
    assert len(solves["residuals"]) == len(solves["iterations"]) == NUM_QUERIES
    assert all(0 <= residual < np.inf for residual in solves["residuals"])
    iterations = solves["iterations"]
    assert iterations == [200] * NUM_QUERIES if name == "astra" else 0 < max(iterations) <= 200


def test_damping_changes_more_than_the_scale_where_a_method_says_so():
  for name, method in METHODS.items():
    if method.default_damping is not None and method.sweeps:
      first, *_, last = (s.values / np.abs(s.values).max() for s in answer(name, "epsilon_min_snr"))
      assert not np.allclose(first, last, rtol=1e-3), name


def test_each_curvature_gives_scores_of_its_own():
  """Those of "influence" are of the usual one, K-FAC here; relative dampings share one.

  The loss_power that a method has by default belongs to the draws, which are given here.
  """
  names = [name for name in CURVED if not name.endswith(("-relative", "-unweighted"))]
  found = {name: answer(name, "epsilon_min_snr")[0].values for name in names}
  np.testing.assert_array_equal(found.pop("influence"), found["kfac"])
  for one, other in itertools.combinations(found, 2):
    assert not np.allclose(found[one], found[other], rtol=1e-3), (one, other)


def test_replay_is_of_a_training_that_is_known():
  given = dataclasses.replace(ingredients("epsilon_min_snr"), training=None)
  with pytest.raises(ValueError, match="give its ReplayTraining"):
    METHODS["replay"].make(given)


def test_an_unknown_method_is_refused_with_those_that_there_are():
  with pytest.raises(ValueError, match="Unknown method 'trk'; there are: influence, influence-un"):
    method_named("trk")
