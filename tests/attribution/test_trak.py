"""TRAK and its relatives: dense float64 twins, limits of the projection, and invariances."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Checkpointing, Compute, DiffusionModel, Draws, Examples, dtrak, trak
from jaxinf.attribution.features import all_layers
from jaxinf.attribution.fisher import DualFisher, PrimalFisher, fisher_of
from jaxinf.attribution.journey import journey_trak, predicted_examples
from jaxinf.compression.projection import Projection
from jaxinf.engine.artifacts import StaleArtifact
from tests import nets
from tests.twins import INDEPENDENT, assert_close, draw_gradients, pairs_of, weighted_errors

NUM_TRAIN, NUM_QUERIES = 11, 3
DAMPINGS = (1e-2, 1e-4)
DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)
SHAPES = {"in": (16, 5), "scale": (5,), "shift": (5,), "out": {"kernel": (5, 16), "bias": (16,)}}
NUM_PARAMETERS = 80 + 5 + 5 + 96
PROJECTION = Projection(40, 5)
SMALL = Compute(batch_size=8)  # queries and training examples are one program


def net(params, x_t, t):
  """Two dense layers on 4 × 4 images, with a scale and a shift in between as of a normalisation."""
  h = jnp.tanh(jnp.dot(x_t.reshape(-1, 16), params["in"]) + jnp.cos(t / 300)[:, None])
  h = h * params["scale"] + params["shift"]
  return nets.dense(params["out"], h).reshape(x_t.shape)


@pytest.fixture(scope="module")
def model():
  return DiffusionModel(net, nets.random_params(SHAPES), nets.PROCESS)


@pytest.fixture(scope="module")
def examples():
  return dict(
    queries=Examples(nets.random_images(NUM_QUERIES, seed=1)),
    train=Examples(nets.random_images(NUM_TRAIN)),
  )


@pytest.fixture(scope="module")
def sweep(model, examples):
  """TRAK at both dampings, with changes."""

  def found(model=model, draws=DRAWS, projection=PROJECTION, compute=SMALL, **changes):
    of = {name: changes.pop(name, each) for name, each in examples.items()}
    method = jaxinf.TRAK(model, projection, DAMPINGS, **changes)
    return method.scores(**of, draws=draws, compute=compute)

  return found


@pytest.fixture(scope="module")
def scores(sweep):
  return sweep()


def gradients_of(model, examples, name, value) -> np.ndarray:
  """[n, S, P] of the float64 twin, layer after layer."""
  layers = all_layers(model, examples).layers
  grads = draw_gradients(model, layers, examples, name, DRAWS, value)
  return np.concatenate([g.reshape(*g.shape[:2], -1) for g in grads.values()], axis=2)


def both_gradients(model, examples, value):
  """The queries' and the training examples'."""
  names = {"queries": "query_gradients", "train": "train_gradients"}
  return [gradients_of(model, examples[which], name, value) for which, name in names.items()]


@pytest.fixture(scope="module")
def of_loss(model, examples):
  return both_gradients(model, examples, weighted_errors)


def dense(projection: Projection) -> np.ndarray:
  """P explicit, [parameters, k]; all seeds share a program."""
  key = jax.random.key_data(projection.key)
  return np.asarray(_dense(dataclasses.replace(projection, seed=0), key), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _dense(projection: Projection, key: jax.Array) -> jax.Array:
  return projection(jnp.eye(NUM_PARAMETERS), jax.random.wrap_key_data(key, impl="threefry2x32"))


def twin(query, train, damping):
  hessian = train.T @ train / len(train)
  return query @ np.linalg.inv(hessian + damping * np.eye(len(hessian))) @ train.T


@pytest.mark.parametrize(("dim", "kind"), [(6, "rademacher"), (40, "normal")])
def test_scores_equal_a_dense_float64_twin(sweep, of_loss, dim, kind):
  """Gradients in float32 carry errors of 1e-6, which a condition number of some 100 multiplies."""
  projection = Projection(dim, 2, kind)
  query, trained = (grads.mean(axis=1) @ dense(projection) for grads in of_loss)
  for found, damping in zip(sweep(projection=projection), DAMPINGS, strict=True):
    expected = twin(query, trained, damping)
    assert_close(found.values, expected, 1e-4)
    assert_close(found.query_replicate_values.mean(axis=0), expected, 1e-4)
    assert found.settings["damping"] == damping and found.settings["projection"] == kind


def test_dtrak_measures_the_squared_norm_of_the_output_on_both_sides(model, examples):
  found = dtrak(
    model, **examples, damping=DAMPINGS[0], projection=PROJECTION, draws=DRAWS, compute=SMALL
  )
  square_norm = lambda out, pairs: jnp.mean(jnp.square(out), axis=(1, 2, 3))
  grads = both_gradients(model, examples, square_norm)
  query, trained = (each.mean(axis=1) @ dense(PROJECTION) for each in grads)
  assert_close(found.values, twin(query, trained, DAMPINGS[0]), 1e-4)


def test_one_damping_is_one_of_a_sweep(model, examples, scores):
  """And the number of dimensions is a projection with the seed of the draws."""
  alone = trak(model, **examples, damping=DAMPINGS[1], projection=40, draws=DRAWS, compute=SMALL)
  np.testing.assert_array_equal(alone.replicate_values, scores[1].replicate_values)
  np.testing.assert_array_equal(alone.query_replicate_values, scores[1].query_replicate_values)


def test_scores_do_not_depend_on_batches_blocks_order_or_devices(sweep, examples, scores, devices):
  """Blocks of one or two rows of gradients a device, permuted images, batches with padding."""
  order, back = np.random.default_rng(0).permutation(NUM_TRAIN), np.arange(NUM_QUERIES)[::-1]
  small = Compute(batch_size=6, devices=devices, block_mib=1.5 * 4 * NUM_PARAMETERS / 2**20)
  permuted = sweep(
    queries=examples["queries"].take(back), train=examples["train"].take(order), compute=small
  )
  for ours, reference in zip(permuted, scores, strict=True):
    expected = reference.replicate_values[:, ::-1][:, :, order]
    assert_close(
      ours.replicate_values, expected, 1e-4
    )  # float32 sums in another order, conditioned
    np.testing.assert_array_equal(ours.train_ids, order)


def test_scores_of_several_models_are_means_each_with_its_projection(model, sweep, scores):
  other = DiffusionModel(net, nets.random_params(SHAPES, seed=1), model.process)
  alone = sweep(other, projection=Projection(40, 6))
  for ours, first, second in zip(sweep((model, other)), scores, alone, strict=True):
    assert_close(
      ours.replicate_values, (first.replicate_values + second.replicate_values) / 2, 1e-6
    )
    assert ours.settings["num_checkpoints"] == 1


def test_the_projection_disappears_as_its_dimension_grows(of_loss):
  """Scores approach those of the gradients themselves, with an error like 1 / √k.

  The errors at two k with a factor of 16 between them stand in the ratio 4; that each is a root
  mean square of 8 seeds × 33 correlated scores leaves the ratio uncertain by about a quarter.
  """
  query, trained = (grads.mean(axis=1) for grads in of_loss)
  expected = twin(query, trained, DAMPINGS[0])

  def error(dim):
    found = []
    for seed in range(8):
      matrix = dense(Projection(dim, seed))
      fisher = fisher_of((trained @ matrix).astype(np.float32))
      found.append(fisher.scores(query @ matrix, DAMPINGS[0]) - expected)
    return np.sqrt(np.mean(np.square(found)))

  few, many = error(1024), error(16 * 1024)
  assert 2.5 <= few / many <= 6.5
  assert many <= 0.1 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize("size", [5, 12], ids=["fewer_than_examples", "more_than_examples"])
def test_both_forms_of_the_fisher_agree_and_differentiate(size):
  """Primal and dual formulas are one function, and `change` its directional derivative.

  Against central differences with a step of 1e-4 in float64: errors of the order 1e-7.
  """
  rng = np.random.default_rng(0)
  features, changes = rng.normal(size=(2, 8, size))
  queries, damping = rng.normal(size=(3, size)), 0.3
  expected = twin(queries, features, damping)
  step = 1e-4
  moved = [twin(queries, features + sign * step * changes, damping) for sign in (1, -1)]
  slope = (moved[0] - moved[1]) / (2 * step)
  inverse = np.linalg.inv(features.T @ features / 8 + damping * np.eye(size))
  slack = 1 - np.einsum("ni,ij,nj->n", features, inverse, features) / 8
  for fisher in (PrimalFisher(features), DualFisher(features)):
    np.testing.assert_allclose(fisher.scores(queries, damping), expected, atol=1e-12)
    np.testing.assert_allclose(fisher.slack(damping), slack, atol=1e-12)
    change = fisher.change(queries, expected, changes, damping)
    np.testing.assert_allclose(change, slope, atol=1e-6)
  assert isinstance(fisher_of(features), PrimalFisher if size == 5 else DualFisher)


def test_replicates_average_to_the_scores_of_all_draws(sweep):
  """The same draws in one replicate or in four: one score, whose spread needs several."""
  whole, parts = (
    sweep(draws=of, query_draws=of)
    for of in (dataclasses.replace(DRAWS, replicates=num) for num in (1, 4))
  )
  for one, four in zip(whole, parts, strict=True):
    assert four.replicate_values.shape == four.query_replicate_values.shape[:1] + one.values.shape
    assert_close(four.values, one.values, 1e-4)
    assert_close(four.query_replicate_values.mean(axis=0), one.values, 1e-4)
    assert np.isnan(one.std_errors).all() and (four.std_errors > 0).all()


def test_an_interrupted_pass_goes_on_from_its_features(sweep, scores, tmp_path):
  """Half of the kept blocks are gone: they alone are made again, and scores are the same."""
  compute = Compute(batch_size=4, block_mib=4e-3, checkpoint=Checkpointing(tmp_path, every=1))
  first = sweep(compute=compute)
  kept = sorted((tmp_path / "model-000" / "train_gradients").glob("*.npz"))
  assert len(kept) >= 4
  for path in kept[2:]:
    path.unlink()
  stamps = [path.stat().st_mtime_ns for path in kept[:2]]
  again = sweep(compute=compute)
  assert [path.stat().st_mtime_ns for path in kept[:2]] == stamps
  for ours, before, reference in zip(again, first, scores, strict=True):
    np.testing.assert_allclose(ours.replicate_values, before.replicate_values, rtol=1e-4)
    assert_close(ours.replicate_values, reference.replicate_values, 1e-4)
  with pytest.raises(StaleArtifact, match="seed"):
    sweep(compute=compute, draws=dataclasses.replace(DRAWS, seed=6))


def test_das_equals_a_dense_float64_twin(model, examples):
  """Leave-one-out changes of the mean output, with unit gradients and residuals, squared."""
  ours = jaxinf.DAS(model, PROJECTION, DAMPINGS).scores(**examples, draws=DRAWS, compute=SMALL)
  grads = both_gradients(model, examples, lambda out, _: jnp.mean(out, axis=(1, 2, 3)))
  units = [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in grads]
  query, trained = (each.mean(axis=1) @ dense(PROJECTION) for each in units)
  errors = np.sqrt(
    [
      jnp.mean(jnp.square(net(model.params, p.inputs, p.time) - p.target), axis=(1, 2, 3))
      for p in pairs_of(model, examples["train"], "train_gradients", DRAWS)
    ]
  )
  residuals = errors.mean(axis=1) / np.linalg.norm(errors, axis=1)
  for found, damping in zip(ours, DAMPINGS, strict=True):
    inverse = np.linalg.inv(trained.T @ trained + NUM_TRAIN * damping * np.eye(40))
    leverages = np.einsum("ni,ij,nj->n", trained, inverse, trained)
    changes = query @ inverse @ trained.T * residuals / (1 - leverages)
    # As for trak, and 1 − h_n is as small as 0.01.
    assert_close(found.values, NUM_TRAIN * np.square(changes), 1e-3)
    assert_close(found.query_replicate_values.mean(axis=0), NUM_TRAIN * np.square(changes), 1e-3)


def test_a_leverage_is_what_leaving_an_example_out_does():
  """With the formula of `das`, `slack` predicts exactly what least squares without an example does.

  Ridge regression y ≈ φ w with the penalty of all N examples; removing n moves the prediction at q
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


def test_examples_predicted_on_the_way_are_those_the_model_believes_in(schedule):
  """A model that knows the images, by their labels: x̂_0 is the image, whatever the state."""
  images = nets.random_images(3, seed=4)
  process = jaxinf.Process.epsilon(schedule)

  def knowing(params, x_t, t, labels):
    signal, noise = (level[:, None, None, None] for level in process.levels(t))
    return params["one"] * (x_t - signal * jnp.asarray(images)[labels]) / noise

  model = DiffusionModel(knowing, {"one": jnp.ones(())}, process)
  states = np.random.default_rng(0).normal(size=(3, schedule.num_steps + 1, 4, 4, 1))
  labels, steps = np.array([2, 0, 1]), (1, 8, 4)
  trajectories = Examples(states.astype(np.float32), conditioning=labels)
  found = predicted_examples(model, trajectories, steps, compute=Compute(batch_size=4))
  # Rounding of ε in float32, times √(1 − ᾱ_t) / √ᾱ_t < 10.
  assert_close(found.data, np.repeat(images[labels][:, None], 3, axis=1), 1e-5)
  np.testing.assert_array_equal(found.conditioning, labels)


def test_journey_trak_measures_the_loss_at_its_step_of_the_example_predicted_there(model, examples):
  """One step: scores of the predicted images for the loss at that timestep, with the same noise."""
  process, step = model.process, 700
  shape = (NUM_QUERIES, process.num_steps + 1, 4, 4, 1)
  states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  settings = dict(damping=DAMPINGS[0], projection=PROJECTION, draws=DRAWS, compute=SMALL)
  ours = journey_trak(
    model, queries=Examples(states), train=examples["train"], timesteps=(step,), **settings
  )
  state, t = jnp.asarray(states[:, process.num_steps - 1 - step]), jnp.full(NUM_QUERIES, step)
  predicted = np.clip(process.clean(state, t, net(model.params, state, t)), -1, 1)
  expected = trak(
    model, queries=Examples(predicted), train=examples["train"],
    measurement=f"loss_at_timestep({step})", **settings,
  )  # fmt: skip
  assert_close(ours.replicate_values, expected.replicate_values, 1e-5)
  assert ours.settings["measurement"] == f"journey_loss({step})"


def test_all_parameters_take_part_or_none(model, examples):
  coverage = all_layers(model, examples["train"]).coverage
  assert coverage.num_covered == coverage.num_parameters == NUM_PARAMETERS

  def used_twice(params, x_t, t):
    return net(params, net(params, x_t, t), t)

  twice = DiffusionModel(used_twice, model.params, model.process)
  with pytest.raises(ValueError, match="those of all parameters"):
    trak(twice, **examples, damping=1e-3, projection=8, draws=DRAWS)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(projection=0), "must be at least 1"),
    (dict(damping=0.0), "damping"),
    (dict(measurement="cosine"), "Unknown measurement"),
    (dict(draws=Draws.until_stable()), "fixed number of draws"),
    (
      dict(train_measurement="trajectory"),
      "train_measurement is of training examples .* trajectory is of trajectories",
    ),
    (dict(measurement="journey_loss(5)"), "do not match .* several states"),
  ],
)
def test_impossible_arguments_are_refused(model, examples, change, message):
  with pytest.raises(ValueError, match=message):
    trak(model, **examples, **(dict(damping=1e-3, projection=8, draws=DRAWS) | change))


def test_impossible_models_are_refused(model, examples):
  asked = examples | dict(damping=1e-3, projection=8, draws=DRAWS)
  broken = model.with_params(jax.tree.map(lambda x: x * jnp.inf, model.params))
  with pytest.raises(ValueError, match="query features are not finite|train features are not"):
    trak(broken, **asked)
  with pytest.raises(ValueError, match="Model 1 has parameters of other shapes"):
    trak((model, nets.conv_model()), **asked)
  with pytest.raises(ValueError, match="There is no model"):
    trak((), **asked)


def test_impossible_trajectories_are_refused(model, examples):
  asked = dict(train=examples["train"], damping=1e-3, projection=8, draws=DRAWS)
  with pytest.raises(ValueError, match="state for each of the 1000 timesteps"):
    few = Examples(np.zeros((1, 1, 4, 4, 1), np.float32))
    journey_trak(model, queries=few, timesteps=(3,), **asked)
  with pytest.raises(ValueError, match="Timesteps must lie"):
    states = Examples(np.zeros((1, 1001, 4, 4, 1), np.float32))
    journey_trak(model, queries=states, timesteps=(1000,), **asked)
