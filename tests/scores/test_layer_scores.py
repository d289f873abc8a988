"""Scores by layer: their sum, weighted sums with their errors, and what is refused."""

import numpy as np
import pytest

from jaxinf import LayerScores

LAYERS, QUERIES, TRAIN = ("first", "middle", "last"), 2, 5


def layer_scores(**changes) -> LayerScores:
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 4, QUERIES, TRAIN)).astype(np.float32)
  of_queries = rng.normal(size=(3, 2, QUERIES, TRAIN)).astype(np.float32)
  given = dict(
    replicate_values=values, layers=LAYERS, query_ids=np.arange(QUERIES),
    train_ids=np.arange(TRAIN), settings={"damping": 0.1}, query_replicate_values=of_queries,
    train_groups=np.array(list("aabbb")),
  )  # fmt: skip
  return LayerScores(**(given | changes))


def test_a_weighted_sum_is_linear_in_every_replicate():
  """So that its standard errors are those of the sum, at these weights."""
  scores, weights = layer_scores(), np.array([2.0, -1.0, 0.5])
  found = scores.weighted(weights)
  for ours, layers in (
    (found.replicate_values, scores.replicate_values),
    (found.query_replicate_values, scores.query_replicate_values),
  ):
    np.testing.assert_allclose(ours, np.einsum("l,lgqn->gqn", weights, layers), rtol=1e-5)
  assert found.settings == {
    "damping": 0.1,
    "layer_weights": {"first": 2, "middle": -1, "last": 0.5},
  }
  np.testing.assert_array_equal(found.train_groups, scores.train_groups)


def test_the_sum_has_weights_of_one_and_the_settings_of_influence():
  scores = layer_scores()
  np.testing.assert_array_equal(scores.sum().values, scores.weighted([1, 1, 1]).values)
  np.testing.assert_allclose(scores.sum().values, scores.values.sum(axis=0), rtol=1e-5)
  assert scores.sum().settings == {"damping": 0.1}


def test_spreads_are_over_training_examples_and_not_over_queries():
  """A constant of a query moves no spread, and a factor of a layer is one of its spread."""
  scores = layer_scores()
  moved = scores.replicate_values * np.float32([1, 2, 3])[:, None, None, None]
  moved = moved + np.float32([5, -7])[:, None]
  found = layer_scores(replicate_values=moved).spreads
  np.testing.assert_allclose(found, scores.spreads * [1, 2, 3], rtol=1e-5)


@pytest.mark.parametrize(
  ("weights", "message"),
  [([1, 2], "must be 3 finite numbers"), ([1, 2, np.nan], "must be 3 finite numbers")],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
  with pytest.raises(ValueError, match=message):
    layer_scores().weighted(weights)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"layers": ("first", "last")}, r"scores \[2, …, Q, N\] of as many layers as have names"),
    ({"layers": ("first", "first", "last")}, "layers must be different names"),
    ({"replicate_values": np.zeros((3, QUERIES, TRAIN))}, r"got shape \(3, 2, 5\)"),
  ],
)
def test_values_and_names_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    layer_scores(**change)
