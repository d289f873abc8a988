"""Influence for a conditional model: a float64 twin that closes over each example's label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf.core.random import fold_in_each, stream
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import UNIFORM
from jaxinf.layers.per_example import group_keys
from tests import nets

NUM_TRAIN, NUM_QUERIES, DRAWS = 11, 3, 4
SETTINGS = dict(
  damping=1e-3, draws=DRAWS, seed=5, draw_groups=2, compression=None, design=UNIFORM
)  # fmt: skip
TRAIN_LABELS = np.arange(NUM_TRAIN) % 3
QUERY_LABELS = np.array([2, 0, 1])
LABELS = dict(query_conditioning=QUERY_LABELS, train_conditioning=TRAIN_LABELS)


@pytest.fixture(scope="module")
def problem():
  task = nets.conditional_task()
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  curvature = jaxinf.fit_curvature(task, train, draws=20, seed=0, conditioning=TRAIN_LABELS)
  return task, curvature, queries, train


@pytest.fixture(scope="module")
def scores(problem):
  return jaxinf.influence(*problem, **SETTINGS, **LABELS)


def twin_gradients(task, layers, images, labels, name) -> dict[str, np.ndarray]:
  """Layer → [n, d_out, d_in] in float64, each image under the network that its label makes."""
  keys = fold_in_each(stream(SETTINGS["seed"], name), jnp.arange(len(images)))
  keys = group_keys(keys, jnp.zeros(len(images), jnp.int32), DRAWS)
  pairs = [LOSS.pairs(task.schedule, images[i][None], keys[i][None]) for i in range(len(images))]
  grads = []
  with jax.enable_x64(True):
    double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
    params = jax.tree.map(double, task.params)
    for pair, label in zip(pairs, labels, strict=True):

      def loss(params, pair=pair, label=label):
        t = jnp.asarray(np.asarray(pair.t), jnp.int32)
        out = task.apply_fn(params, double(pair.x_t), t, jnp.full(DRAWS, label))
        return jnp.mean(jnp.square(out - double(pair.noise)))

      grads.append(jax.tree.leaves(jax.tree.map(np.asarray, jax.grad(loss)(params))))
  return {layer.name: np.stack([layer.to_matrix(g) for g in grads]) for layer in layers}


def test_scores_equal_a_naive_float64_twin_with_labels_closed_over(problem, scores):
  task, curvature, queries, train = problem
  assert {layer.name for layer in curvature.layers} == {"image", "label", "time", "out"}
  of_queries = twin_gradients(task, curvature.layers, queries, QUERY_LABELS, "query_gradients")
  of_train = twin_gradients(task, curvature.layers, train, TRAIN_LABELS, "train_gradients")
  expected = sum(
    np.einsum(
      "qoi,noi->qn", precondition(of_queries[name], basis, SETTINGS["damping"]), of_train[name]
    )
    for name, basis in curvature.bases.items()
  )
  np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_label_stays_with_its_example_whatever_the_order_batches_or_devices(
  problem, scores, devices
):
  task, curvature, queries, train = problem
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  permuted = jaxinf.influence(
    task, curvature, queries[::-1], train[order], **SETTINGS, batch_size=6,
    query_conditioning=QUERY_LABELS[::-1], train_conditioning=TRAIN_LABELS[order],
    query_ids=np.arange(NUM_QUERIES)[::-1], train_ids=order, devices=devices,
  )  # fmt: skip
  expected = scores.group_values[:, ::-1][:, :, order]
  # Sums of float32 in another order.
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(permuted.group_values, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"query_conditioning": None}, "must be None or pytrees of one form"),
    ({"train_conditioning": None}, "must be None or pytrees of one form"),
    ({"query_conditioning": {"labels": QUERY_LABELS}}, "must be None or pytrees of one form"),
    ({"query_conditioning": QUERY_LABELS.astype(np.uint8)}, "the same in shape and type"),
    ({"query_conditioning": QUERY_LABELS[:, None]}, "the same in shape and type"),
    ({"query_conditioning": QUERY_LABELS[:2]}, "query_conditioning must .* each of the 3 images"),
    ({"train_conditioning": TRAIN_LABELS / 2}, "train_conditioning is float64"),
    ({name: None for name in LABELS}, r"apply_fn\(params, x_t, t\) fails"),
  ],
)
def test_conditioning_that_does_not_fit_is_refused(problem, change, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(*problem, **SETTINGS, **(LABELS | change))


def test_a_curvature_of_an_unconditional_model_is_refused(problem):
  """Parameters and schedule are the same: only the inputs tell."""
  task, _, queries, train = problem
  unconditional = jaxinf.Task(
    lambda params, x_t, t: nets.conditional_net(params, x_t, t, jnp.zeros_like(t)),
    task.params, task.schedule,
  )  # fmt: skip
  curvature = jaxinf.fit_curvature(unconditional, train, draws=1, seed=0)
  with pytest.raises(ValueError, match="fitted with conditioning, or the training images have it"):
    jaxinf.influence(task, curvature, queries, train, **SETTINGS, **LABELS)
