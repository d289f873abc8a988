"""Influence for a conditional model: a float64 twin that closes over each example's label."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Compute, DiffusionModel, Draws, Examples
from tests import nets
from tests.twins import INDEPENDENT, assert_close, draw_gradients, twin_scores

NUM_TRAIN, NUM_QUERIES = 11, 3
DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)
SETTINGS = dict(damping=1e-3, draws=DRAWS, compression=None)
TRAIN_LABELS = np.arange(NUM_TRAIN) % 3
QUERY_LABELS = np.array([2, 0, 1])

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random


@pytest.fixture(scope="module")
def problem():
  train = Examples(nets.random_images(NUM_TRAIN), conditioning=TRAIN_LABELS)
  queries = Examples(nets.random_images(NUM_QUERIES, seed=1), conditioning=QUERY_LABELS)
  curvature = jaxinf.fit_curvature(nets.conditional_model(), train, draws=Draws(20))
  return dict(curvature=curvature, queries=queries, train=train)


@pytest.fixture(scope="module")
def scores(problem):
  return jaxinf.influence(**problem, **SETTINGS)


def closed_over(model: DiffusionModel, label: int) -> DiffusionModel:
  """The unconditional model that a label makes."""
  network = lambda params, x_t, t: model.apply_fn(params, x_t, t, jnp.full(t.shape, label))
  return dataclasses.replace(model, apply_fn=network, cache={})


def gradients_of(problem, which: str) -> dict[str, np.ndarray]:
  """Those of each example under the model of its label, with the draws of its id."""
  curvature, examples = problem["curvature"], problem[which]
  name = {"queries": "query_gradients", "train": "train_gradients"}[which]
  plain = dataclasses.replace(examples, conditioning=None)
  each = [
    draw_gradients(closed_over(curvature.model, label), curvature.layers, plain, name, DRAWS)
    for label in range(3)
  ]
  row = lambda name, i, label: each[label][name][i]
  return {
    layer.name: np.stack([row(layer.name, *which) for which in enumerate(examples.conditioning)])
    for layer in curvature.layers
  }


def test_scores_equal_a_naive_float64_twin_with_labels_closed_over(problem, scores):
  curvature = problem["curvature"]
  assert {layer.name for layer in curvature.layers} == {"image", "label", "time", "out"}
  grads = gradients_of(problem, "queries"), gradients_of(problem, "train")
  assert_close(scores.values, twin_scores(curvature, *grads, SETTINGS["damping"]), 1e-5)


def test_a_label_stays_with_its_example_whatever_the_order_batches_or_devices(
  problem, scores, devices
):
  order, back = np.random.default_rng(0).permutation(NUM_TRAIN), np.arange(NUM_QUERIES)[::-1]
  permuted = jaxinf.influence(
    problem["curvature"], queries=problem["queries"].take(back),
    train=problem["train"].take(order), **SETTINGS,
    compute=Compute(batch_size=6, devices=devices),
  )  # fmt: skip
  expected = scores.replicate_values[:, ::-1][:, :, order]
  assert_close(permuted.replicate_values, expected, 1e-5)  # sums of float32 in another order


@pytest.mark.parametrize(
  "conditioning",
  [None, {"labels": QUERY_LABELS}, QUERY_LABELS.astype(np.uint8), QUERY_LABELS[:, None]],
  ids=["none", "another tree", "another type", "another shape"],
)
def test_conditioning_of_another_form_is_refused(problem, conditioning):
  queries = dataclasses.replace(problem["queries"], conditioning=conditioning)
  with pytest.raises(
    ValueError, match=r"must be None or pytrees of one form, .* in shape and type"
  ):
    jaxinf.influence(**(problem | {"queries": queries}), **SETTINGS)


def test_conditioning_that_the_model_does_not_take_is_refused(problem):
  without = {
    which: dataclasses.replace(problem[which], conditioning=None) for which in ("queries", "train")
  }
  with pytest.raises(ValueError, match="fitted with conditioning, or these examples have"):
    jaxinf.influence(problem["curvature"], **without, **SETTINGS)
  with pytest.raises(ValueError, match=r"apply_fn\(params, inputs, time\) fails"):
    jaxinf.fit_curvature(problem["curvature"].model, without["train"], draws=Draws(1))
