"""A key is a function of (seed, name, id, draw), and of nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.random import draw_keys, example_numbers, fold_in_each, stream, substreams


def data(keys):
  return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def test_each_seed_name_id_and_draw_has_a_key_of_its_own():
  keys = [
    data(draw_keys(key, 5))
    for seed, name in itertools.product((0, 1, 2**31), ("train", "train_gradients", "sample"))
    for key in fold_in_each(stream(seed, name), jnp.array([0, 1, 7, 2**32 - 1], jnp.uint32))
  ]
  assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 3 * 4 * 5


def test_a_key_does_not_depend_on_what_else_is_asked_for():
  ids = jnp.arange(6, dtype=jnp.uint32)
  keys = fold_in_each(stream(3, "test"), ids)
  order = np.array([4, 0, 5])
  np.testing.assert_array_equal(
    data(fold_in_each(stream(3, "test"), ids[order])), data(keys)[order]
  )
  late = draw_keys(keys[2], 2, first=3)
  np.testing.assert_array_equal(data(late), data(draw_keys(keys[2], 5))[3:])


def test_keys_fold_in_numbers_row_by_row():
  keys, numbers = fold_in_each(stream(0, "test"), jnp.arange(3)), jnp.array([5, 6, 7])
  expected = [data(jax.random.fold_in(keys[i], numbers[i]))[0] for i in range(3)]
  np.testing.assert_array_equal(data(fold_in_each(keys, numbers)), expected)


def test_named_parts_of_a_draw_are_no_splits_and_no_small_fold_ins_of_its_key():
  keys = fold_in_each(stream(0, "test"), jnp.arange(2))
  named = [data(substreams(keys, name)) for name in ("t", "noise", "flip")]
  folded = [data(draw_keys(key, 1000)) for key in keys]
  split = [data(jax.random.split(key, 4)) for key in keys]
  # The trap that names avoid: the splits of a key are among what is folded into it.
  assert len(np.unique(np.concatenate(folded + split), axis=0)) == 2 * 1000
  assert len(np.unique(np.concatenate(named + folded), axis=0)) == 2 * (3 + 1000)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint64, np.int8])
def test_integer_ids_stand_for_themselves(dtype):
  numbers = example_numbers(np.array([3, 0, 127], dtype))
  np.testing.assert_array_equal(numbers, [3, 0, 127])
  assert numbers.dtype == np.uint32


def test_string_ids_have_numbers_that_do_not_depend_on_the_others():
  ids = np.array([f"image_{i}" for i in range(1000)])
  numbers = example_numbers(ids)
  # A collision among 1000 of 2³² numbers has probability 1e-4, and the ids are fixed.
  assert numbers.dtype == np.uint32 and len(np.unique(numbers)) == 1000
  np.testing.assert_array_equal(example_numbers(ids[::-7]), numbers[::-7])
  np.testing.assert_array_equal(example_numbers(ids.astype("U50")), numbers)


def test_the_largest_integer_id_is_kept():
  np.testing.assert_array_equal(example_numbers(np.array([2**32 - 1])), [2**32 - 1])


@pytest.mark.parametrize("ids", [[-1, 2], [2**32]])
def test_integer_ids_out_of_range_are_refused(ids):
  with pytest.raises(ValueError, match=r"must lie in \[0, 2\*\*32\)"):
    example_numbers(np.array(ids))


@pytest.mark.parametrize("ids", [[0.5], [True], [None]])
def test_ids_of_other_types_are_refused(ids):
  with pytest.raises(ValueError, match="must be integers or strings"):
    example_numbers(np.array(ids))
