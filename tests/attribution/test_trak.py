"""TRAK and its relatives: dense float64 twins, limits of the projection, and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf.attribution.das import das
from jaxinf.attribution.features import register_everything
from jaxinf.attribution.fisher import DualFisher, PrimalFisher, fisher_of
from jaxinf.attribution.journey import journey_trak, predicted_images
from jaxinf.attribution.trak import dtrak, trak
from jaxinf.compression.projection import Projection
from jaxinf.core.random import fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import UNIFORM
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import Resume
from jaxinf.layers.per_example import group_keys
from tests import nets

NUM_TRAIN, NUM_QUERIES, DRAWS = 11, 3, 4
DAMPINGS = (1e-2, 1e-4)
SETTINGS = dict(damping=DAMPINGS, draws=DRAWS, seed=5, design=UNIFORM)
SHAPES = {"in": (16, 5), "scale": (5,), "shift": (5,), "out": {"kernel": (5, 16), "bias": (16,)}}
NUM_PARAMETERS = 80 + 5 + 5 + 96


def net(params, x_t, t):
  """Two dense layers on 4 × 4 images, with a scale and a shift in between as of a normalisation."""
  h = jnp.tanh(jnp.dot(x_t.reshape(-1, 16), params["in"]) + jnp.cos(t / 300)[:, None])
  h = h * params["scale"] + params["shift"]
  return nets.dense(params["out"], h).reshape(x_t.shape)


@pytest.fixture(scope="module")
def problem():
  task = jaxinf.Task(net, nets.random_params(SHAPES), nets.SCHEDULE)
  return task, nets.random_images(NUM_QUERIES, seed=1), nets.random_images(NUM_TRAIN)


@pytest.fixture(scope="module")
def scores(problem):
  return trak(*problem, **SETTINGS, projection_dim=40)


def in_double(tree):
  cast = lambda x: jnp.asarray(np.asarray(x), jnp.float64 if x.dtype == jnp.float32 else None)
  return jax.tree.map(cast, tree)


def pairs_of(task, images, name):
  """For each image its pairs of DRAWS draws, from the keys of its id."""
  keys = fold_in_each(stream(5, name), jnp.arange(len(images)))
  keys = group_keys(keys, jnp.zeros(len(images), jnp.int32), DRAWS)
  pairs = zip(images, keys, strict=True)
  return [LOSS.pairs(task.schedule, jnp.asarray(x[None]), k[None]) for x, k in pairs]


def twin_gradients(task, images, name, value) -> np.ndarray:
  """[n, DRAWS, P] gradients of value(output, pairs) [DRAWS], a draw at a time, in float64."""
  layers = register_everything(task, images.shape[1:]).layers
  everyones = pairs_of(task, images, name)  # in float32, as the library draws them
  with jax.enable_x64(True):
    values = jax.jit(jax.jacobian(lambda params, p: value(task.apply_fn(params, p.x_t, p.t), p)))
    found = []
    for pairs in everyones:
      leaves = [
        np.asarray(x) for x in jax.tree.leaves(values(in_double(task.params), in_double(pairs)))
      ]
      rows = [layer.to_matrix(leaves).reshape(DRAWS, -1) for layer in layers]
      found.append(np.concatenate(rows, axis=1))
  return np.stack(found)


def twin_features(task, images, name, value, projection) -> np.ndarray:
  """[n, k]: P explicit, gradients averaged over all draws."""
  grads = twin_gradients(task, images, name, value).mean(axis=1)
  matrix = np.asarray(projection(jnp.eye(NUM_PARAMETERS), projection.key), np.float64)
  return grads @ matrix


def twin_scores(query, train, damping):
  hessian = train.T @ train / len(train)
  return query @ np.linalg.inv(hessian + damping * np.eye(len(hessian))) @ train.T


def assert_close(actual, expected, relative):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


VALUES = {
  "loss": lambda out, pairs: jnp.mean(jnp.square(out - pairs.noise), axis=(1, 2, 3)),
  "square_norm": lambda out, pairs: jnp.mean(jnp.square(out), axis=(1, 2, 3)),
}


@pytest.mark.parametrize(("dim", "kind"), [(6, "rademacher"), (40, "normal")])
def test_scores_equal_a_dense_float64_twin(problem, dim, kind):
  """Gradients in float32 carry errors of 1e-6, which a condition number of some 100 multiplies."""
  task, queries, train = problem
  ours = trak(*problem, **SETTINGS, projection_dim=dim, projection=kind, projection_seed=2)
  projection = Projection(dim, 2, kind)
  features = lambda images, name: twin_features(task, images, name, VALUES["loss"], projection)
  query, trained = features(queries, "query_gradients"), features(train, "train_gradients")
  for found, damping in zip(ours, DAMPINGS, strict=True):
    expected = twin_scores(query, trained, damping)
    assert_close(found.values, expected, 1e-4)
    assert_close(found.query_group_values.mean(axis=0), expected, 1e-4)
    assert found.settings["damping"] == damping and found.settings["projection"] == kind


def test_dtrak_measures_the_squared_norm_of_the_output_on_both_sides(problem):
  task, queries, train = problem
  ours = dtrak(*problem, **SETTINGS, projection_dim=40)
  features = lambda images, name: twin_features(
    task, images, name, VALUES["square_norm"], Projection(40, 5)
  )
  expected = twin_scores(
    features(queries, "query_gradients"), features(train, "train_gradients"), DAMPINGS[0]
  )
  assert_close(ours[0].values, expected, 1e-4)


def test_a_sweep_is_separate_calls(problem, scores):
  alone = trak(*problem, **(SETTINGS | {"damping": DAMPINGS[1]}), projection_dim=40)
  np.testing.assert_array_equal(alone.group_values, scores[1].group_values)
  np.testing.assert_array_equal(alone.query_group_values, scores[1].query_group_values)


def test_scores_do_not_depend_on_batches_blocks_order_or_devices(problem, scores, devices):
  """Blocks of one or two rows of gradients a device, permuted images, batches with padding."""
  task, queries, train = problem
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  permuted = trak(
    task, queries[::-1], train[order], **SETTINGS, projection_dim=40, batch_size=6,
    block_mib=1.5 * 4 * NUM_PARAMETERS / 2**20, train_ids=order,
    query_ids=np.arange(NUM_QUERIES)[::-1], devices=devices,
  )  # fmt: skip
  for ours, reference in zip(permuted, scores, strict=True):
    expected = reference.group_values[:, ::-1][:, :, order]
    assert_close(ours.group_values, expected, 1e-4)  # float32 sums in another order, conditioned
    np.testing.assert_array_equal(ours.train_ids, order)


def test_scores_are_the_mean_over_checkpoints_each_with_its_projection(problem, scores):
  task, queries, train = problem
  other = nets.random_params(SHAPES, seed=1)
  both = trak(*problem, **SETTINGS, projection_dim=40, checkpoints=(other,))
  alone = trak(
    jaxinf.Task(net, other, task.schedule), queries, train, **SETTINGS, projection_dim=40,
    projection_seed=6,
  )  # fmt: skip
  for ours, first, second in zip(both, scores, alone, strict=True):
    assert_close(ours.group_values, (first.group_values + second.group_values) / 2, 1e-6)
  assert both[0].settings["num_checkpoints"] == 1


def test_the_projection_disappears_as_its_dimension_grows(problem):
  """Scores approach those of the gradients themselves, with an error like 1 / √k.

  The errors at two k with a factor of 16 between them stand in the ratio 4; that each is a root
  mean square of 8 seeds × 33 correlated scores leaves the ratio uncertain by about a quarter.
  """
  task, queries, train = problem
  grads = lambda images, name: twin_gradients(task, images, name, VALUES["loss"]).mean(axis=1)
  query, trained = grads(queries, "query_gradients"), grads(train, "train_gradients")
  expected = twin_scores(query, trained, DAMPINGS[0])

  def error(dim):
    found = []
    for seed in range(8):
      projection = Projection(dim, seed)
      matrix = np.asarray(projection(jnp.eye(NUM_PARAMETERS), projection.key), np.float64)
      fisher = fisher_of((trained @ matrix).astype(np.float32))
      found.append(fisher.scores(query @ matrix, DAMPINGS[0]) - expected)
    return np.sqrt(np.mean(np.square(found)))

  few, many = error(1024), error(16 * 1024)
  assert 2.5 <= few / many <= 6.5
  assert many <= 0.1 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize("size", [5, 12], ids=["fewer_than_images", "more_than_images"])
def test_both_forms_of_the_fisher_agree_and_differentiate(size):
  """Primal and dual formulas are one function, and `change` its directional derivative.

  Against central differences with a step of 1e-4 in float64: errors of the order 1e-7.
  """
  rng = np.random.default_rng(0)
  features, changes = rng.normal(size=(2, 8, size))
  queries, damping = rng.normal(size=(3, size)), 0.3
  forms = [form(features) for form in (PrimalFisher, DualFisher)]
  expected = twin_scores(queries, features, damping)
  step = 1e-4
  slope = (
    twin_scores(queries, features + step * changes, damping)
    - twin_scores(queries, features - step * changes, damping)
  ) / (2 * step)
  inverse = np.linalg.inv(features.T @ features / 8 + damping * np.eye(size))
  slack = 1 - np.einsum("ni,ij,nj->n", features, inverse, features) / 8
  for fisher in forms:
    np.testing.assert_allclose(fisher.scores(queries, damping), expected, atol=1e-12)
    np.testing.assert_allclose(fisher.slack(damping), slack, atol=1e-12)
    change = fisher.change(queries, expected, changes, damping)
    np.testing.assert_allclose(change, slope, atol=1e-6)
  assert isinstance(fisher_of(features), PrimalFisher if size == 5 else DualFisher)


def test_groups_of_draws_average_to_the_scores_of_all_draws(problem, scores):
  """The same draws in one group or in four: one score; its spread is finite only with groups."""
  whole = trak(*problem, **SETTINGS, projection_dim=40, draw_groups=1, query_groups=1)
  parts = trak(*problem, **SETTINGS, projection_dim=40, draw_groups=4, query_groups=4)
  for one, four in zip(whole, parts, strict=True):
    assert four.group_values.shape == four.query_group_values.shape[:1] + one.values.shape
    assert_close(four.values, one.values, 1e-4)
    assert_close(four.query_group_values.mean(axis=0), one.values, 1e-4)
    assert np.isnan(one.std_errors).all() and (four.std_errors > 0).all()


def test_an_interrupted_pass_goes_on_from_its_features(problem, scores, tmp_path):
  """Half of the kept blocks are gone: they alone are made again, and scores are the same."""
  settings = SETTINGS | dict(projection_dim=40, batch_size=4, block_mib=4e-3)
  resume = Resume(tmp_path, every=1)
  first = trak(*problem, **settings, resume=resume)
  kept = sorted((tmp_path / "model-000" / "train_gradients").glob("*.npz"))
  assert len(kept) >= 4
  for path in kept[2:]:
    path.unlink()
  stamps = [path.stat().st_mtime_ns for path in kept[:2]]
  again = trak(*problem, **settings, resume=resume)
  assert [path.stat().st_mtime_ns for path in kept[:2]] == stamps
  for ours, before, reference in zip(again, first, scores, strict=True):
    np.testing.assert_allclose(ours.group_values, before.group_values, rtol=1e-4)
    assert_close(ours.group_values, reference.group_values, 1e-4)
  with pytest.raises(StaleArtifact, match="seed"):
    trak(*problem, **(settings | {"seed": 6}), resume=resume)


def test_das_equals_a_dense_float64_twin(problem):
  """Leave-one-out changes of the mean output, with unit gradients and residuals, squared."""
  task, queries, train = problem
  ours = das(*problem, **SETTINGS, projection_dim=40)
  projection, num = Projection(40, 5), NUM_TRAIN
  matrix = np.asarray(projection(jnp.eye(NUM_PARAMETERS), projection.key), np.float64)

  def features(images, name):
    grads = twin_gradients(task, images, name, lambda out, _: jnp.mean(out, axis=(1, 2, 3)))
    units = grads / np.linalg.norm(grads, axis=-1, keepdims=True)
    return units.mean(axis=1) @ matrix

  query, trained = features(queries, "query_gradients"), features(train, "train_gradients")
  errors = np.sqrt(
    [
      VALUES["loss"](task.apply_fn(task.params, pairs.x_t, pairs.t), pairs)
      for pairs in pairs_of(task, train, "train_gradients")
    ]
  )
  residuals = errors.mean(axis=1) / np.linalg.norm(errors, axis=1)
  for found, damping in zip(ours, DAMPINGS, strict=True):
    inverse = np.linalg.inv(trained.T @ trained + num * damping * np.eye(40))
    leverages = np.einsum("ni,ij,nj->n", trained, inverse, trained)
    changes = query @ inverse @ trained.T * residuals / (1 - leverages)
    # As for trak, and 1 − h_n is as small as 0.01.
    assert_close(found.values, num * np.square(changes), 1e-3)
    assert_close(found.query_group_values.mean(axis=0), num * np.square(changes), 1e-3)


def test_a_leverage_is_what_leaving_an_image_out_does():
  """With the formula of `das`, least squares without an image predicts what `slack` says: exactly.

  Ridge regression y ≈ φ w with the penalty of all N images; removing n moves the prediction at q
  by φ_q A⁻¹ φ_n / N · r_n / (1 − h_n), with the residual r_n of the whole fit.
  """
  rng = np.random.default_rng(1)
  features, queries, targets = rng.normal(size=(9, 4)), rng.normal(size=(2, 4)), rng.normal(size=9)
  damping, fisher = 0.1, fisher_of(features)
  solve = lambda kept: np.linalg.solve(
    features[kept].T @ features[kept] + 9 * damping * np.eye(4), features[kept].T @ targets[kept]
  )
  whole = solve(np.arange(9))
  residuals = targets - features @ whole
  moves = fisher.scores(queries, damping) / 9 * residuals / fisher.slack(damping)
  for n in range(9):
    exact = queries @ (whole - solve(np.arange(9) != n))
    np.testing.assert_allclose(moves[:, n], exact, atol=1e-12)


def test_images_predicted_on_the_way_are_those_the_model_believes_in():
  """A model that knows the images, by their labels: x̂_0 is the image, whatever the state."""
  images = nets.random_images(3, seed=4)

  def knowing(params, x_t, t, labels):
    level = lambda table: jnp.asarray(table)[t][:, None, None, None]
    signal, noise = level(nets.SCHEDULE.signal), level(nets.SCHEDULE.noise)
    return params["one"] * (x_t - signal * jnp.asarray(images)[labels]) / noise

  schedule = nets.SCHEDULE
  task = jaxinf.Task(knowing, {"one": jnp.ones(())}, schedule)
  states = np.random.default_rng(0).normal(size=(3, schedule.num_steps + 1, 4, 4, 1))
  labels, steps = np.array([2, 0, 1]), (10, 600, 300)
  found = predicted_images(
    task, states.astype(np.float32), steps, conditioning=labels, batch_size=4
  )
  # Rounding of ε in float32, times √(1 − ᾱ_t) / √ᾱ_t < 10.
  np.testing.assert_allclose(found, np.repeat(images[labels][:, None], 3, axis=1), atol=1e-5)


def test_journey_trak_measures_the_loss_at_its_step_of_the_image_predicted_there(problem):
  """One step: scores of the predicted images for the loss at that timestep, with the same noise."""
  task, _, train = problem
  shape = (NUM_QUERIES, task.schedule.num_steps + 1, 4, 4, 1)
  states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  step, settings = 700, SETTINGS | dict(projection_dim=40)
  ours = journey_trak(task, states, train, timesteps=(step,), **settings)
  state = states[:, task.schedule.num_steps - 1 - step]
  noise = task.apply_fn(task.params, state, jnp.full(NUM_QUERIES, step))
  images = (state - task.schedule.noise[step] * noise) / task.schedule.signal[step]
  images = np.clip(images, -1, 1)
  expected = trak(task, images, train, measurement=f"loss_at_timestep({step})", **settings)
  for found, reference in zip(ours, expected, strict=True):
    assert_close(found.group_values, reference.group_values, 1e-5)
  assert ours[0].settings["measurement"] == f"journey_loss({step})"


def test_all_parameters_take_part_or_none(problem):
  task, queries, train = problem
  model = register_everything(task, (4, 4, 1))
  assert model.coverage.num_covered == model.coverage.num_parameters == NUM_PARAMETERS

  def used_twice(params, x_t, t):
    return net(params, net(params, x_t, t), t)

  with pytest.raises(ValueError, match="those of all parameters"):
    trak(jaxinf.Task(used_twice, task.params, task.schedule), queries, train, **SETTINGS,
         projection_dim=8)  # fmt: skip


def test_impossible_arguments_are_refused(problem):
  task, queries, train = problem
  settings = SETTINGS | dict(projection_dim=8)
  flips = jaxinf.DrawDesign(random_flip=True)
  for wrong, message in (
    (dict(projection="gaussian"), "Unknown projection"),
    (dict(projection_dim=0), "at least one dimension"),
    (dict(damping=0.0), "damping"),
    (dict(draw_groups=3), "do not split into 3"),
    (dict(query_design=flips), "mirrors"),
    (dict(block_mib=0), "block_mib positive"),
    (dict(checkpoints=({"in": np.zeros(3)},)), r"checkpoints\[0\]"),
    (dict(measurement="cosine"), "Unknown measurement"),
    (dict(train_measurement="trajectory"), "of trajectories"),
    (dict(measurement="journey_loss(5)"), "of predictions: .*predicted_images"),
  ):
    with pytest.raises(ValueError, match=message):
      trak(*problem, **(settings | wrong))
  broken = jaxinf.Task(net, jax.tree.map(lambda x: x * jnp.inf, task.params), task.schedule)
  with pytest.raises(ValueError, match="not finite"):
    trak(broken, queries, train, **settings)
  with pytest.raises(ValueError, match="state for each"):
    journey_trak(task, queries[:, None], train, timesteps=(3,), **settings)
  with pytest.raises(ValueError, match="Timesteps must lie"):
    states = np.zeros((1, task.schedule.num_steps + 1, 4, 4, 1), np.float32)
    predicted_images(task, states, (task.schedule.num_steps,))
