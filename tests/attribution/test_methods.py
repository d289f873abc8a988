"""Methods by name: whatever the method, the same frame of scores; and what each refuses."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Task, fit_curvature
from jaxinf.attribution.methods import METHODS, Question
from jaxinf.diffusion.noise import DrawDesign
from tests import nets

NUM_TRAIN, NUM_QUERIES = 6, 2
SWEEP = (1e-4, 1e-2)
QUERY_IDS, TRAIN_IDS = np.array(["q7", "q3"]), np.arange(10, 10 + NUM_TRAIN)
CURVED = [name for name, method in METHODS.items() if method.curved]
SHAPES = {"in": {"kernel": (4, 3), "bias": (3,)}, "out": {"kernel": (3, 4), "bias": (4,)}}


def net(params, x_t, t):
  """Two dense layers on the rows of 4 × 4 images, which share them: expand and reduce differ."""
  h = jnp.tanh(nets.dense(params["in"], x_t[..., 0]) + jnp.cos(t / 3)[:, None, None])
  return nets.dense(params["out"], h).reshape(x_t.shape)


@pytest.fixture(scope="module")
def question(schedule):
  """A question whose curvatures, one for each set of options, are fitted once."""
  task = Task(net, nets.random_params(SHAPES), schedule)
  train = nets.random_images(NUM_TRAIN)

  @functools.cache
  def fitted(options):
    return fit_curvature(task, train, draws=2, seed=0, **dict(options))

  return Question(
    task=task, queries=nets.random_images(NUM_QUERIES, seed=1), query_ids=QUERY_IDS,
    trajectories=nets.random_images(NUM_QUERIES, (schedule.num_steps + 1, 4, 4, 1), seed=2),
    train_images=train, train_ids=TRAIN_IDS, measurement="loss", dampings=SWEEP, draws=2,
    draw_groups=1, query_draws=2, query_groups=1, design=DrawDesign(), compression=None, passes=1,
    projection_dim=16, projection="rademacher", journey_steps=2,
    embeddings=lambda: (nets.random_images(NUM_QUERIES, (5,)), nets.random_images(NUM_TRAIN, (5,))),
    curvature=lambda options: fitted(tuple(sorted(options.items()))), seed=0, batch_size=64,
  )  # fmt: skip


@pytest.fixture(scope="module")
def answer(question):
  """(name, changes of the question) → scores at the dampings of the method, computed once."""

  @functools.cache
  def answered(name, **changes):
    dampings = METHODS[name].dampings(SWEEP)
    return METHODS[name].scores(dataclasses.replace(question, dampings=dampings, **changes))

  return answered


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_one_for_each_damping_query_and_training_image(answer, name):
  method, found = METHODS[name], answer(name)
  dampings = [scores.settings.get("damping") for scores in found]
  if method.default_damping is None:
    assert dampings == [None]
  else:
    # Where damping but scales the scores, the default is enough.
    expected = {method.default_damping, *(SWEEP if method.sweeps else ())}
    assert dampings == sorted(expected)
  for scores in found:
    assert scores.values.shape == (NUM_QUERIES, NUM_TRAIN) and np.isfinite(scores.values).all()
    np.testing.assert_array_equal(scores.query_ids, QUERY_IDS)
    np.testing.assert_array_equal(scores.train_ids, TRAIN_IDS)


def test_damping_changes_more_than_the_scale_where_a_method_says_so(answer):
  for name, method in METHODS.items():
    if method.default_damping is not None and method.sweeps:
      first, *_, last = (s.values / np.abs(s.values).max() for s in answer(name))
      assert not np.allclose(first, last, rtol=1e-3), name


def test_each_curvature_gives_scores_of_its_own(answer):
  """Those of "influence" are of the question's usual one, K-FAC here."""
  found = {name: answer(name)[0].values for name in CURVED}
  np.testing.assert_array_equal(found.pop("influence"), found["kfac"])
  for one, other in itertools.combinations(found, 2):
    assert not np.allclose(found[one], found[other], rtol=1e-3), (one, other)


def test_passes_over_parts_of_the_queries_change_nothing(answer):
  # More passes than queries are one a query.
  for ours, theirs in zip(answer("influence", passes=9), answer("influence"), strict=True):
    np.testing.assert_array_equal(ours.query_ids, theirs.query_ids)
    # Products of one row or two, and float32 sums in another order.
    atol = 1e-6 * np.abs(theirs.values).max()
    np.testing.assert_allclose(ours.values, theirs.values, rtol=0, atol=atol)


def test_no_pass_is_refused(answer):
  with pytest.raises(ValueError, match="passes must be at least 1; got 0"):
    answer("influence", passes=0)


def test_what_a_question_lacks_is_refused(answer):
  for name, changes in (("journey-trak", {}), ("trak", {"measurement": "trajectory"})):
    with pytest.raises(ValueError, match="trajectories are needed, and were not kept"):
      answer(name, trajectories=None, **changes)
  with pytest.raises(ValueError, match="only the method journey-trak makes"):
    answer("trak", measurement="journey_loss(3)")
