"""The account of memory against the arrays that a fit really makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.curvature.fit import fit_curvature, partition
from jaxinf.curvature.memory import layer_memory, memory_table
from jaxinf.diffusion.objective import Noised
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from tests import nets

SHAPE, BATCH = (4, 4, 1), 3


@pytest.fixture(scope="module")
def model():
  task = nets.conv_task()
  return register(task.apply_fn, task.params, SHAPE, Selection())


def account(model, method="ekfac"):
  return layer_memory(model, nets.conv_task().params, SHAPE, batch_size=BATCH, method=method)


def test_sums_and_eigenbases_are_as_large_as_the_account_says(model):
  task, rng = nets.conv_task(), np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32)
  pairs = Noised(images, jnp.arange(BATCH), images)
  sums = model.factor_sums(task.params, pairs, lambda out: out[None], jnp.ones(BATCH))
  fitted = fit_curvature(task, np.asarray(images).clip(-1, 1), draws=1, seed=0, method="ekfac")
  size = lambda tree: sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
  for m in account(model):
    assert m.sums == size(sums[m.layer.name])
    assert m.eigenbasis == size(fitted.bases[m.layer.name])
    # in the second pass both Q lie on the device in float32
    basis = fitted.bases[m.layer.name]
    assert m.rotations == size((basis.q_in, basis.q_out)) // 2


def test_workspace_holds_inputs_at_all_positions_and_a_matrix_a_pair(model):
  memory = {m.layer.name: m for m in account(model)}
  # 16 positions of 3 · 3 · 1 inputs and a bias, and matrices 3 × 10; one position for the time
  assert memory["conv_in"].workspace == 4 * BATCH * (16 * 10 + 3 * 10)
  assert memory["time"].workspace == 4 * BATCH * (1 * 3 + 3 * 3)
  first_pass = {m.layer.name: m for m in account(model, "kfac")}
  assert first_pass["conv_in"].workspace == 4 * BATCH * 16 * 10
  assert first_pass["conv_in"].rotations == 0


def test_partitions_share_the_layers_and_the_table_shows_the_largest(model):
  parts = partition(model.layers, 2)
  assert sorted(name for names in parts for name in names) == sorted(
    layer.name for layer in model.layers
  )
  squares = {layer.name: sum(d * d for d in layer.matrix_shape) for layer in model.layers}
  sizes = [sum(squares[name] for name in names) for names in parts]
  # the largest first, each to the smaller part: they differ by at most one layer
  assert abs(sizes[0] - sizes[1]) <= max(squares.values())
  lines = memory_table(account(model), parts).splitlines()
  assert len(lines) == 1 + len(model.layers) + 2
  assert lines[-2].strip().startswith("all layers")
  assert lines[-1].strip().startswith("most of 2 partitions")
