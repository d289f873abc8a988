"""Rows of arrays that may lie on disk are those of the array in memory, read a few at a time."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinf.core import arrays
from jaxinf.core.arrays import (
  Chosen,
  Rows,
  as_array,
  blocks,
  chosen,
  converted,
  fingerprint,
  is_floating,
  read_rows,
)
from tests.stored import Stored, Zarr

VALUES = np.random.default_rng(0).normal(size=(9, 3, 2)).astype(np.float32)


def memmap(values: np.ndarray, folder) -> np.memmap:
  np.save(folder / "values.npy", values)
  return np.load(folder / "values.npy", mmap_mode="r")


@pytest.fixture(params=["numpy", "memmap", "h5py", "zarr"])
def array(request, tmp_path):
  """The same numbers as every kind of array."""
  kinds = {
    "numpy": lambda: VALUES,
    "memmap": lambda: memmap(VALUES, tmp_path),
    "h5py": lambda: Stored(VALUES),
    "zarr": lambda: Zarr(VALUES),
  }
  return kinds[request.param]()


@pytest.mark.parametrize(
  "rows", [[0], [3, 4, 5], [5, 3, 4], [8, 0, 8, 2, 2], [1, 7], [], list(range(9))], ids=str
)
def test_rows_may_repeat_and_come_in_any_order(array, rows):
  found = read_rows(array, np.array(rows, int))
  np.testing.assert_array_equal(found, VALUES[rows] if rows else VALUES[:0], strict=True)
  assert type(found) is np.ndarray


@pytest.mark.parametrize("block_rows", [1, 2, 4, 9, 100])
def test_blocks_are_all_rows_in_order_and_no_more_at_a_time(array, block_rows, monkeypatch):
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", block_rows * VALUES[0].nbytes)
  parts = list(blocks(array))
  assert all(len(part) == block_rows for part in parts[:-1])
  np.testing.assert_array_equal(np.concatenate(parts), VALUES, strict=True)


def test_a_row_larger_than_a_block_is_one(monkeypatch):
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", 1)
  assert [len(part) for part in blocks(VALUES)] == [1] * 9


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2"])
def test_foreign_byte_order_is_turned(dtype):
  foreign = (VALUES * 100).astype(dtype)
  for found in (read_rows(foreign, np.array([4, 1])), read_rows(Stored(foreign), np.array([4, 1]))):
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, foreign[[4, 1]])


@pytest.mark.parametrize("block_bytes", [1, 50, 2**24])
def test_a_fingerprint_by_blocks_is_that_of_the_whole(array, block_bytes, monkeypatch):
  whole = fingerprint({"a": VALUES, "b": np.array(3)})
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", block_bytes)
  assert fingerprint({"b": np.array(3), "a": array}) == whole


def test_memory_maps_are_not_copied(tmp_path):
  lazy = memmap(VALUES, tmp_path)
  assert as_array(lazy) is lazy
  assert all(np.shares_memory(block, lazy) for block in blocks(lazy))


def test_what_is_no_array_becomes_one():
  assert as_array([[1.0, 2.0]]).dtype == np.float64
  assert type(as_array(jnp.ones(2))) is np.ndarray  # rows of it are then not computed on a device


@pytest.mark.parametrize(
  ("dtype", "floating"),
  [(np.float16, True), (ml_dtypes.bfloat16, True), (">f8", True), (np.uint8, False), (bool, False)],
)
def test_floating_types(dtype, floating):
  assert is_floating(np.dtype(dtype)) == floating


ORDER = np.array([5, 0, 0, 8, 3])


@pytest.mark.parametrize("rows", [2, -1, slice(1, 4), slice(None), [4, 0, 0], ORDER > 3], ids=str)
def test_rows_on_demand_are_asked_for_as_numpys(array, rows):
  expected = VALUES[ORDER].astype(np.float16)
  lazy = converted(Chosen(array, ORDER), np.float16)
  assert isinstance(lazy, Rows) and lazy.shape == expected.shape and lazy.dtype == np.float16
  assert lazy.nbytes == expected.nbytes and len(lazy) == 5
  np.testing.assert_array_equal(lazy[rows], expected[rows], strict=True)
  np.testing.assert_array_equal(np.asarray(lazy), expected, strict=True)
  assert fingerprint({"a": lazy}) == fingerprint({"a": expected})
  with pytest.raises(IndexError):
    lazy[5]


@pytest.mark.parametrize("most", [0, 2**30])
def test_chosen_rows_stay_on_disk_where_they_are_many(array, most, monkeypatch):
  monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", most)
  found = chosen(array, ORDER)
  in_memory = most > 0 or type(array) is np.ndarray
  assert type(found) is (np.ndarray if in_memory else Chosen)
  np.testing.assert_array_equal(np.asarray(found), VALUES[ORDER], strict=True)
