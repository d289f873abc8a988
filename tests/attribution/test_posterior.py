"""Covariances over drawn parameters: their law, influence as the limit, and what bending adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxinf
from jaxinf import Compute, DiffusionModel, Draws, fit_curvature
from jaxinf.attribution import posterior
from jaxinf.attribution.posterior import PosteriorCovariance, drawn_parameters, temperature_of
from jaxinf.curvature.curvature import ExactCurvature
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine.maps import map_batches
from tests import nets
from tests.twins import INDEPENDENT, Killed, assert_close, keys_of

DAMPING, SHAPE, NUM_TRAIN, NUM_QUERIES = 1e-2, (2,), 5, 3
DRAWS, QUERY_DRAWS = Draws(4, 2, **INDEPENDENT, seed=5), Draws(2, 1, **INDEPENDENT, seed=3)
PAIRS = 1500  # of parameter draws in each of the two replicates

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random


def linear_net(params, x_t, t):
  """Linear in its six parameters, so that every loss is a quadratic form of them."""
  del t
  return nets.dense(params["net"], x_t)


@pytest.fixture(scope="module")
def asked():
  """Arguments that `influence` and `posterior_covariance` share."""
  params = nets.random_params({"net": {"kernel": (2, 2), "bias": (2,)}}, seed=1)
  model = DiffusionModel(linear_net, params, nets.PROCESS)
  train, queries = nets.examples(NUM_TRAIN, SHAPE), nets.examples(NUM_QUERIES, SHAPE, seed=1)
  curvature = fit_curvature(model, train, draws=Draws(20))
  return dict(
    curvature=curvature, queries=queries, train=train, damping=DAMPING, draws=DRAWS,
    query_draws=QUERY_DRAWS,
  )  # fmt: skip


def inverse(curvature) -> np.ndarray:
  """(H + λI)⁻¹ [6, 6] in the order of ravel_pytree."""
  flat, unravel = ravel_pytree(curvature.model.params)
  columns = [curvature.precondition(unravel(row), DAMPING) for row in np.eye(len(flat))]
  return np.stack([np.concatenate([x.ravel() for x in jax.tree.leaves(c)]) for c in columns])


def flat(params) -> np.ndarray:
  """Parameters [V, …] as [V, 6]."""
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def hessians(model, examples, draws, name) -> np.ndarray:
  """[n, 6, 6] of each example's loss, a mean over its draws."""
  theta, unravel = ravel_pytree(model.params)

  def loss(theta, data, keys):
    given = model.apply_fn, unravel(theta), model.process, data[None], keys[None]
    return LOSS.evaluate(*given)[0]

  each = jax.jit(jax.vmap(jax.hessian(loss), in_axes=(None, 0, 0)))
  keys = keys_of(name, len(examples), draws)
  return np.asarray(each(theta, jnp.asarray(examples.data), keys), np.float64)


def test_parameters_are_drawn_from_the_posterior_in_pairs(asked):
  curvature, num = asked["curvature"], 20_000
  temperature = temperature_of(curvature, DAMPING, 0.1)
  found = flat(
    drawn_parameters(
      curvature, damping=DAMPING, temperature=temperature, seed=0, numbers=np.arange(num)
    )
  )
  theta = np.asarray(ravel_pytree(curvature.model.params)[0], np.float64)
  deltas = found[:num] - theta
  np.testing.assert_allclose(found[num:] - theta, -deltas, rtol=0, atol=1e-6)  # float32
  expected = temperature * inverse(curvature)
  variances = np.diag(expected)
  assert np.sqrt(variances.sum()) == pytest.approx(0.1 * np.linalg.norm(theta), rel=1e-5)
  noise = np.sqrt((np.outer(variances, variances) + expected**2) / num)
  assert (np.abs(deltas.T @ deltas / num - expected) < 5 * noise).all()


def covariance(asked, **changes) -> jaxinf.Scores:
  """Of many parameter draws, 500 of them at once."""
  curvature, both = asked["curvature"], {name: asked[name] for name in ("queries", "train")}
  given = dict(parameter_draws=4 * PAIRS, models_at_once=500) | changes
  method = PosteriorCovariance(curvature, (DAMPING,), "loss", QUERY_DRAWS, **given)
  return method.scores(**both, draws=DRAWS)[0]


def test_covariances_are_influence_where_parameters_are_near(asked):
  """Each replicate with its own (t, ε) and parameters, to the noise of P pairs of Gaussians."""
  found = covariance(asked, distance=1e-2)
  expected = jaxinf.influence(**asked, compression=None)
  itself = [
    np.diag(jaxinf.influence(**(asked | change), compression=None).values)
    for change in (
      {"train": asked["queries"], "draws": QUERY_DRAWS},
      {"queries": asked["train"], "query_draws": DRAWS},
    )
  ]
  # The noise of Σ o o' / P is √((K_qq K_nn + K_qn²) / P); here K is of other draws of (t, ε), so
  # that it is the size alone, and noise of a replicate's own is up to twice as large.
  noise = np.sqrt((np.outer(*itself) + expected.values**2) / PAIRS)
  for ours, theirs in zip(found.replicate_values, expected.replicate_values, strict=True):
    assert np.abs((ours - theirs) / noise).max() < 8
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98
  apart = expected.replicate_values[0] - expected.replicate_values[1]
  assert np.abs(apart / noise).max() > 16  # replicates differ by more than is allowed here


def test_far_parameters_add_what_losses_bend(asked):
  """Of quadratic losses: Cov / τ = gᵀ Σ g' + τ / 2 · tr(A Σ A' Σ), Σ = (H + λI)⁻¹."""
  curvature, distance = asked["curvature"], 4.0
  found = covariance(asked, distance=distance)
  linear = jaxinf.influence(**asked, compression=None).values
  sigma, temperature = inverse(curvature), temperature_of(curvature, DAMPING, distance)
  of_queries = hessians(curvature.model, asked["queries"], QUERY_DRAWS, "query_gradients") @ sigma
  of_train = hessians(curvature.model, asked["train"], DRAWS, "train_gradients") @ sigma
  bending = temperature / 2 * np.einsum("qij,nji->qn", of_queries, of_train)
  assert bending.mean() > 3 * np.abs(linear).mean()  # so that it is what is tested
  # Squares of Gaussians have heavier tails: a relative error of some √(8 / 2P).
  assert_close(found.values, linear + bending, 4 * (4 / PAIRS) ** 0.5)


def test_results_do_not_depend_on_what_goes_through_at_once(asked):
  """Odd batches, two devices, and a last program that draws more parameters than are wanted."""
  devices = jax.local_devices()
  ours = jaxinf.posterior_covariance(**asked, parameter_draws=24)
  method = PosteriorCovariance(
    asked["curvature"], (DAMPING,), "loss", QUERY_DRAWS, 24, models_at_once=8
  )
  (theirs,) = method.scores(
    queries=asked["queries"], train=asked["train"], draws=DRAWS,
    compute=Compute(batch_size=6, devices=devices),
  )  # fmt: skip
  # Losses differ by some percent between parameters, and are rounded at 1e-7.
  assert_close(theirs.replicate_values, ours.replicate_values, 1e-4)
  assert theirs.settings == ours.settings and np.isfinite(ours.std_errors).all()


def test_a_killed_covariance_goes_on_where_it_was(asked, tmp_path, monkeypatch):
  expected, calls = jaxinf.posterior_covariance(**asked, parameter_draws=72), []

  def mapped(*args, most=6, **kwargs):
    calls.append(args)
    if len(calls) == most:
      raise Killed
    return map_batches(*args, **kwargs)

  compute = Compute(checkpoint=jaxinf.Checkpointing(tmp_path))
  monkeypatch.setattr(posterior, "map_batches", mapped)
  with pytest.raises(Killed):
    jaxinf.posterior_covariance(**asked, parameter_draws=72, compute=compute)
  monkeypatch.setattr(posterior, "map_batches", functools.partial(mapped, most=0))
  found = jaxinf.posterior_covariance(**asked, parameter_draws=72, compute=compute)
  np.testing.assert_array_equal(found.replicate_values, expected.replicate_values)
  # Two replicates of three programs, each for queries and training examples: 12, and the one that
  # was stopped between the two begins again with its queries.
  assert len(calls) == 12 + 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"parameter_draws": 10}, "take a multiple of 4, such as 8"),
    ({"parameter_draws": 4}, "two or more pairs in each of 2 replicates .* such as 8"),
    ({"distance": 0.0}, "distance must be a positive share"),
    ({"damping": 0.0}, "damping must be positive"),
    ({"queries": nets.examples(2, (3,))}, "do not match training examples"),
  ],
)
def test_bad_arguments_are_refused(asked, change, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.posterior_covariance(**(asked | change))


def test_the_exact_curvature_is_refused(asked):
  exact = ExactCurvature(**vars(asked["curvature"]), ggn=None)
  with pytest.raises(ValueError, match="which the exact curvature has not"):
    jaxinf.posterior_covariance(**(asked | {"curvature": exact}))
