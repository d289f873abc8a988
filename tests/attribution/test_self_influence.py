"""Self-influence: a float64 twin, the diagonal of influence, invariances, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest

import jaxinf
from jaxinf import Checkpointing, Compute, Draws
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.engine.checkpoints import PartialOutputs
from tests.attribution.conftest import NUM_TRAIN
from tests.twins import INDEPENDENT, Killed, assert_close, draw_gradients

DAMPING = 1e-3
DRAWS = Draws(6, 3, **INDEPENDENT, seed=5)


@pytest.fixture(scope="module")
def given(problem):
  return dict(curvature=problem["curvature"], train=problem["train"], damping=DAMPING)


@pytest.fixture(scope="module")
def found(given):
  return jaxinf.self_influence(**given, draws=DRAWS)


def test_values_and_errors_equal_a_naive_float64_twin(given, found):
  """Every pair of different replicates written out, and every replicate left out in turn."""
  curvature = given["curvature"]
  grads = draw_gradients(
    curvature.model, curvature.layers, given["train"], "train_gradients", DRAWS
  )
  products = 0.0
  for name, basis in curvature.bases.items():
    rows = grads[name].reshape(NUM_TRAIN, 3, 2, *grads[name].shape[2:]).mean(axis=2)
    products += np.einsum("naoi,nboi->nab", precondition(rows, basis, DAMPING), rows)
  one, two, three = products[:, 0, 1], products[:, 0, 2], products[:, 1, 2]
  assert_close(found.values, (one + two + three) / 3, 1e-5)
  # Of three replicates two are left: the mean over pairs is then one of the products.
  left_out = np.stack([one, two, three])
  assert_close(found.std_errors, left_out.std(axis=0) * np.sqrt(2), 1e-5)
  assert found.settings["damping"] == DAMPING and not found.settings["biased"]


def test_it_is_the_diagonal_of_influence_with_independent_draws(problem, given):
  """Each within its error, from 120 independent draws on either side."""
  draws = Draws(120, 60, **INDEPENDENT, seed=5)
  found = jaxinf.self_influence(**given, draws=draws, compute=Compute(64))
  scores = jaxinf.influence(
    **problem | {"queries": problem["train"]}, damping=DAMPING, draws=draws, query_draws=draws,
    compression=None, compute=Compute(64),
  )  # fmt: skip
  diagonal, errors = np.diagonal(scores.values), np.diagonal(scores.std_errors)
  z = (found.values - diagonal) / np.hypot(errors, found.std_errors)
  # 11 numbers of variance 1: their mean square is above 3 once in some 10,000 times.
  assert np.mean(z**2) < 3


def test_it_depends_on_no_batches_order_or_devices_and_goes_on_after_a_kill(
  given, found, tmp_path, monkeypatch
):
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  again = given | {"train": given["train"].take(order)}
  compute = Compute(8, checkpoint=Checkpointing(tmp_path, 1))
  save, saved = PartialOutputs.save, []

  def save_and_die(self, outputs):
    save(self, outputs)
    saved.append(sum(map(len, outputs)))
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(PartialOutputs, "save", save_and_die)
    with pytest.raises(Killed):
      jaxinf.self_influence(**again, draws=DRAWS, compute=compute)
  assert 0 < sum(saved) < NUM_TRAIN
  permuted = jaxinf.self_influence(**again, draws=DRAWS, compute=compute)
  assert_close(permuted.values, found.values[order], 1e-5)  # sums of float32 in another order
  assert_close(permuted.std_errors, found.std_errors[order], 1e-4)
  np.testing.assert_array_equal(permuted.ids, order)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(draws=Draws(5, 1)), "2 replicates or more; got 5 draws in one"),
    (dict(draws=Draws.until_stable()), "a fixed number of draws"),
    (dict(damping=0.0), "damping must be positive"),
  ],
)
def test_impossible_questions_are_refused(given, change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    jaxinf.self_influence(**given | change)


def test_the_exact_curvature_is_refused_with_what_to_take(given):
  exact = jaxinf.curvature.curvature.ExactCurvature(
    **{f.name: getattr(given["curvature"], f.name) for f in dataclasses.fields(jaxinf.Curvature)}
  )
  with pytest.raises(ValueError, match="Fit KFAC, EKFAC or Diagonal"):
    jaxinf.self_influence(**given | {"curvature": exact})
