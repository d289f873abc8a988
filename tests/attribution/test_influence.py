"""Influence scores: a naive float64 twin, sign and scale by leave-one-out, and invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxinf
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.types import KroneckerFactors
from jaxinf.curvature.decompose import decomposed
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.diffusion.measurements import LOSS, measurement_named
from jaxinf.diffusion.noise import UNIFORM
from jaxinf.layers.coverage import Selection
from jaxinf.layers.per_example import group_keys
from jaxinf.layers.register import register
from jaxinf.scores.scores import Scores
from tests import nets
from tests.diffusion.measured import random_examples

NUM_TRAIN, NUM_QUERIES, DRAWS = 11, 3, 4
SETTINGS = dict(damping=1e-3, draws=DRAWS, seed=5, draw_groups=2, design=UNIFORM)


def keys_of(name: str, num: int, draws: int = DRAWS, seed: int = 5) -> jax.Array:
  keys = fold_in_each(stream(seed, name), jnp.arange(num))
  return group_keys(keys, jnp.zeros(num, jnp.int32), draws)


@pytest.fixture(scope="module")
def problem():
  task = nets.conv_task()
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  curvature = jaxinf.fit_curvature(task, train, draws=20, seed=0)
  return task, curvature, queries, train


@pytest.fixture(scope="module")
def scores(problem):
  return jaxinf.influence(*problem, **SETTINGS, compression=None)


def twin_gradients(task, curvature, images, name, design=UNIFORM) -> dict[str, np.ndarray]:
  """Layer → [n, d_out, d_in]: plain gradients in float64, one image at a time."""
  keys = keys_of(name, len(images))
  pairs = [
    LOSS.pairs(task.schedule, images[i][None], keys[i][None], design=design)
    for i in range(len(images))
  ]
  with jax.enable_x64(True):
    double = lambda tree: jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x), jnp.float64 if x.dtype == jnp.float32 else None), tree
    )

    def loss(params, pair):
      return jnp.mean(jnp.square(task.apply_fn(params, pair.x_t, pair.t) - pair.noise))

    gradient = jax.jit(jax.grad(loss))
    grads = [
      jax.tree.leaves(jax.tree.map(np.asarray, gradient(double(task.params), double(pair))))
      for pair in pairs
    ]
  return {
    layer.name: np.stack([layer.to_matrix(leaves) for leaves in grads])
    for layer in curvature.layers
  }


def twin_scores(curvature, query_grads, train_grads) -> np.ndarray:
  """[Q, N]."""
  return sum(
    np.einsum(
      "qoi,noi->qn", precondition(query_grads[name], basis, SETTINGS["damping"]), train_grads[name]
    )
    for name, basis in curvature.bases.items()
  )


def test_scores_equal_a_naive_float64_twin(problem, scores):
  task, curvature, queries, train = problem
  query_grads = twin_gradients(task, curvature, queries, "query_gradients")
  train_grads = twin_gradients(task, curvature, train, "train_gradients")
  expected = twin_scores(curvature, query_grads, train_grads)
  np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_flips_are_of_training_images_and_never_of_queries(problem, scores, tmp_path):
  """By default, with the design of queries given, and in a store of the training gradients."""
  task, curvature, queries, train = problem
  design = dataclasses.replace(UNIFORM, random_flip=True)
  query_grads = twin_gradients(task, curvature, queries, "query_gradients")
  train_grads = twin_gradients(task, curvature, train, "train_gradients", design)
  expected = twin_scores(curvature, query_grads, train_grads)
  atol = 1e-5 * np.abs(expected).max()
  assert not np.allclose(scores.values, expected, rtol=0, atol=100 * atol)
  settings = SETTINGS | {"design": design}
  for more in ({}, {"query_design": UNIFORM}):
    found = jaxinf.influence(*problem, **settings, **more, compression=None)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=atol)
    assert found.settings["design"]["random_flip"]
    assert not found.settings["query_design"]["random_flip"]
  store = jaxinf.build_index(
    tmp_path, task, curvature, train, draws=DRAWS, seed=5, design=design, compression=None
  )
  found = store.query(queries, damping=SETTINGS["damping"], draws=DRAWS, seed=5)
  np.testing.assert_allclose(found.values, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["elbo", "trajectory", "journey_loss(8,5,1)"])
def test_a_query_of_any_measurement_has_the_gradient_of_its_value(name, problem):
  """By name and as an object: scores are products with plain gradients of `evaluate`."""
  task, curvature, _, train = problem
  measurement = measurement_named(name)
  queries = random_examples(measurement, NUM_QUERIES, task.schedule.num_steps, seed=1)
  if measurement.of == "trajectories":
    queries *= 2  # noise leaves [-1, 1]
  keys = keys_of("query_gradients", NUM_QUERIES)

  def value(params, query, keys):
    return measurement.evaluate(task.apply_fn, params, task.schedule, query[None], keys[None])[0]

  gradient = jax.jit(jax.grad(value))
  leaves = [
    jax.tree.leaves(gradient(task.params, *pair)) for pair in zip(queries, keys, strict=True)
  ]
  query_grads = {
    layer.name: np.stack([layer.to_matrix(list(map(np.asarray, x))) for x in leaves])
    for layer in curvature.layers
  }
  train_grads = twin_gradients(task, curvature, train, "train_gradients")
  expected = twin_scores(curvature, query_grads, train_grads)
  for asked in (name, dataclasses.replace(measurement, name=None)):
    found = jaxinf.influence(
      task, curvature, queries, train, **SETTINGS, measurement=asked, compression=None
    )
    # Float32 gradients of large terms, summed in another order.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=atol)
    assert found.settings["measurement"] == (name if asked == name else "custom")


@pytest.mark.parametrize(
  ("queries", "message"),
  [
    (np.zeros((2, 4, 4, 1), np.float32), r"of trajectories: give .* \[N, K, H, W, C\]; got"),
    (np.zeros((2, 1001, 4, 4, 1)), "got float64"),
    (np.full((2, 1001, 4, 4, 1), np.nan, np.float32), "must be finite"),
    (np.zeros((2, 1001, 4, 4, 2), np.float32), "do not match training images"),
    (np.zeros((2, 1000, 4, 4, 1), np.float32), "must have the 1001 states"),
  ],
)
def test_queries_that_are_no_trajectories_are_refused(problem, queries, message):
  task, curvature, _, train = problem
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(task, curvature, queries, train, **SETTINGS, measurement="trajectory")


def test_a_resumed_measurement_needs_a_name(problem, tmp_path):
  unnamed = dataclasses.replace(LOSS, name=None)
  with pytest.raises(ValueError, match="give the Measurement a name"):
    jaxinf.influence(
      *problem, **SETTINGS, measurement=unnamed, resume=jaxinf.Resume(tmp_path, every=1)
    )


def test_int8_queries_keep_the_order_at_the_default_damping(problem):
  """Rank correlation over 150 images, at the damping of the configs."""
  task, curvature, queries, _ = problem
  train = nets.random_images(150, seed=2)
  settings = SETTINGS | {"damping": 1e-8}
  exact, quantised = (
    jaxinf.influence(task, curvature, queries, train, **settings, compression=compression)
    for compression in (None, "int8")
  )
  assert not np.array_equal(quantised.values, exact.values)
  for ours, reference in zip(quantised.values, exact.values, strict=True):
    assert stats.spearmanr(ours, reference).statistic >= 0.999


def test_scores_do_not_depend_on_batches_order_padding_or_devices(problem, scores, devices):
  """Permuted rows, batches that need padding, one device or two: the same number for each pair."""
  task, curvature, queries, train = problem
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  permuted = jaxinf.influence(
    task, curvature, queries[::-1], train[order], **SETTINGS, compression=None, batch_size=6,
    query_ids=np.arange(NUM_QUERIES)[::-1], train_ids=order, devices=devices,
  )  # fmt: skip
  expected = scores.group_values[:, ::-1][:, :, order]
  # Sums of float32 in another order.
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(permuted.group_values, expected, rtol=0, atol=atol)
  np.testing.assert_array_equal(permuted.train_ids, order)


def test_leave_one_out_on_ridge_regression_pins_sign_and_scale():
  """Linear ε-prediction: removing example n and refitting changes query q by scores[q, n] / N."""
  num, damping, size, draws = 60, 0.05, 4, 8
  train, queries = nets.random_images(num, (2, 2, 1)), nets.random_images(5, (2, 2, 1), seed=1)

  def apply_fn(params, x_t, t):
    del t
    return nets.dense(params["linear"], x_t.reshape(-1, size)).reshape(x_t.shape)

  def design(images, name):
    """Inputs [n, draws, 5] with a 1 and targets [n, draws, 4] of each image, in float64."""
    keys = keys_of(name, len(images), draws)
    pairs = LOSS.pairs(nets.SCHEDULE, jnp.asarray(images), keys)
    inputs, targets = (
      np.asarray(x, np.float64).reshape(-1, size) for x in (pairs.x_t, pairs.noise)
    )
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    return inputs.reshape(-1, draws, size + 1), targets.reshape(-1, draws, size)

  x, y = design(train, "train_gradients")

  def refit(kept):
    """argmin over W [4, 5] of (1/num) Σ_kept ℓ_n(W) + λ/2 |W|²; 1/num also without an example."""
    a, b = x[kept].reshape(-1, size + 1), y[kept].reshape(-1, size)
    scale = 2 / (size * draws * num)
    hessian = scale * a.T @ a + damping * np.eye(size + 1)
    return np.linalg.solve(hessian, scale * a.T @ b).T

  everything = refit(np.arange(num))
  params = {"linear": {"kernel": everything[:, :-1].T, "bias": everything[:, -1]}}
  params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
  task = jaxinf.Task(apply_fn, params, nets.SCHEDULE)
  model = register(apply_fn, params, (2, 2, 1), Selection())
  rows = x.reshape(-1, size + 1)
  factors = KroneckerFactors(a=rows.T @ rows / len(rows), g=2 / size * np.eye(size))
  bases, _ = decomposed({"linear": factors}, "host")
  settings = {"draws": draws, "conditional": False, **Selection().as_dict()}
  curvature = jaxinf.Curvature(model.layers, bases, model.coverage, task, settings)
  scores = jaxinf.influence(
    task,
    curvature,
    queries,
    train,
    damping=damping,
    draws=draws,
    seed=5,
    compression=None,
    design=UNIFORM,
  )

  qx, qy = design(queries, "query_gradients")
  measure = lambda w: np.mean((qy - qx @ w.T) ** 2, axis=(1, 2))
  change = np.stack(
    [measure(refit(np.delete(np.arange(num), n))) - measure(everything) for n in range(num)], axis=1
  )
  predicted = scores.values / num
  # First order in 1 / num: leverages are of the order of 5 / 60.
  assert np.corrcoef(predicted.ravel(), change.ravel())[0, 1] > 0.99
  slope = np.sum(predicted * change) / np.sum(change**2)
  assert 0.85 < slope < 1.05


def test_a_curvature_of_other_parameters_is_refused(problem):
  _, curvature, queries, train = problem
  with pytest.raises(ValueError, match="fitted for other params"):
    jaxinf.influence(nets.conv_task(seed=1), curvature, queries, train, **SETTINGS)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"damping": 0.0}, "damping must be positive"),
    ({"draw_groups": 3}, "draw_groups must divide draws"),
    ({"measurement": "losss"}, "Unknown measurement 'losss'; there are: loss"),
    ({"compression": "int7"}, "Unknown compression 'int7'"),
    ({"train_ids": np.zeros(NUM_TRAIN, int)}, "train_ids must be 11 different ids"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"query_design": jaxinf.DrawDesign(random_flip=True)}, "a query is measured as it is"),
  ],
)
def test_bad_settings_are_refused(problem, change, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(*problem, **(SETTINGS | change))


@pytest.mark.parametrize(
  "bad", [np.zeros((3, 4, 4, 2), np.float32), np.zeros((3, 4, 4)), np.zeros(0)]
)
def test_images_of_the_wrong_kind_are_refused(problem, bad):
  task, curvature, _, train = problem
  with pytest.raises(ValueError, match=r"do not match training images|Images must be"):
    jaxinf.influence(task, curvature, bad, train, **SETTINGS)


def test_standard_errors_come_without_asking(problem):
  """The default splits the draws into the most equal groups up to five."""
  settings = {key: SETTINGS[key] for key in ("damping", "draws", "seed")}
  scores = jaxinf.influence(*problem, **settings)
  assert scores.settings["draw_groups"] == 2  # pairs
  assert np.isfinite(scores.std_errors).all()


def test_images_out_of_range_or_not_finite_are_refused(problem):
  task, curvature, queries, train = problem
  for bad in (train * 255, np.where(train > 0.9, np.nan, train).astype(np.float32)):
    with pytest.raises(ValueError, match=r"finite and lie in \[-1, 1\]"):
      jaxinf.influence(task, curvature, queries, bad, **SETTINGS)


def test_a_curvature_of_another_schedule_is_refused(problem):
  task, curvature, queries, train = problem
  other = jaxinf.Task(task.apply_fn, task.params, jaxinf.Schedule.linear(50, 1e-4, 0.02))
  with pytest.raises(ValueError, match="fitted for other schedule"):
    jaxinf.influence(other, curvature, queries, train, **SETTINGS)


def test_a_curvature_of_other_layers_is_refused(problem):
  task, curvature, queries, train = problem
  part = dataclasses.replace(curvature, layers=curvature.layers[1:])
  with pytest.raises(ValueError, match="other layers than the task's model"):
    jaxinf.influence(task, part, queries, train, **SETTINGS)


def test_rankings_name_the_best_worst_and_most_neutral_examples():
  values = np.array([[[0.1, -2.0, 3.0, 0.0]], [[0.3, -4.0, 1.0, 0.0]]], np.float32)
  ids = np.array(["a", "b", "c", "d"])
  scores = Scores(values, np.array(["q"]), ids, {})
  assert scores.top(2).ids.tolist() == [["c", "a"]]
  assert scores.bottom(1).ids.tolist() == [["b"]]
  assert scores.neutral(1).ids.tolist() == [["d"]]
  np.testing.assert_allclose(scores.top(1).values, [[2.0]])
  np.testing.assert_allclose(scores.top(1).std_errors, [[1.0]])  # std(3, 1) / √2 with ddof 1
  with pytest.raises(ValueError, match="k must lie in 1…4"):
    scores.top(5)
