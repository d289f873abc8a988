"""The account of memory against the arrays that a fit really makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import EKFAC, KFAC, Draws, Shampoo, fit_curvature
from jaxinf.curvature.fit import partition
from jaxinf.curvature.memory import layer_memory, memory_table
from jaxinf.engine.worklist import Rows
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import layers_of
from tests import nets

BATCH = 3


@pytest.fixture(scope="module")
def model():
  return nets.conv_model()


@pytest.fixture(scope="module")
def layers(model):
  return layers_of(model, nets.examples(BATCH), Selection())


def account(model, layers, kind=EKFAC()):
  row = Rows.of(nets.examples(1), draws=1).padded_batch(0, 1)
  return layer_memory(layers, model, row, kind, batch_size=BATCH)


def test_sums_and_eigenbases_are_as_large_as_the_account_says(model, layers):
  sums = layers.factor_sums(
    model.params, nets.some_pairs(BATCH), lambda out: out[None], jnp.ones(BATCH)
  )
  fitted = fit_curvature(model, nets.examples(BATCH), EKFAC(), draws=Draws(1))
  size = lambda tree: sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
  for m in account(model, layers):
    assert m.sums == size(sums[m.layer.name])
    assert m.eigenbasis == size(fitted.bases[m.layer.name])
    # in the second pass both Q lie on the device in float32
    basis = fitted.bases[m.layer.name]
    assert m.rotations == size((basis.q_in, basis.q_out)) // 2


def test_shampoo_takes_what_ekfac_takes_with_moments_of_whole_gradients_for_sums(model, layers):
  for ours, other in zip(account(model, layers, Shampoo()), account(model, layers), strict=True):
    *_, d_out, d_in = ours.layer.matrix_shape
    assert ours.sums == 4 * (d_in**2 + d_out**2)
    rest = ("eigenbasis", "rotations", "workspace")
    assert all(getattr(ours, field) == getattr(other, field) for field in rest)


def test_workspace_holds_inputs_at_all_positions_and_a_matrix_a_pair(model, layers):
  memory = {m.layer.name: m for m in account(model, layers)}
  # 16 positions of 3 · 3 · 1 inputs and a bias, and matrices 3 × 10; one position for the time
  assert memory["conv_in"].workspace == 4 * BATCH * (16 * 10 + 3 * 10)
  assert memory["time"].workspace == 4 * BATCH * (1 * 3 + 3 * 3)
  first_pass = {m.layer.name: m for m in account(model, layers, KFAC())}
  assert first_pass["conv_in"].workspace == 4 * BATCH * 16 * 10
  assert first_pass["conv_in"].rotations == 0


def test_partitions_share_the_layers_and_the_table_shows_the_largest(model, layers):
  parts = partition(layers.layers, 2)
  assert sorted(name for names in parts for name in names) == sorted(
    layer.name for layer in layers.layers
  )
  squares = {layer.name: sum(d * d for d in layer.matrix_shape) for layer in layers.layers}
  sizes = [sum(squares[name] for name in names) for names in parts]
  # the largest first, each to the smaller part: they differ by at most one layer
  assert abs(sizes[0] - sizes[1]) <= max(squares.values())
  lines = memory_table(account(model, layers), parts).splitlines()
  assert len(lines) == 1 + len(layers.layers) + 2
  assert lines[-2].strip().startswith("all layers")
  assert lines[-1].strip().startswith("most of 2 partitions")
