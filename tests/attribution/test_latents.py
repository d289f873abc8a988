"""Influence on moments of latents, and of models that training gave nothing now and then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Draws, Examples, Moments
from jaxinf.attribution.kernels import TRAIN, row_operands
from jaxinf.attribution.queries import gradient_kernel
from jaxinf.core.random import draw_keys, fold_in_each, stream, substreams
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import noised
from jaxinf.engine import Rows

SHAPE, NUM = (2, 2, 1), 6
SCHEDULE = jaxinf.Schedule.linear(10, 0.01, 0.5)
DRAWS = Draws(8, 2, seed=1)


def linear(params, x_t, t, given=None):
  """W x, plus a row of a table for labels."""
  flat = x_t.reshape(len(x_t), -1) @ params["linear"]["kernel"]
  if given is not None:
    flat = flat + params["table"]["embedding"][given["labels"]]
  return flat.reshape(x_t.shape)


def model_of(conditional: bool = False) -> jaxinf.DiffusionModel:
  rng = np.random.default_rng(0)
  params = {"linear": {"kernel": rng.normal(0, 0.3, (4, 4)).astype(np.float32)}}
  if conditional:
    params["table"] = {"embedding": rng.normal(0, 0.3, (4, 4)).astype(np.float32)}
  return jaxinf.DiffusionModel(linear, params, jaxinf.Process.epsilon(SCHEDULE))


def normal(seed: int, num: int = NUM) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(num, *SHAPE)).astype(np.float32)


def scored(model, queries, train):
  curvature = jaxinf.fit_curvature(model, train, jaxinf.KFAC(fisher="exact"), draws=Draws(4))
  return jaxinf.influence(
    curvature, queries=queries, train=train, damping=1e-3, draws=DRAWS, compression=None
  )


def input_factor(curvature: jaxinf.Curvature, layer: str) -> np.ndarray:
  """A of a layer's G ⊗ A, with trace 1, from its eigenbasis."""
  basis = curvature.bases[layer]
  values = basis.eigenvalues.sum(axis=0)
  return basis.q_in @ np.diag(values / values.sum()) @ basis.q_in.T


@pytest.fixture(scope="module")
def queries():
  return Examples(normal(5, 3))


def test_moments_without_variance_are_the_latents_themselves(queries):
  mean, narrow = normal(1), np.full((NUM, *SHAPE), -60.0)  # 1e-13 of a standard deviation
  moments = Moments.of(mean, narrow, scaling_factor=0.5, shift_factor=0.1)
  model = model_of()
  found = scored(model, queries, Examples(moments))
  expected = scored(model, queries, Examples((mean - np.float32(0.1)) * np.float32(0.5)))
  np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-7)
  assert found.settings["latents"] == {"scaling_factor": 0.5, "shift_factor": 0.1, "sample": True}


def mean_loss(params, pairs):
  return jnp.mean(jnp.square(linear(params, pairs.inputs, pairs.time) - pairs.target))


def test_each_draw_of_a_gradient_samples_the_posterior():
  """∇ of the mean over draws of the loss, by hand from the latents that the keys draw."""
  model, own = model_of(), Draws(8, 1, seed=1, shared=False, antithetic=False, timesteps="uniform")
  moments = Moments.of(normal(1), normal(2))
  train = Examples(moments)
  curvature = jaxinf.fit_curvature(model, train, jaxinf.Identity(), draws=Draws(2))
  kernel = gradient_kernel(curvature, train, LOSS, own)
  batch = Rows.of(train, 1).padded_batch(0, NUM)
  grads = kernel(row_operands(model.params, own, TRAIN), batch)["linear"]
  for n in range(NUM):
    keys = draw_keys(fold_in_each(stream(1, TRAIN), jnp.arange(NUM, dtype=jnp.uint32))[n], 8)
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(substreams(keys, "posterior"))
    latents = normal(1)[n] + np.exp(normal(2)[n] / 2) * np.asarray(noise)

    pairs = noised(model.process, jnp.asarray(latents), keys)
    expected = np.asarray(jax.grad(mean_loss)(model.params, pairs)["linear"]["kernel"]).T
    np.testing.assert_allclose(grads[n], expected, rtol=1e-4, atol=1e-6)


def test_left_out_conditioning_moves_gradients_to_the_row_that_stands_for_none():
  """With rate p, p of the draws' gradients reach the null row, and none where p = 0."""
  model, rate = model_of(conditional=True), 0.5
  given = {"labels": np.array([0, 1, 2, 0, 1, 2])}
  plain = Examples(normal(1), conditioning=given)
  dropped = Examples(
    normal(1),
    conditioning=given,
    conditioning_dropout=rate,
    null_conditioning={"labels": np.int32(3)},
  )
  curvatures = [
    jaxinf.fit_curvature(model, train, jaxinf.KFAC(fisher="exact"), draws=Draws(200))
    for train in (plain, dropped)
  ]
  shares = [np.diag(input_factor(curvature, "table")) for curvature in curvatures]
  np.testing.assert_allclose(shares[0], [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
  # Five standard errors of 1,200 coins.
  assert abs(shares[1][3] - rate) < 5 * np.sqrt(0.25 / 1_200)
  assert curvatures[1].settings["conditioning_dropout"] == rate


def test_moments_are_no_queries():
  moments = Examples(Moments.of(normal(1), normal(2)))
  with pytest.raises(ValueError, match="give its latents, .* and no moments"):
    scored(model_of(), moments, moments)


def test_queries_keep_their_conditioning(queries):
  train = Examples(normal(1), conditioning={"labels": np.zeros(NUM, int)})
  asked = Examples(
    queries.data,
    conditioning={"labels": np.zeros(3, int)},
    conditioning_dropout=0.1,
    null_conditioning={"labels": np.int32(3)},
  )
  with pytest.raises(ValueError, match="leave conditioning_dropout out of the queries"):
    scored(model_of(conditional=True), asked, train)
