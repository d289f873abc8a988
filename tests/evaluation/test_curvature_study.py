"""The study's two numbers against dense linear algebra on a net small enough for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxinf import (
  KFAC,
  Compute,
  DiffusionModel,
  Draws,
  Examples,
  Identity,
  Solver,
  fit_curvature,
)
from jaxinf.curvature.targets import curvature_pairs
from jaxinf.diffusion.noise import predict
from jaxinf.engine.worklist import Rows
from jaxinf.evaluation.curvature_study import curvature_study
from jaxinf.layers.specs import to_matrices
from jaxinf.report.studies import write_curvature_study
from tests import nets
from tests.evaluation.gradients import gradients_of

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # parameters are random

NUM, QUERIES, DAMPINGS = 12, 3, (1e-2, 1.0)
DRAWS = Draws(2, seed=2)
SHAPE = (3, 3, 2)
PARAMS = {
  "first": {"kernel": (3, 3, 2, 3), "bias": (3,)},
  "second": {"kernel": (1, 1, 3, 2), "bias": (2,)},
}
KINDS = {"K-FAC": KFAC(samples=4), "identity": Identity()}
# To 1e-5 of the right-hand side, which a damping of 1e-2 can make 1e-3 of the solution.
SOLVER = Solver(tolerance=1e-5, max_iterations=500, sketch_rank=20)
TRAIN, ASKED = (Examples(nets.random_images(num, SHAPE, num)) for num in (NUM, QUERIES))


def network(params, x_t, t):
  del t
  return nets.conv(params["second"], jnp.tanh(nets.conv(params["first"], x_t)))


MODEL = DiffusionModel(network, nets.random_params(PARAMS), nets.PROCESS)
COMPUTE = Compute(devices=jax.local_devices()[:1])
FIT = functools.partial(
  fit_curvature, MODEL, TRAIN, draws=Draws(1, seed=2), skip=(), compute=COMPUTE
)


@pytest.fixture(scope="module")
def kept():
  return {}


def study(kept):
  def keep(name, compute):
    if name not in kept:
      kept[name] = compute()
    return kept[name]

  return curvature_study(
    FIT,
    queries=ASKED,
    train=TRAIN,
    dampings=DAMPINGS,
    gradient_draws=DRAWS,
    kinds=KINDS,
    solver=SOLVER,
    compute=COMPUTE,
    keep=keep,
  )


@pytest.fixture(scope="module")
def curvature():
  """For its layers."""
  return FIT(Identity())


@pytest.fixture(scope="module")
def found(kept):
  return study(kept)


def rows(curvature, tree) -> np.ndarray:
  """[n, P] float64 from a pytree of arrays [n, ...] like the parameters."""
  return flat(to_matrices(curvature.layers, tree))


def flat(matrices) -> np.ndarray:
  """[n, P] float64 of layer name → [n, ...]."""
  return np.concatenate([np.reshape(m, (len(m), -1)) for m in matrices.values()], 1).astype(float)


@pytest.fixture(scope="module")
def dense(curvature):
  """The exact GGN [P, P] in float64."""
  pairs, _ = curvature_pairs(MODEL.process, 2, Rows.of(TRAIN, 1).padded_batch(0, NUM))
  outputs = lambda params: predict(MODEL.apply_fn, params, pairs).reshape(-1)
  jacobian = rows(curvature, jax.jacrev(outputs)(MODEL.params))
  return 2 / np.prod(SHAPE) * jacobian.T @ jacobian / NUM


def test_errors_and_rank_correlations_are_those_of_dense_solves(curvature, found, dense):
  queries = flat(gradients_of(curvature, ASKED, "query_gradients", DRAWS))
  train = flat(gradients_of(curvature, TRAIN, "train_gradients", DRAWS))
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


def test_solutions_are_kept_for_a_study_that_was_stopped(found, kept, monkeypatch):
  monkeypatch.setattr("jaxinf.curvature.ggn.GGN.solve", lambda *a, **k: pytest.fail("solved again"))
  again = study(kept)
  np.testing.assert_array_equal(again.errors, found.errors)


def test_the_page_and_the_table_show_every_approximation_and_damping(found, tmp_path):
  page, figure = write_curvature_study(tmp_path, found)
  text = page.read_text()
  for name in found.names:
    assert name in text and name in found.table()
  assert all(f"{damping:.0e}" in text and f"{damping:.0e}" in found.table() for damping in DAMPINGS)
  assert figure.read_bytes().startswith(b"\x89PNG")


def test_dampings_are_needed_and_positive():
  options = dict(queries=ASKED, train=TRAIN, gradient_draws=DRAWS)
  with pytest.raises(ValueError, match="dampings must be a non-empty sequence"):
    curvature_study(FIT, dampings=(), **options)
  with pytest.raises(ValueError, match="damping must be positive"):
    curvature_study(FIT, dampings=(0.0,), **options)
