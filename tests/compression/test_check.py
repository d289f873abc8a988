"""When the order counts as lost, what is said then, and that the defaults keep it at λ = 1e-8."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinf.compression.check import LEAST_CORRELATION, fallback_of, verdict
from jaxinf.compression.compression import (
  COMPRESSIONS,
  QUERY_COMPRESSION,
  STORE_COMPRESSION,
  Uncompressed,
)

INT8, INT16 = COMPRESSIONS["int8"], COMPRESSIONS["int16"]
SHAPE, NUM_TRAIN, NUM_QUERIES = (64, 96), 200, 8


def measured(mean, least):
  return {"spearman": mean, "least_spearman": least, "num_queries": 4, "num_examples": 32}


@pytest.fixture(scope="module")
def layer():
  """A layer whose eigenvalues Λ fall from 1 to 1e-8, its eigenvectors, and gradients of size √Λ.

  In the eigenbasis: training gradients, and query gradients.
  """
  rng = np.random.default_rng(0)
  q_out, q_in = (np.linalg.qr(rng.normal(size=(d, d)))[0] for d in SHAPE)
  eigenvalues = np.outer(*(np.logspace(0, -4, d) for d in SHAPE))
  train, queries = (
    rng.normal(size=(num, *SHAPE)) * np.sqrt(eigenvalues) for num in (NUM_TRAIN, NUM_QUERIES)
  )
  return eigenvalues, q_out, q_in, train, queries


def restored(name, rows):
  """Rows [B, d_out, d_in] as a compression gives them back, in float64."""
  compression, shape = COMPRESSIONS[name], np.ones(SHAPE)
  compressed = compression.compress(jnp.asarray(rows, jnp.float32), shape)
  return np.asarray(compression.restore(compressed, shape), np.float64)


def products(queries, train):
  return np.einsum("qij,nij->qn", queries, train)


def least_correlation(scores, others):
  return min(stats.spearmanr(*pair).statistic for pair in zip(scores, others, strict=True))


def test_query_rows_keep_the_order_by_default_at_a_damping_of_1e_8(layer):
  """Against a float64 twin, on a layer that is hard enough for int8 to lose the order."""
  eigenvalues, q_out, q_in, train, queries = layer
  to_parameters = lambda rotated: q_out @ rotated @ q_in.T
  rows, grads = to_parameters(queries / (eigenvalues + 1e-8)), to_parameters(train)
  exact = products(rows, grads)
  found = {
    name: least_correlation(exact, products(restored(name, rows), grads))
    for name in ("int8", QUERY_COMPRESSION)
  }
  assert found["int8"] < 0.9 and found[QUERY_COMPRESSION] >= 0.999


@pytest.mark.parametrize("damping", [1e-10, 1e-8, 1e-2])
def test_rows_of_a_store_keep_the_order_by_default_at_every_damping(layer, damping):
  """Because division by √Λ makes their numbers one size: see store/eigenrows.py."""
  eigenvalues, _, _, train, queries = layer
  widths = np.sqrt(eigenvalues)
  vectors, rows = queries * widths / (eigenvalues + damping), train / widths
  exact = products(vectors, rows)
  assert least_correlation(exact, products(vectors, restored(STORE_COMPRESSION, rows))) >= 0.999


def test_scores_are_off_by_half_a_step_times_the_gradient_at_most(layer):
  """The bound of quantise.py: Σ over blocks of s / 2 · ‖g‖₁, and float32's own rounding."""
  eigenvalues, _, _, train, queries = layer
  rows = (queries / (eigenvalues + 1e-8)).astype(np.float32)
  sizes = np.abs(train).reshape(NUM_TRAIN, -1, 64).sum(axis=2)
  largest = np.abs(rows).reshape(NUM_QUERIES, -1, 64).max(axis=2).astype(np.float64)
  for name, levels in (("int8", 127), ("int16", 32_767)):
    errors = np.abs(products(restored(name, rows), train) - products(rows, train))
    # v / s, the step and their product are each rounded by 2⁻²⁴ of at most max |v|.
    assert (errors <= (0.5 / levels + 2**-22) * (largest @ sizes.T)).all()


@pytest.mark.parametrize(
  ("check", "lost"),
  [
    (measured(1.0, LEAST_CORRELATION), False),
    (measured(0.999, 0.98), True),  # one query is enough: scores are read query by query
    (measured(float("nan"), float("nan")), True),
    (measured(None, None), False),  # nothing was measured
    (None, False),
  ],
)
def test_the_order_is_lost_where_that_of_one_query_is(check, lost):
  assert (verdict(check, INT8) is not None) == lost


def test_a_verdict_says_what_was_measured_and_what_to_do():
  check = measured(0.62, 0.405)
  assert verdict(check, INT8, damping=1e-8) == (
    "At damping 1e-08, int8 query gradients changed the order of the scores: rank correlation with "
    "unrounded scores 0.620, least 0.405, over 4 queries and 32 training examples. Below 0.99 the "
    'order is not safe. Take compression="int16", or a larger damping.'
  )
  both = verdict(check, COMPRESSIONS["int16"], precision="bfloat16")
  assert both.startswith("int16 query gradients and bfloat16 products changed the order")
  assert both.endswith("Take compression=None and precision=None, or a larger damping.")
  alone = verdict(check, Uncompressed(), precision="bfloat16")
  assert alone.startswith("bfloat16 products changed the order")
  assert alone.endswith("Take precision=None, or a larger damping.")


def test_every_compression_falls_back_to_int16_and_that_to_float32():
  for name, compression in COMPRESSIONS.items():
    expected = None if name is None else Uncompressed() if name == "int16" else INT16
    assert fallback_of(compression) == expected
