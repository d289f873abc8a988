"""Every compression: what all of them promise, then each one's error in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression.compression import (
  COMPRESSIONS,
  Bfloat16,
  Blockwise,
  LowRank,
  Uncompressed,
  compression_named,
)
from jaxinf.compression.projection import RandomProjection, Truncation
from jaxinf.compression.quantise import Quantisation

# Besides those with a name: ranks below the toys' and blocks and chunks that do not fill up.
METHODS = [*COMPRESSIONS.values(), LowRank(2), Quantisation(4, 10), RandomProjection(0.3, 1, 640)]
SHAPES = [(6, 13), (2, 5, 9)]  # a layer's matrix; one for each of two groups

every_method = pytest.mark.parametrize("method", METHODS, ids=repr)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def toys(shape, num_rows=3):
  """Normal rows [B, …, d_out, d_in] and eigenvalues in no particular order."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(num_rows, *shape)).astype(np.float32), rng.permutation(
    math.prod(shape)
  ).reshape(shape).astype(np.float32)


def round_trip(method, rows, eigenvalues):
  return np.asarray(method.restore(method.compress(jnp.asarray(rows), eigenvalues), eigenvalues))


@every_method
@every_shape
def test_a_compressed_row_has_the_bytes_it_is_said_to_have_and_comes_back_in_shape(method, shape):
  rows, eigenvalues = toys(shape)
  leaves = jax.tree.leaves(method.compress(jnp.asarray(rows), eigenvalues))
  assert {len(leaf) for leaf in leaves} == {len(rows)}
  assert sum(leaf.nbytes for leaf in leaves) == len(rows) * method.num_bytes(shape)
  restored = round_trip(method, rows, eigenvalues)
  assert restored.shape == rows.shape and restored.dtype == np.float32


@every_method
@every_shape
def test_compiled_and_not_it_is_one_function(method, shape):
  rows, eigenvalues = toys(shape)
  compiled = jax.jit(round_trip_traced, static_argnums=0)(method, rows, eigenvalues)
  # Numbers near 1 whose sums are ordered otherwise; no integer changes.
  np.testing.assert_allclose(compiled, round_trip(method, rows, eigenvalues), rtol=0, atol=1e-5)


def round_trip_traced(method, rows, eigenvalues):
  return method.restore(method.compress(rows, eigenvalues), eigenvalues)


@every_method
@every_shape
def test_a_row_depends_on_itself_alone_and_hides_no_nan(method, shape):
  rows, eigenvalues = toys(shape)
  before = round_trip(method, rows, eigenvalues)
  rows[1] = np.nan
  after = round_trip(method, rows, eigenvalues)
  np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
  assert np.isnan(after[1]).any()


@every_method
def test_zeros_stay_zeros(method):
  rows, eigenvalues = toys(SHAPES[0])
  rows[0] = 0
  restored = round_trip(method, rows, eigenvalues)
  assert (restored[0] == 0).all() and np.isfinite(restored).all()


@every_method
@pytest.mark.parametrize("exponent", [-100, 100])
def test_a_scale_of_1e30_changes_nothing(method, exponent):
  rows, eigenvalues = toys(SHAPES[0])
  scaled = round_trip(method, np.ldexp(rows, exponent), eigenvalues)
  # A power of two is exact, except on numbers that it takes below 1e-38.
  np.testing.assert_allclose(
    np.ldexp(scaled, -exponent), round_trip(method, rows, eigenvalues), rtol=0, atol=1e-7
  )


def test_bfloat16_rounds_to_nearest_even():
  rows, eigenvalues = toys(SHAPES[0])
  restored = round_trip(Bfloat16(), rows, eigenvalues)
  # Eight significant bits: numbers in [1, 2) lie 2⁻⁷ apart.
  assert (np.abs(restored - rows) <= 2**-8 * np.abs(rows)).all()
  ties = np.float32([[[1 + 2**-8, 1 + 3 * 2**-8]]])
  assert round_trip(Bfloat16(), ties, np.ones((1, 2))).tolist() == [[[1, 1 + 2**-6]]]


@every_shape
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_loses_exactly_the_tail_of_the_singular_values(rank, shape):
  rows, eigenvalues = toys(shape)
  lost = (rows - round_trip(LowRank(rank), rows, eigenvalues)).astype(np.float64)
  values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
  # Eckart and Young, in both norms; float32 is off by 1e-7 of the largest value, about 5.
  np.testing.assert_allclose(
    np.sum(lost**2, axis=(-2, -1)), np.sum(values[..., rank:] ** 2, axis=-1), rtol=1e-5
  )
  np.testing.assert_allclose(
    np.linalg.norm(lost, ord=2, axis=(-2, -1)), values[..., rank], rtol=1e-5
  )


def test_low_rank_keeps_a_matrix_whole_where_factors_would_be_no_smaller():
  shape = (6, 12)  # 72 numbers; factors of rank 4 have as many
  rows, eigenvalues = toys(shape)
  for rank in (4, 6, 100):
    np.testing.assert_array_equal(round_trip(LowRank(rank), rows, eigenvalues), rows)
  assert [LowRank(rank).num_bytes(shape) for rank in (3, 4, 100)] == [3 * 72, 4 * 72, 4 * 72]


def test_projection_is_a_matrix_of_signs_and_restores_by_its_transpose():
  shape = (5, 8)  # signs from two words of bits, the second not used up
  method = RandomProjection(0.3, seed=3)
  rows, eigenvalues = toys(shape, num_rows=2)
  r = np.asarray(method.compress(jnp.eye(40).reshape(40, *shape), eigenvalues)).T.astype(float)
  assert r.shape == (12, 40)
  np.testing.assert_allclose(np.abs(r), 12**-0.5, rtol=1e-6)  # float32

  u, v = rows.reshape(2, -1).astype(np.float64)
  compressed = method.compress(jnp.asarray(rows), eigenvalues)
  restored = np.asarray(method.restore(compressed, eigenvalues)).reshape(2, -1)
  # Sums of 40 float32 numbers near 1.
  np.testing.assert_allclose(compressed[0], r @ u, atol=1e-5)
  np.testing.assert_allclose(restored[0], r.T @ (r @ u), atol=1e-5)
  np.testing.assert_allclose(restored[0] @ v, (r @ u) @ (r @ v), atol=1e-4)


def test_projection_does_not_depend_on_how_much_of_it_is_made_at_once():
  rows, eigenvalues = toys((10, 20))
  # 200 columns from 7 words of bits, in chunks of 1, 3 and all words.
  whole, *chunked = (
    RandomProjection(0.1, 0, entries).compress(jnp.asarray(rows), eigenvalues)
    for entries in (2**24, 1, 3 * 32 * 20)
  )
  for one in chunked:
    np.testing.assert_allclose(one, whole, atol=1e-5)  # the order of sums of 200 numbers near 1


def test_projected_inner_products_are_unbiased_with_the_variance_of_independent_signs():
  shape, num_seeds, r = (5, 8), 2000, 4
  (u, v), eigenvalues = toys(shape, num_rows=2)
  v = v + u / 2  # an inner product that is not near zero

  def estimate(seed):
    restored = round_trip_traced(RandomProjection(0.1, seed), u[None], eigenvalues)
    return jnp.sum(restored[0] * v)

  estimates = np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(num_seeds)), np.float64)
  norms, inner = np.sum(u**2) * np.sum(v**2), np.sum(u * v)
  variance = (norms + inner**2 - 2 * np.sum(u**2 * v**2)) / r
  # Four standard errors; those of a variance at a kurtosis of up to 9: √((9 − 1) / 2000) = 6 %.
  assert abs(estimates.mean() - inner) < 4 * np.sqrt(variance / num_seeds)
  assert estimates.var() == pytest.approx(variance, rel=0.25)


@every_shape
def test_truncation_keeps_the_coordinates_of_largest_eigenvalues_and_the_first_of_equals(shape):
  rows, eigenvalues = toys(shape)
  eigenvalues = eigenvalues // 30  # many equal ones
  flat = eigenvalues.ravel().tolist()
  order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
  mask = np.zeros(len(flat))
  mask[order[: math.ceil(len(flat) / 4)]] = 1
  restored = round_trip(Truncation(0.25), rows, eigenvalues)
  np.testing.assert_array_equal(restored, rows * mask.reshape(shape))
  np.testing.assert_array_equal(round_trip(Truncation(1), rows, eigenvalues), rows)


def test_truncation_alone_needs_the_eigenbasis():
  assert [m for m in METHODS if m.in_eigenbasis] == [COMPRESSIONS["truncation"]]


def test_a_share_counts_as_it_is_written():
  assert 0.07 * 100 > 7 and RandomProjection(0.07, 0).num_bytes((10, 10)) == 7 * 4
  assert Truncation(0.25).num_bytes((1, 5)) == 2 * 4


def test_names_and_sizes():
  assert compression_named(None) == Uncompressed()
  assert compression_named("svd", 3.0) == LowRank(3)
  assert compression_named("projection", 0.5) == RandomProjection(0.5, seed=0)
  assert compression_named("truncation", 0.5) == Truncation(0.5)
  descriptions = [compression_named(name).description for name in COMPRESSIONS]
  assert descriptions == [
    "int4", "int8", "int16", "bfloat16", "svd, rank 20", "projection, 10 %", "truncation, 25 %",
    "float32",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("name", "size", "message"),
  [
    ("int9", None, "Unknown compression 'int9'; there are: ['int4', 'int8'"),
    ("int8", 0.5, "'int8' takes no size, got 0.5; those that do: svd, projection, truncation"),
    (None, 3, "None takes no size"),
    ("svd", 2.5, "whole number; got 2.5"),
    ("svd", 0, "at least 1; got 0"),
    ("projection", 0, "(0, 1], as 0.1 does; got 0"),
    ("truncation", 1.5, "(0, 1], as 0.1 does; got 1.5"),
    ("truncation", math.nan, "(0, 1], as 0.1 does; got nan"),
  ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, size, message):
  with pytest.raises(ValueError) as error:
    compression_named(name, size)
  assert message in str(error.value)


@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Blockwise)], ids=repr)
def test_columns_hold_the_numbers_of_their_blocks(method):
  shape = (5, 60)
  rows = jnp.asarray(np.random.default_rng(6).normal(size=(3, *shape)), jnp.float32)
  compressed = method.compress(rows, jnp.ones(shape))
  columns = [leaf.reshape(len(rows), -1) for leaf in jax.tree.leaves(compressed)]
  found = method.restore_columns(columns)
  expected = method.restore(compressed, jnp.ones(shape)).reshape(len(rows), -1)
  np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
  assert found.shape[1] % method.block_size == 0
