"""Unlearning on a linear network, whose loss is known in closed form: what moves, and how far."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Checkpointing, Compute, DiffusionModel, Draws, Examples, Moments, Unlearning
from jaxinf.attribution.kernels import TRAIN, Replicate, row_operands
from jaxinf.attribution.unlearning import Forgetting, RiseKernel, zero_output_loss
from jaxinf.core.types import Batch
from jaxinf.diffusion.noise import draw_noised, draw_noisiest_times, draw_times
from jaxinf.engine.rehearsal import rehearsing
from tests import nets
from tests.processes import PROCESSES
from tests.twins import assert_close

DIM = 5
PROCESS = PROCESSES["epsilon"]
A, B = PROCESS.exact.a, PROCESS.exact.b
DATA = 3 * np.eye(DIM, dtype=np.float32)  # examples that have nothing in common
DRAWS = Draws(20, 2)
ONE = jax.local_devices()[:1]


def linear(params, x_t, t):
  del t
  return x_t @ params["out"]["kernel"] + params["out"]["bias"]


def best_model() -> DiffusionModel:
  """The linear network of least loss, (E x_t x_tᵀ)⁻¹ E x_t εᵀ: trained to the end."""
  moment = np.mean(A**2) * DATA.T @ DATA / DIM + np.mean(B**2) * np.eye(DIM)
  kernel = np.linalg.solve(moment, np.mean(B) * np.eye(DIM)).astype(np.float32)
  return DiffusionModel(linear, {"out": {"kernel": kernel, "bias": np.zeros(DIM, "f")}}, PROCESS)


MODEL = best_model()


def loss(kernel: np.ndarray, x: np.ndarray) -> float:
  """E over t and ε of the mean square of x_t W − ε, in closed form."""
  of_noise = B[:, None, None] * kernel - np.eye(DIM)
  squares = np.square(A[:, None] * (x @ kernel)).sum(axis=1) + np.square(of_noise).sum(axis=(1, 2))
  return float(squares.mean() / DIM)


def method(**changes) -> Unlearning:
  """λ = 1: each of five examples has a fifth of the anchor, with which 0.2 would be in balance."""
  given = dict(model=MODEL, learning_rate=0.01, batch_size=20, strength=1.0)
  return Unlearning(**given | changes)


def forgetting(queries: np.ndarray, **changes) -> Forgetting:
  of = method(**changes)
  compute = Compute(devices=ONE)
  return Forgetting(of, Examples(queries), Examples(DATA), DRAWS, compute, 1.0)


@functools.cache
def both_scores():
  """Scores of two queries, the training examples 3 and 1, by copies that are trained together."""
  queries = Examples(DATA[[3, 1]])
  compute = Compute(devices=ONE)
  return method().scores(queries=queries, train=Examples(DATA), draws=DRAWS, compute=compute)[0]


def test_the_loss_of_the_query_rises_to_the_goal_and_no_further():
  before = [loss(MODEL.params["out"]["kernel"], x) for x in DATA]
  kernels = forgetting(DATA[[3, 1]]).unlearned(np.arange(2))["out"]["kernel"]
  for kernel, query in zip(kernels, (3, 1), strict=True):
    after = [loss(kernel, x) for x in DATA]
    assert before[query] < 0.75
    # Five steps, between two looks, add some 0.08; a look has the noise of 256 draws.
    assert after[query] == pytest.approx(0.985, abs=0.06)
    rise = np.array(after) - before
    assert rise[query] > 5 * np.delete(rise, query).max()  # the training set holds the others


def test_the_twin_of_a_query_supports_it_most():
  scores = both_scores()
  assert scores.top(1).ids[:, 0].tolist() == [3, 1]
  twins = scores.values[[0, 1], [3, 1]]
  others = np.delete(scores.values[0], 3)
  assert (twins > 0.1).all() and (twins > 3 * np.abs(others).max()).all()
  assert (np.abs(scores.values) <= 1).all()
  assert scores.replicate_values.shape == (2, 2, DIM)
  assert scores.settings["untrained_loss"] == pytest.approx(1)


def test_scores_are_relative_rises_of_the_loss_under_common_draws_of_the_noisiest_times():
  """Against a loop in float64 over the same draws."""
  kernel = np.asarray(MODEL.params["out"]["kernel"]).astype(float)
  copies = np.stack([1.5 * kernel, 0.8 * kernel]).astype(np.float32)
  draws = Draws(8, 1)
  batch = Batch(DATA[:3], np.arange(3, dtype=np.uint32), np.zeros(3, np.int32), np.ones(3))
  params, origin = row_operands(MODEL.params, draws, TRAIN)
  of = Replicate.of(draws)
  weights = {"out": {"kernel": copies, "bias": None}}
  found = RiseKernel(linear, PROCESS, of, 0.7)((params, weights, origin), batch)
  keys = of.keys(origin, batch)
  t = draw_noisiest_times(PROCESS, keys, draws, 0.7)
  assert int(t.min()) == 3 and len(np.unique(t)) >= 4  # of ten timesteps
  pairs = draw_noised(PROCESS, jnp.repeat(DATA[:3], 8, axis=0), t, keys, draws)
  inputs, target = (np.asarray(x, np.float64) for x in (pairs.inputs, pairs.target))
  of_kernel = lambda w: np.square(inputs @ w - target).mean(axis=1).reshape(3, 8)
  expected = [
    ((of_kernel(w) - of_kernel(kernel)) / (of_kernel(w) + of_kernel(kernel))).mean(axis=1)
    for w in copies.astype(float)
  ]
  assert_close(found, np.stack(expected, axis=1), 1e-5)


@pytest.mark.parametrize("name", ["epsilon", "flow_logit_normal", "edm"])
def test_the_noisiest_times_are_those_of_the_law_above_a_quantile(name):
  process, draws = PROCESSES[name], Draws(200, 1, antithetic=False)
  keys = Replicate.of(draws).keys((0, 0), Batch(None, np.zeros(1, np.uint32), np.zeros(1, int), 1))
  every = np.sort(draw_times(process, keys, draws))
  np.testing.assert_array_equal(np.sort(draw_noisiest_times(process, keys, draws, 1.0)), every)
  found = np.sort(draw_noisiest_times(process, keys, draws, 0.25))
  # The upper quarter of 200 stratified times, each of which is known to a part in 200.
  np.testing.assert_allclose(np.median(found), np.quantile(every, 0.875), rtol=0.1)
  assert found[0] >= every[148] and found[-1] <= process.times(jnp.ones(1))[0]


def test_only_the_chosen_weights_move_each_at_first_by_the_learning_rate():
  """Adam's first step is the learning rate times the sign of the gradient."""
  one = forgetting(DATA[:1], max_steps=1).unlearned(np.arange(1))
  assert one["out"]["bias"] is None  # a vector
  step = np.abs(one["out"]["kernel"][0] - MODEL.params["out"]["kernel"])
  np.testing.assert_allclose(step, 0.01, rtol=1e-3)
  named = forgetting(DATA[:1], max_steps=1, weights=("bias$",)).unlearned(np.arange(1))
  assert named["out"]["kernel"] is None
  np.testing.assert_allclose(np.abs(named["out"]["bias"][0]), 0.01, rtol=1e-3)


def test_a_killed_call_goes_on_with_the_next_chunk_and_chunks_change_nothing(tmp_path, monkeypatch):
  queries, folder = Examples(DATA[[3, 1]]), tmp_path / "kept"
  compute = Compute(devices=ONE, query_chunk=1, checkpoint=Checkpointing(folder))
  ask = lambda: method().scores(queries=queries, train=Examples(DATA), draws=DRAWS, compute=compute)
  whole, asked = ask()[0], []
  # One copy alone, or two in one vmapped product.
  assert_close(whole.replicate_values, both_scores().replicate_values, 1e-3)
  (folder / "unlearning" / "rows-000001.npz").unlink()
  of_rows = Forgetting.scores_of
  monkeypatch.setattr(
    Forgetting, "scores_of", lambda self, rows: asked.append(rows.tolist()) or of_rows(self, rows)
  )
  np.testing.assert_array_equal(ask()[0].replicate_values, whole.replicate_values)
  assert asked == [[1]]


def test_copies_are_the_same_on_two_devices_and_each_is_given_its_own_conditioning():
  """Three queries: one image with two labels, and another; two copies on each of two devices."""
  images, labels = nets.random_images(2, seed=1)[[0, 0, 1]], np.array([0, 2, 1])
  train = Examples(nets.random_images(5), conditioning=np.arange(5) % 3)
  # The network is random, and has nothing to forget.
  of = Unlearning(nets.conditional_model(), 0.01, untrained_loss=1e3, max_steps=3, batch_size=4)
  found = [
    of.scores(
      queries=Examples(images, conditioning=labels),
      train=train,
      draws=Draws(4, 1),
      compute=Compute(devices=jax.local_devices()[:num]),
    )[0].values
    for num in (1, 2)
  ]
  assert_close(found[1], found[0], 1e-3)  # vmapped products of other sizes, through Adam
  assert not np.allclose(found[0][0], found[0][1], rtol=1e-2)


def test_a_rehearsal_takes_all_steps_of_all_queries_into_account():
  """Of a random network, which has nothing to forget."""
  ask = lambda: method(max_steps=100).scores(
    queries=Examples(100 * DATA[:2]), train=Examples(DATA), draws=DRAWS,
    compute=Compute(devices=ONE),
  )  # fmt: skip
  with rehearsing({2: 40, DIM: 10 * DIM}) as found:
    ask()
  assert {p.label: p.batches for p in found.passes} == {
    "unlearning": 100 * 40 / 2, "losses after unlearning": 10
  }  # fmt: skip
  assert found.parts > 0


def test_the_loss_of_zeros_in_closed_form():
  rng = np.random.default_rng(0)
  data = rng.normal(size=(40, 6)).astype(np.float32)
  square = float(np.square(data.astype(float)).mean())
  expected = {
    "epsilon": 1,
    "sample": square,
    "v": np.mean(PROCESSES["v"].exact_weights * (A**2 + B**2 * square)),
    "flow": 1 + square,
  }
  for name, value in expected.items():
    assert zero_output_loss(PROCESSES[name], Examples(data)) == pytest.approx(value, rel=1e-5)
  edm = data * PROCESSES["edm"].sigma_data / np.sqrt(square)  # its targets have unit variance
  assert zero_output_loss(PROCESSES["edm"], Examples(edm)) == pytest.approx(1, rel=1e-5)
  mean, logvar = rng.normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
  latents = Moments.of(mean, logvar, scaling_factor=0.5, shift_factor=0.1)
  square = 0.25 * np.mean(np.square(mean - 0.1) + np.exp(logvar))
  found = zero_output_loss(PROCESSES["sample"], Examples(latents))
  assert found == pytest.approx(square, rel=1e-5)


def test_what_cannot_be_unlearned_is_refused():
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  with refuse("learning_rate must be positive and finite; got 0"):
    method(learning_rate=0)
  with refuse("noisiest is a share of the times, in (0, 1]; got 2"):
    method(noisiest=2)
  with refuse("max_steps must be at least 1"):
    method(max_steps=0)
  with refuse("weights: 'kernle' finds no parameter. Expressions are searched for in paths such"):
    method(weights=("kernle",))
  with refuse("No parameter is left to fine-tune: all are vectors, or of attention"):
    Unlearning(MODEL.with_params({"attention": {"kernel": np.ones((2, 2), "f")}}), 0.1)
  both = dict(queries=Examples(DATA[:1]), train=Examples(DATA))
  with refuse("takes a fixed number of draws"):
    method().scores(**both, draws=Draws.until_stable())
  unknown = forgetting(100 * DATA[:1])
  with refuse("The loss of query 0 is 95% of the untrained loss, 1, before anything"):
    unknown.unlearned(np.arange(1))
