"""Influence scores: a naive float64 twin, invariances, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxinf
from jaxinf import Compute, Draws, Examples
from jaxinf.diffusion.measurements import LOSS, measurement_named
from tests import nets
from tests.diffusion.measured import random_examples
from tests.twins import (
  INDEPENDENT,
  assert_close,
  draw_gradients,
  keys_of,
  pairs_of,
  twin_scores,
  weighted_errors,
)

DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)
DAMPING = 1e-3


def gradients_of(problem, name: str, examples=None):
  """The float64 twin's gradients of the queries or of the training examples."""
  curvature = problem["curvature"]
  examples = (
    problem["queries" if name == "query_gradients" else "train"] if examples is None else examples
  )
  return draw_gradients(curvature.model, curvature.layers, examples, name, DRAWS)


@pytest.fixture(scope="module")
def query_grads(problem):
  return gradients_of(problem, "query_gradients")


@pytest.fixture(scope="module")
def train_grads(problem):
  return gradients_of(problem, "train_gradients")


def test_scores_equal_a_naive_float64_twin(problem, scores, query_grads, train_grads):
  expected = twin_scores(problem["curvature"], query_grads, train_grads, DAMPING)
  assert_close(scores.values, expected, 1e-5)


@pytest.mark.parametrize("power", [0.5, 0.0])
def test_draws_weighted_by_a_power_of_their_loss_equal_a_naive_twin_and_are_centred(
  problem, settings, query_grads, train_grads, power, tmp_path
):
  """Each replicate's weights are ℓ^(p − 1), scaled so that its mean loss stays; so in a store."""
  curvature, draws = problem["curvature"], dataclasses.replace(DRAWS, loss_power=power)
  model, train = curvature.model, problem["train"]
  values = []
  for pairs in pairs_of(model, train, "train_gradients", DRAWS):
    outputs = model.apply_fn(model.params, pairs.inputs, pairs.time)
    losses = np.asarray(weighted_errors(outputs, pairs), float).reshape(DRAWS.replicates, -1)
    weights = losses ** (power - 1)
    weights *= losses.sum(1, keepdims=True) / (weights * losses).sum(1, keepdims=True)
    values.append(weights.ravel())
  weighted = {
    name: grads * np.stack(values).reshape(*grads.shape[:2], *(1,) * (grads.ndim - 2))
    for name, grads in train_grads.items()
  }
  expected = twin_scores(curvature, query_grads, weighted, DAMPING)
  expected -= expected.mean(axis=1, keepdims=True)
  asked = {"query_draws": DRAWS}
  found = jaxinf.influence(**problem, **(settings | {"draws": draws} | asked))
  assert_close(found.values, expected, 1e-5)
  assert found.settings["loss_power"] == power and found.settings["query_loss_power"] == 1
  store = jaxinf.build_store(tmp_path, curvature, train=train, draws=draws, compression=None)
  assert_close(store.query(problem["queries"], damping=DAMPING, draws=DRAWS).values, expected, 1e-5)
  assert jaxinf.open_store(tmp_path, curvature).draws.power == power


def test_training_draws_have_half_the_power_by_default_and_no_other_has(problem, settings):
  default = jaxinf.influence(**problem, **(settings | {"draws": Draws(4, 2)}))
  half = jaxinf.influence(**problem, **(settings | {"draws": Draws(4, 2, loss_power=0.5)}))
  np.testing.assert_array_equal(default.values, half.values)
  assert Draws(4, loss_power=0.5).of_queries(None).power == 1
  with pytest.raises(ValueError, match="Curvature is of the loss itself"):
    jaxinf.fit_curvature(
      problem["curvature"].model, problem["train"], draws=Draws(4, loss_power=0.5)
    )


def test_relative_dampings_are_each_layers_own(problem, settings, query_grads, train_grads):
  """In a sweep, whose scores say their kind; TRAK, whose Fisher knows no layers, has none."""
  curvature = problem["curvature"]
  several = [jaxinf.RelativeDamping(rho) for rho in (1e-2, 1.0)]
  rest = {name: value for name, value in settings.items() if name != "damping"}
  sweep = jaxinf.influence_sweep(**problem, **rest, dampings=several)
  for damping in several:
    expected = sum(
      twin_scores(
        dataclasses.replace(curvature, bases={name: basis}),
        query_grads,
        train_grads,
        damping.rho * basis.eigenvalues.mean(),
      )
      for name, basis in curvature.bases.items()
    )
    found = sweep.at(damping)
    assert_close(found.values, expected, 1e-5)
    assert (found.settings["damping"], found.settings["damping_kind"]) == (damping.rho, "relative")
  with pytest.raises(ValueError, match="damping must be a number here"):
    examples = {name: problem[name] for name in ("queries", "train")}
    jaxinf.trak(curvature.model, **examples, damping=several[0], projection=4, draws=DRAWS)


def test_flips_are_of_training_images_and_never_of_queries(
  problem, settings, scores, query_grads, tmp_path
):
  """In a pass, and in a store of the training gradients."""
  curvature, queries = problem["curvature"], problem["queries"]
  train = dataclasses.replace(problem["train"], random_flip=True)
  train_grads = gradients_of(problem, "train_gradients", train)
  expected = twin_scores(curvature, query_grads, train_grads, DAMPING)
  assert not np.allclose(scores.values, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
  found = jaxinf.influence(curvature, queries=queries, train=train, **settings)
  assert_close(found.values, expected, 1e-5)
  assert found.settings["random_flip"]
  store = jaxinf.build_store(tmp_path, curvature, train=train, draws=DRAWS, compression=None)
  found = store.query(queries, damping=DAMPING, draws=DRAWS)
  assert_close(found.values, expected, 1e-5)


@pytest.mark.parametrize("name", ["elbo", "trajectory", "journey_loss(8,5,1)"])
def test_a_query_of_any_measurement_has_the_gradient_of_its_value(
  name, problem, settings, train_grads
):
  """By name and as an object: scores are products with plain gradients of `evaluate`."""
  curvature, measurement = problem["curvature"], measurement_named(name)
  model, num = curvature.model, len(problem["queries"])
  data = random_examples(measurement, num, model.process.num_steps, seed=1)
  if measurement.of == "trajectories":
    data *= 2  # noise leaves [-1, 1]
  keys = keys_of("query_gradients", num, DRAWS)

  def value(params, query, keys):
    return measurement.evaluate(model.apply_fn, params, model.process, query[None], keys[None])[0]

  gradient = jax.jit(jax.grad(value))
  leaves = [jax.tree.leaves(gradient(model.params, *row)) for row in zip(data, keys, strict=True)]
  query_grads = {
    layer.name: np.stack([layer.to_matrix(list(map(np.asarray, x))) for x in leaves])[:, None]
    for layer in curvature.layers
  }
  expected = twin_scores(curvature, query_grads, train_grads, DAMPING)
  for asked in (name, dataclasses.replace(measurement, name=None)):
    found = jaxinf.influence(
      curvature, queries=Examples(data), train=problem["train"], **settings, measurement=asked
    )
    assert_close(found.values, expected, 1e-5)  # float32 gradients, summed in another order
    assert found.settings["measurement"] == (name if asked == name else "custom")


def test_int8_queries_keep_the_order_at_the_default_damping(problem, settings):
  """Rank correlation over 150 images, at the damping of the configs."""
  train = Examples(nets.random_images(150, seed=2))
  asked = problem | {"train": train} | settings | {"damping": 1e-8}
  exact, quantised = (
    jaxinf.influence(**(asked | {"compression": compression})) for compression in (None, "int8")
  )
  assert not np.array_equal(quantised.values, exact.values)
  for ours, reference in zip(quantised.values, exact.values, strict=True):
    assert stats.spearmanr(ours, reference).statistic >= 0.999


def test_scores_do_not_depend_on_batches_order_padding_or_devices(
  problem, settings, scores, devices
):
  """Permuted rows, batches that need padding, one device or two: the same number for each pair."""
  train, queries = problem["train"], problem["queries"]
  order, back = np.random.default_rng(0).permutation(len(train)), np.arange(len(queries))[::-1]
  permuted = jaxinf.influence(
    problem["curvature"], queries=queries.take(back), train=train.take(order), **settings,
    compute=Compute(batch_size=6, devices=devices),
  )  # fmt: skip
  expected = scores.replicate_values[:, ::-1][:, :, order]
  assert_close(permuted.replicate_values, expected, 1e-5)  # sums of float32 in another order
  np.testing.assert_array_equal(permuted.train_ids, order)
  np.testing.assert_array_equal(permuted.query_ids, back)


def test_standard_errors_come_without_asking(problem):
  """The default splits the draws into the most replicates up to five that are whole pairs."""
  scores = jaxinf.influence(**problem, damping=DAMPING, draws=Draws(4, seed=5))
  assert scores.settings["replicates"] == 2
  assert np.isfinite(scores.std_errors).all()


def test_groups_of_examples_stay_with_their_columns(problem, settings):
  artists = np.array(list("abcabcabcab"))
  train = dataclasses.replace(problem["train"], groups=artists)
  scores = jaxinf.influence(**(problem | {"train": train}), **settings)
  np.testing.assert_array_equal(scores.train_groups, artists)
  sums = [scores.values[:, artists == who].sum(axis=1) for who in "abc"]
  assert_close(scores.by_group().values, np.stack(sums, axis=1), 1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"damping": 0.0}, "damping must be positive"),
    ({"measurement": "losss"}, "Unknown measurement 'losss'; there are: loss"),
    ({"measurement": "loss_at_time(0.5)"}, "is of continuous processes; .* loss_at_timestep"),
    ({"compression": "int7"}, "Unknown compression 'int7'"),
    ({"compression": "projection"}, "cannot be restored batch by batch"),
    ({"precision": "float8"}, "Unknown precision"),
    ({"query_draws": Draws.until_stable()}, "Draws of queries are taken once"),
  ],
)
def test_bad_settings_are_refused(problem, settings, change, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(**problem, **(settings | change))


@pytest.mark.parametrize(
  ("queries", "measurement", "message"),
  [
    (np.zeros((3, 4, 4, 2)), "loss", "do not match training examples"),
    (np.zeros((3, 4, 4)), "loss", "do not match training examples"),
    (np.zeros((2, 4, 4, 1)), "trajectory", "do not match .*several states each"),
    (np.zeros((2, 1001, 4, 4, 2)), "trajectory", "do not match training examples"),
    (np.zeros((2, 1000, 4, 4, 1)), "trajectory", "must have the 1001 states"),
  ],
)
def test_queries_of_another_shape_are_refused(problem, settings, queries, measurement, message):
  asked = problem | {"queries": Examples(queries.astype(np.float32))}
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(**asked, **settings, measurement=measurement)


def test_a_query_that_is_mirrored_is_refused(problem, settings):
  queries = dataclasses.replace(problem["queries"], random_flip=True)
  with pytest.raises(ValueError, match="A query is measured as it is"):
    jaxinf.influence(**(problem | {"queries": queries}), **settings)


def test_a_curvature_of_other_layers_is_refused(problem, settings):
  curvature = problem["curvature"]
  part = dataclasses.replace(curvature, layers=curvature.layers[1:])
  with pytest.raises(ValueError, match="other layers than the model"):
    jaxinf.influence(**(problem | {"curvature": part}), **settings)


def test_scores_that_overflow_are_refused(problem, settings):
  curvature = problem["curvature"]
  broken = curvature.model.with_params(
    jax.tree.map(lambda x: x * jnp.float32(1e30), curvature.model.params)
  )
  with pytest.raises(ValueError, match="Some scores are not finite: gradients overflow"):
    jaxinf.influence(
      **(problem | {"curvature": dataclasses.replace(curvature, model=broken)}), **settings
    )


def test_a_resumed_measurement_needs_a_name(problem, settings, tmp_path):
  unnamed = dataclasses.replace(LOSS, name=None)
  compute = Compute(checkpoint=jaxinf.Checkpointing(tmp_path, every=1))
  with pytest.raises(ValueError, match="give the Measurement a name"):
    jaxinf.influence(**problem, **settings, measurement=unnamed, compute=compute)
