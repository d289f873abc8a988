"""The study's two numbers against dense linear algebra on a net small enough for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxinf import Solver, Task
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.core.types import Batch
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.objective import predict
from jaxinf.evaluation.curvature_study import curvature_study
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from jaxinf.report.studies import write_curvature_study
from tests import nets

NUM, QUERIES, SEED, DAMPINGS, GRADIENT_DRAWS = 12, 3, 2, (1e-2, 1.0), 2
SHAPE = (3, 3, 2)
PARAMS = {
  "first": {"kernel": (3, 3, 2, 3), "bias": (3,)},
  "second": {"kernel": (1, 1, 3, 2), "bias": (2,)},
}
APPROXIMATIONS = {"K-FAC": dict(method="kfac", targets=4), "identity": dict(method="identity")}
# To 1e-5 of the right-hand side, which a damping of 1e-2 can make 1e-3 of the solution.
SOLVER = Solver(tolerance=1e-5, max_iterations=500, sketch_rank=20)


def network(params, x_t, t):
  del t
  return nets.conv(params["second"], jnp.tanh(nets.conv(params["first"], x_t)))


@pytest.fixture(scope="module")
def task():
  return Task(network, nets.random_params(PARAMS), nets.SCHEDULE)


@pytest.fixture(scope="module")
def kept():
  return {}


def study(task, kept):
  def keep(name, compute):
    if name not in kept:
      kept[name] = compute()
    return kept[name]

  return curvature_study(
    task, nets.random_images(NUM, SHAPE), nets.random_images(QUERIES, SHAPE, seed=1),
    dampings=DAMPINGS, draws=1, gradient_draws=GRADIENT_DRAWS, seed=SEED, solver=SOLVER, skip=(),
    approximations=APPROXIMATIONS, keep=keep, devices=jax.local_devices()[:1],
  )  # fmt: skip


@pytest.fixture(scope="module")
def found(task, kept):
  return study(task, kept)


def rows(task, tree) -> np.ndarray:
  """[n, P] float64 from a pytree of arrays [n, ...] like the parameters."""
  layers = register(task.apply_fn, task.params, SHAPE, Selection()).layers
  matrices = to_matrices(layers, tree).values()
  return np.concatenate([np.reshape(m, (len(m), -1)) for m in matrices], 1).astype(np.float64)


def gradients(task, images, name) -> np.ndarray:
  """[n, P] of the loss, by jax.grad one image at a time."""

  def loss(params, image, number):
    key = fold_in_each(stream(SEED, name), DrawDesign().numbers(number[None]))
    keys = jax.vmap(lambda k: draw_keys(k, GRADIENT_DRAWS))(key)
    values = LOSS.evaluate(
      task.apply_fn, params, task.schedule, image[None], keys, design=DrawDesign()
    )
    return values.sum()

  numbers = np.arange(len(images), dtype=np.uint32)
  grads = [jax.grad(loss)(task.params, *pair) for pair in zip(images, numbers, strict=True)]
  return rows(task, jax.tree.map(lambda *g: np.stack(g), *grads))


@pytest.fixture(scope="module")
def dense(task):
  """The exact GGN [P, P] in float64."""
  batch = Batch(
    nets.random_images(NUM, SHAPE), np.arange(NUM, dtype=np.uint32), np.zeros(NUM, np.int32),
    np.ones(NUM, np.float32),
  )  # fmt: skip
  pairs, _ = curvature_pairs(task.schedule, SEED, batch)
  outputs = lambda params: predict(task.apply_fn, params, pairs).reshape(-1)
  jacobian = rows(task, jax.jacrev(outputs)(task.params))
  return 2 / np.prod(SHAPE) * jacobian.T @ jacobian / NUM


def test_errors_and_rank_correlations_are_those_of_dense_solves(task, found, dense):
  queries = gradients(task, nets.random_images(QUERIES, SHAPE, seed=1), "query_gradients")
  train = gradients(task, nets.random_images(NUM, SHAPE), "train_gradients")
  a = found.names.index("identity")
  for i, damping in enumerate(DAMPINGS):
    exact = np.linalg.solve(dense + damping * np.eye(len(dense)), queries.T).T
    approximate = queries / (1 + damping)
    errors = np.linalg.norm(approximate - exact, axis=1) / np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(found.errors[a, i], errors, rtol=2e-3)
    for q in range(QUERIES):
      expected = spearmanr(train @ exact[q], train @ approximate[q]).statistic
      # Two of twelve scores that nearly tie may change places: 6 · 2 / (12 · 143) = 0.007.
      assert abs(found.correlations[a, i, q] - expected) < 0.008


def test_the_reference_is_solved_and_its_scale_is_told(found, dense):
  assert (found.residuals <= SOLVER.tolerance).all()
  np.testing.assert_allclose(found.largest_eigenvalue, np.linalg.eigvalsh(dense)[-1], rtol=1e-2)


def test_kfac_is_nearer_than_the_identity(found):
  kfac, identity = found.correlations.mean(axis=2)
  assert (kfac > identity).all()


def test_solutions_are_kept_for_a_study_that_was_stopped(task, found, kept, monkeypatch):
  monkeypatch.setattr(
    "jaxinf.curvature.exact.GGN.solve", lambda *a, **k: pytest.fail("solved again")
  )
  again = study(task, kept)
  np.testing.assert_array_equal(again.errors, found.errors)


def test_the_page_and_the_table_show_every_approximation_and_damping(found, tmp_path):
  page, figure = write_curvature_study(tmp_path, found)
  text = page.read_text()
  for name in found.names:
    assert name in text and name in found.table()
  assert all(f"{damping:.0e}" in text and f"{damping:.0e}" in found.table() for damping in DAMPINGS)
  assert figure.read_bytes().startswith(b"\x89PNG")


def test_dampings_are_needed_and_positive(task):
  images = nets.random_images(2, SHAPE)
  options = dict(draws=1, gradient_draws=1, seed=0)
  with pytest.raises(ValueError, match="at least one damping"):
    curvature_study(task, images, images, dampings=(), **options)
  with pytest.raises(ValueError, match="damping must be positive"):
    curvature_study(task, images, images, dampings=(0.0,), **options)
