"""Scores by layer against the float64 twin and a store, and weights of layers in closed form."""

import numpy as np
import pytest

import jaxinf
from jaxinf import LayerScores, balanced_weights, learn_layer_weights
from tests.twins import INDEPENDENT, assert_close, draw_gradients, twin_scores

DRAWS = jaxinf.Draws(4, 2, **INDEPENDENT, seed=5)


def layers_of(values: np.ndarray) -> LayerScores:
  """Scores [L, Q, N] of layers without noise."""
  values = np.asarray(values, np.float32)
  names = tuple(f"layer_{n}" for n in range(len(values)))
  ids = np.arange(values.shape[1]), np.arange(values.shape[2])
  return LayerScores(values[:, None], names, *ids, {})


@pytest.fixture(scope="module")
def by_layer(problem, settings):
  return jaxinf.layer_scores(**problem, **settings)


def test_each_layer_has_the_products_of_its_own_gradients(problem, scores, by_layer):
  curvature = problem["curvature"]
  query, train = (
    draw_gradients(curvature.model, curvature.layers, problem[of], name, DRAWS)
    for of, name in (("queries", "query_gradients"), ("train", "train_gradients"))
  )
  assert by_layer.layers == tuple(layer.name for layer in curvature.layers)
  for name, values in zip(by_layer.layers, by_layer.values, strict=True):
    alone = {n: grads if n == name else np.zeros_like(grads) for n, grads in query.items()}
    expected = twin_scores(curvature, alone, train, 1e-3)
    assert_close(values, expected, 1e-5)  # float32 gradients and products
  assert_close(by_layer.sum().replicate_values, scores.replicate_values, 1e-6)
  assert_close(by_layer.sum().query_replicate_values, scores.query_replicate_values, 1e-6)
  assert by_layer.sum().settings == scores.settings


def test_a_store_gives_the_same_from_its_rows(problem, by_layer, tmp_path):
  store = jaxinf.build_store(
    tmp_path, problem["curvature"], train=problem["train"], draws=DRAWS, compression=None
  )
  found = store.layer_scores(problem["queries"], damping=1e-3, draws=DRAWS)
  at = [found.layers.index(name) for name in by_layer.layers]
  assert_close(found.replicate_values[at], by_layer.replicate_values, 1e-5)
  assert_close(found.query_replicate_values[at], by_layer.query_replicate_values, 1e-5)


def test_rounds_and_blocks_of_queries_are_those_of_influence(problem):
  """Draws until the top is stable, and queries that go through in two parts."""
  draws = jaxinf.Draws.until_stable(top_k=3, agreement=1.0, most=8, replicates=2, size=2)
  asked = problem | dict(damping=1e-3, draws=draws, query_draws=DRAWS, compression=None)
  found = jaxinf.layer_scores(**asked, compute=jaxinf.Compute(query_chunk=2))
  expected = jaxinf.influence(**asked)
  assert found.settings["draws"] == expected.settings["draws"] == 8
  assert_close(found.sum().replicate_values, expected.replicate_values, 1e-5)


# Of top 3: x and y where w₁ a = x, w₂ b = y. (x + 2y) / √(x² + 2y²) is largest at x = y, by
# Cauchy and Schwarz. The third layer adds to the root mean square alone, and is best left out.
SIGNAL = np.array([[4, 0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 2, -2, 0]])


def test_learnt_weights_are_those_of_the_closed_form():
  """Of two queries, one of which sees the same examples in another order, and is ten times less."""
  values = np.stack([SIGNAL, SIGNAL[:, ::-1] / 10], axis=1)
  found = learn_layer_weights(layers_of(values), top_k=3)
  assert found.converged and found.values.mean() == pytest.approx(1)
  # At x = y = 1 the top 3 have the mean 1, and the root mean square is √(3 / 6).
  assert found.objective == pytest.approx(2**0.5, rel=1e-3)
  first, second, third = found.values * [4, 0.5, 2]
  # The objective is flat at its maximum: 1e-4 of it are some 3e-2 of the ratio of two weights.
  assert first == pytest.approx(second, rel=0.05) and third < 0.1 * first
  assert found.objective_of_sum < found.objective - 0.1
  again = learn_layer_weights(layers_of(values), top_k=3)
  np.testing.assert_array_equal(again.values, found.values)
  # What a layer is measured in does not matter.
  units = np.array([1e-6, 1, 1e3])
  other = learn_layer_weights(layers_of(values * units[:, None, None]), top_k=3)
  assert other.objective == pytest.approx(found.objective, rel=1e-3)


def test_balanced_weights_give_every_layer_one_spread():
  values = np.random.default_rng(0).normal(size=(3, 4, 7)) * np.array([1e-3, 1, 50])[:, None, None]
  scores = layers_of(values)
  spreads = scores.spreads * balanced_weights(scores)
  np.testing.assert_allclose(spreads, spreads.mean(), rtol=1e-6)
  assert balanced_weights(scores).mean() == pytest.approx(1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"tolerance": 0}, "tolerance must be positive"),
    ({"scores": layers_of(np.ones((2, 1, 4)))}, "all equal"),
    ({"scores": layers_of(np.full((2, 1, 4), np.nan))}, "not finite"),
  ],
)
def test_bad_arguments_are_refused(change, message):
  given = {"scores": layers_of(SIGNAL[:, None])} | change
  with pytest.raises(ValueError, match=message):
    learn_layer_weights(given.pop("scores"), **given)
