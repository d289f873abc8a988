"""Examples: every kind of input is taken as it is, and what breaks the contract is named."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinf import Examples
from jaxinf.core import arrays
from jaxinf.core.arrays import as_float
from jaxinf.core.examples import check_alike, checked_conditioning
from jaxinf.core.random import example_numbers
from jaxinf.engine.worklist import Rows
from tests.stored import Stored, Zarr

SHAPES = {
  "vectors": (5,),
  "series": (6, 3),
  "images": (4, 6, 3),
  "latents": (4, 4, 16),
  "volumes": (2, 4, 4, 1),
}
DTYPES = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4", ">f8"]


def numbers(num: int, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
  """Numbers as latents have them, or pixels."""
  values = np.random.default_rng(0).normal(size=(num, *shape)) * (50 if dtype == np.uint8 else 4)
  return np.abs(values).astype(dtype)


# --- what is taken ---


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_see_the_numbers_of_every_shape_and_type(shape, dtype):
  """As float32, which holds all but float64 exactly; pixels become [-1, 1]."""
  data = numbers(3, shape, dtype)
  examples = Examples(data)
  assert len(examples) == 3 and examples.data is data
  batch = Rows.of(examples).padded_batch(1, 2)
  expected = data[1:].astype(np.float32)
  found = np.asarray(as_float(batch.data))
  if dtype == np.uint8:
    assert batch.data.dtype == np.uint8
    np.testing.assert_allclose(found, expected / 127.5 - 1, rtol=0, atol=1e-7)  # one rounding
  else:
    assert batch.data.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_pixels_span_minus_one_to_one():
  pixels = np.array([0, 51, 127, 255], np.uint8)
  expected = np.array([-1, -0.6, 127 / 127.5 - 1, 1])
  np.testing.assert_allclose(as_float(pixels), expected, rtol=0, atol=1e-7)  # one rounding


def test_lists_and_jax_arrays_become_arrays():
  assert isinstance(Examples([[1.0, 2.0]]).data, np.ndarray)
  assert isinstance(Examples(jnp.ones((2, 3))).data, np.ndarray)


@pytest.mark.parametrize("kind", [Stored, Zarr])
def test_arrays_on_disk_are_read_a_few_rows_at_a_time(kind, monkeypatch):
  data = numbers(40, (3,))
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", 5 * data[0].nbytes)
  stored = kind(data)
  examples = Examples(stored, conditioning=kind(data))
  assert examples.data is stored and examples.conditioning.shape == (40, 3)
  arrays.fingerprint(examples.arrays("train"))
  batch = Rows.of(examples, 2).padded_batch(75, 8)  # which repeats the last row
  np.testing.assert_array_equal(batch.data, data[[37, 38, 38, 39, 39, 39, 39, 39]])
  np.testing.assert_array_equal(batch.conditioning, batch.data)
  np.testing.assert_array_equal(examples.take(np.array([9, 2])).data, data[[9, 2]])
  assert stored.most <= 5


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ">f4"], ids=str)
def test_a_memory_map_is_never_copied_as_a_whole(tmp_path, dtype):
  """Checked, hashed and read in batches within some blocks of 16 MiB, whatever its size."""
  file = np.lib.format.open_memmap(tmp_path / "data.npy", "w+", np.dtype(dtype), (4000, 64, 256))
  file[::7] = 1
  file.flush()
  data = np.load(tmp_path / "data.npy", mmap_mode="r")
  tracemalloc.start()
  examples = Examples(data, conditioning={"given": data})
  arrays.fingerprint(examples.arrays("train"))
  Rows.of(examples).padded_batch(3990, 16)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert examples.data is data and np.shares_memory(examples.data, data)
  assert data.nbytes >= 62 * 2**20 and peak < 2**20 * (40 if dtype == np.uint8 else 50)


# --- what is refused ---


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (np.zeros(3), r"data \[N, …\].*got shape \(3,\).*image\[None\]"),
    (np.float32(1), r"got shape \(\)"),
    (np.zeros((0, 4)), "at least one number in it"),
    (np.zeros((4, 0)), "at least one number in it"),
    (
      np.zeros((2, 3), int),
      r"uint8 pixels or floating-point numbers; got int64.*astype\('uint8'\)",
    ),
    (np.zeros((2, 3), bool), "got bool"),
    (np.zeros((2, 3), complex), "got complex128"),
    (np.array([["a", "b"]]), "got <U1"),
    (np.zeros((4, 3, 8, 8), np.uint8), r"channels first.*transpose\(0, 2, 3, 1\)"),
  ],
)
def test_data_that_are_no_numbers_of_examples_are_refused(data, message):
  with pytest.raises(ValueError, match=message):
    Examples(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("row", [0, 6, 9])
def test_what_is_not_finite_in_float32_is_refused_with_its_row(row, value, monkeypatch):
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", 4 * 3 * 8)  # four rows
  data = np.zeros((10, 3))
  data[row, 1] = value
  with pytest.raises(ValueError, match=f"^Data must be finite; row {row} is not"):
    Examples(data)
  with pytest.raises(
    ValueError, match=rf"^conditioning\['text'\] must be finite; row {row} is not"
  ):
    Examples(np.zeros((10, 3)), conditioning={"text": data})


def test_only_images_are_mirrored():
  Examples(numbers(2, (4, 4, 1)), random_flip=True)
  for name in SHAPES.keys() - {"images", "latents"}:
    with pytest.raises(ValueError, match="random_flip mirrors images"):
      Examples(numbers(2, SHAPES[name]), random_flip=True)


# --- ids ---


def test_ids_are_row_numbers_unless_given():
  examples = Examples(np.zeros((3, 2)))
  assert examples.ids.tolist() == [0, 1, 2] and examples.numbers.tolist() == [0, 1, 2]
  for ids in (["b", "a", "c"], (7, 5, 2**32 - 1), np.array([3, 1, 2], np.uint8)):
    given = Examples(np.zeros((3, 2)), ids)
    assert given.ids.tolist() == np.asarray(ids).tolist()
    np.testing.assert_array_equal(given.numbers, example_numbers(np.asarray(ids)))


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([1, "1", 2], "ids must all be integers or all be strings; got both"),
    (["a", "b", "a"], "ids must be different; got more than once: 'a'"),
    (np.array([7, 7, 7]), "got more than once: 7"),
    ([0, 1], r"ids must be 3 different ids, one an example; got shape \(2,\)"),
    ([[0, 1, 2]], r"got shape \(1, 3\)"),
    ([0.5, 1, 2], "must be integers or strings, not float64"),
    ([True, False, True], "must be integers or strings, not bool"),
    ([None, 1, 2], "must be integers or strings, not object"),
    ([-1, 0, 1], r"Integer ids must lie in \[0, 2\*\*32\)"),
    ([0, 1, 2**32], "pass other ids as strings"),
  ],
)
def test_ids_that_tell_nothing_apart_are_refused(ids, message):
  with pytest.raises(ValueError, match=message):
    Examples(np.zeros((3, 2)), ids)


def test_the_first_of_many_repeated_ids_are_named():
  with pytest.raises(ValueError, match="more than once: 'a', 'b', 'c', …"):
    Examples(np.zeros((10, 2)), list("abcdeabcde"))


# --- conditioning and groups ---


def test_conditioning_keeps_its_form_and_fits_in_32_bits():
  given = {
    "labels": np.arange(3),
    "text": (np.ones((3, 2)), np.ones((3, 4), ">f4")),
  }
  found = Examples(np.zeros((3, 2)), conditioning=given).conditioning
  assert jax.tree.structure(found) == jax.tree.structure(given)
  assert found["labels"].dtype == np.int32 and found["text"][0].dtype == np.float32
  batch = Rows.of(Examples(np.zeros((3, 2)), conditioning=given)).padded_batch(0, 4)
  assert all(
    leaf.dtype.isnative and leaf.itemsize == 4 for leaf in jax.tree.leaves(batch.conditioning)
  )
  np.testing.assert_array_equal(batch.conditioning["labels"], [0, 1, 2, 2])


@pytest.mark.parametrize(
  ("conditioning", "message"),
  [
    ({}, "conditioning holds no arrays: pass None"),
    (np.arange(2), r"one row for each of the 3 examples; got shape \(2,\)"),
    ({"a": np.float32(1)}, r"conditioning\['a'\] must be an array with one row for each"),
    (np.array(["a", "b", "c"]), "must hold numbers or booleans; got <U1"),
    (np.array([0, 2**31, 1]), "has integers that do not fit int32"),
    ((np.arange(3), np.array([0, -(2**40), 1])), r"conditioning\[1\] has integers"),
  ],
)
def test_conditioning_that_does_not_fit_is_refused_by_its_path(conditioning, message):
  with pytest.raises(ValueError, match=message):
    Examples(np.zeros((3, 2)), conditioning=conditioning)


def test_conditioning_that_fits_is_not_copied():
  leaves = [
    np.zeros((3, 2), dtype) for dtype in (np.float32, np.float16, np.int32, np.uint32, bool)
  ]
  assert all(a is b for a, b in zip(checked_conditioning(leaves, 3), leaves, strict=True))


def test_groups_say_whose_each_example_is():
  assert Examples(np.zeros((3, 2)), groups=["b", "a", "b"]).groups.tolist() == ["b", "a", "b"]
  with pytest.raises(ValueError, match=r"of each of the 3 examples whose it is; got \(2,\)"):
    Examples(np.zeros((3, 2)), groups=[0, 1])


# --- together ---


def test_taken_examples_keep_all_that_is_theirs():
  whole = Examples(
    numbers(5, (4, 4, 1)),
    list("abcde"),
    {"label": np.arange(5)},
    np.arange(5) % 2,
    random_flip=True,
  )
  part = whole.take([3, 0])
  np.testing.assert_array_equal(part.data, whole.data[[3, 0]])
  assert part.ids.tolist() == ["d", "a"] and part.groups.tolist() == [1, 0]
  assert part.conditioning["label"].tolist() == [3, 0] and part.random_flip
  assert repr(whole) == "Examples(5 × 4 × 4 × 1 float32, with conditioning)"


def test_fingerprints_tell_apart_what_results_depend_on():
  data = numbers(4, (4, 4, 1))
  variants = [
    Examples(data),
    Examples(data[::-1]),
    Examples(data, [0, 1, 2, 9]),
    Examples(data, random_flip=True),
    Examples(data, conditioning=np.arange(4)),
    Examples(data, conditioning=np.arange(4) % 2),
  ]
  prints = {arrays.fingerprint(each.arrays("train")) for each in variants}
  assert len(prints) == len(variants)
  assert arrays.fingerprint(Examples(data, groups=[0, 0, 1, 1]).arrays("train")) in prints


def test_queries_and_training_examples_are_inputs_of_one_network():
  images = lambda num, shape=(4, 4, 1), **fields: Examples(numbers(num, shape), **fields)
  labels = lambda num, dtype=np.int32: np.zeros(num, dtype)
  check_alike(images(2), images(5, random_flip=True))
  check_alike(images(2, (7, 4, 4, 1)), images(5), axes=1)  # trajectories of any length
  check_alike(images(2, conditioning=labels(2, np.int64)), images(5, conditioning=labels(5)))
  for queries, train, message in (
    (images(2, (4, 4, 3)), images(5), "do not match training examples of shape"),
    (images(2, (7, 4, 4, 1)), images(5), "do not match training examples of shape"),
    (images(2), images(5, conditioning=labels(5)), "must be None or pytrees of one form"),
    (images(2, conditioning=labels(2, np.uint8)), images(5, conditioning=labels(5)), "the same in"),
    (images(2, random_flip=True), images(5), "leave random_flip out of the queries"),
  ):
    with pytest.raises(ValueError, match=message):
      check_alike(queries, train)
  with pytest.raises(ValueError, match="which have several states each"):
    check_alike(images(2), images(5), axes=1)
