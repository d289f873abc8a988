"""For every process: curvature is that of its own weighted loss, (2/D) E[w JᵀJ], from jax.jacrev.

A network of two dense layers on vectors, with an embedding of the process's own times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import (
  EKFAC,
  KFAC,
  Compute,
  DiffusionModel,
  Draws,
  ExactGGN,
  Solver,
  fit_curvature,
)
from jaxinf.core.random import fold_in_each, stream
from jaxinf.curvature.targets import FISHERS
from jaxinf.diffusion.noise import noised
from tests import nets, twins
from tests.processes import PROCESSES

NUM, DRAWS, SHAPE = 3, 4, (4,)
TRAIN = nets.examples(NUM, SHAPE)


@pytest.fixture(scope="module", params=PROCESSES.values(), ids=list(PROCESSES))
def model(request) -> DiffusionModel:
  return DiffusionModel(nets.vector_net, nets.random_params(nets.VECTOR_SHAPES), request.param)


def fitted(model: DiffusionModel, kind):
  """With the embedding of time diagonal; the kinds share their compiled first pass."""
  compute = Compute(devices=jax.local_devices()[:1])
  return fit_curvature(model, TRAIN, kind, draws=Draws(DRAWS), diagonal=("time",), compute=compute)


def test_curvature_of_every_kind_is_that_of_the_weighted_loss(model):
  pairs = twins.fit_pairs(model, TRAIN, DRAWS)
  kfac, ekfac = (fitted(model, kind(fisher="exact")) for kind in (KFAC, EKFAC))
  grads = twins.output_gradients(model.apply_fn, model.params, ekfac.layers, pairs)
  for name, basis in ekfac.bases.items():
    assert (basis.q_in is None) == (name == "time")
    twins.assert_close(
      basis.eigenvalues, twins.diagonal_in(basis, twins.second_moments(grads[name]))
    )
  # K-FAC: A of the first layer's own inputs, and G of the gradients at its bias.
  inputs = np.pad(twins.double(pairs.inputs), ((0, 0), (0, 1)), constant_values=1)
  at_outputs = grads["first"][..., -1].reshape(-1, 3)
  a, g = (rows.T @ rows / len(rows) for rows in (inputs, at_outputs))
  twins.assert_close(twins.block(kfac.bases["first"]), np.kron(g, a))
  # The exact GGN, with the blocks between layers. A sketch stands in for the preconditioner, so
  # that nothing is fitted.
  exact = fitted(model, ExactGGN(Solver(precision="float64", sketch_rank=1)))
  tree = nets.random_params(nets.VECTOR_SHAPES, seed=7)
  of = lambda tree: twins.vector(ekfac.layers, tree)
  expected = twins.joined(grads) @ of(tree) + 0.1 * of(tree)
  # The float32 draws round by the program that they are compiled in.
  twins.assert_close(of(exact.multiply(tree, 0.1)), expected, 1e-6)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
def test_targets_have_the_second_moment_of_the_weighted_loss(process):
  """exact: (2 w/D) I for each pair; mc: in expectation, and independent between samples.

  empirical: the gradient of the loss itself.
  """
  num, samples = 2_000, 2
  keys = fold_in_each(stream(0, "curvature"), np.arange(num))
  pairs = jax.jit(lambda data, keys: noised(process, data, keys))(jnp.zeros((num, *SHAPE)), keys)
  scale = 2 * np.asarray(pairs.weights, np.float64) / SHAPE[0]
  outputs = jnp.full_like(pairs.target, 0.3)
  cotangents = lambda fisher: np.asarray(FISHERS[fisher](keys, pairs, samples)(outputs))

  each = cotangents("exact")
  second = np.einsum("kbi,kbj->bij", each, each) / len(each)
  twins.assert_close(second, scale[:, None, None] * np.eye(SHAPE[0]), 1e-6)

  counts = scale > 0  # min-SNR gives no weight to pairs in which nothing is left of the data
  normal = cotangents("mc")[:, counts] / np.sqrt(scale[counts, None])
  rows = np.concatenate(normal, axis=-1)  # [pairs, samples · D]
  # Five standard errors of a mean of products of standard normals, whose variance is at most 2.
  error = 5 * np.sqrt(2 / len(rows))
  np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(samples * SHAPE[0]), atol=error)

  expected = scale[:, None] * (outputs - pairs.target)
  twins.assert_close(cotangents("empirical")[0], expected)
