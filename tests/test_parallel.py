"""The drivers give what the kernel gives on all rows at once, however the work is cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import parallel
from jaxinf.parallel import Rows, map_batches, reduce_batches
from jaxinf.random import fold_in_each, stream

NUM = 7
BATCH_SIZES = (1, 3, 7, 100)  # with remainders on both numbers of devices; more than there is


@pytest.fixture(scope="module")
def rows():
  images = np.random.default_rng(0).normal(size=(NUM, 2, 2, 1)).astype(np.float32)
  return Rows(images, np.arange(NUM, dtype=np.uint32) * 11)


def row_kernel(weights, batch):
  """Depends on each row's image, id and draw; the mask must not change a real row."""
  noise = jax.vmap(jax.random.normal)(fold_in_each(stream(0, "test"), batch.ids))
  draws = jnp.zeros_like(batch.ids) if batch.draws is None else batch.draws
  values = jnp.sum(batch.images * weights, axis=(1, 2, 3)) + noise
  return {"values": values * (1 + draws), "row": (batch.ids, draws)}


def sum_kernel(weights, batch):
  masked = batch.mask[:, None, None, None] * batch.images * weights
  return {"images": jnp.sum(masked, axis=0), "ids": jnp.sum(batch.mask * batch.ids)}


WEIGHTS = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)


def whole(rows):
  """All rows as one batch without padding."""
  return rows.padded_batch(0, len(rows))


def map_rows(rows, batch_size, devices):
  return map_batches(
    row_kernel, WEIGHTS, rows, batch_size=batch_size, label="test", devices=devices
  )


def reduce_rows(rows, batch_size, devices):
  return reduce_batches(
    sum_kernel, WEIGHTS, rows, batch_size=batch_size, label="test", devices=devices
  )


def assert_close(actual, expected):
  # Sums of at most 14 float32 numbers of size 1 in different orders.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
  )


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_a_map_equals_the_kernel_on_all_rows_at_once(rows, batch_size, devices):
  mapped = map_rows(rows, batch_size, devices)
  assert_close(mapped, row_kernel(WEIGHTS, whole(rows)))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(mapped))


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_a_reduction_equals_the_kernel_on_all_rows_at_once(rows, batch_size, devices):
  reduced = reduce_rows(rows, batch_size, devices)
  assert_close(reduced, sum_kernel(WEIGHTS, whole(rows)))
  assert reduced["ids"] == 11 * sum(range(NUM))  # padding counts nothing
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(reduced))


def test_results_follow_the_rows_into_another_order(rows, devices):
  order = np.random.default_rng(1).permutation(NUM)
  shuffled = Rows(rows.images[order], rows.ids[order])
  expected = jax.tree.map(lambda x: x[order], row_kernel(WEIGHTS, whole(rows)))
  assert_close(map_rows(shuffled, 3, devices), expected)
  assert_close(reduce_rows(shuffled, 3, devices), sum_kernel(WEIGHTS, whole(rows)))


def test_pairs_of_example_and_draw_arrive_example_major(rows, devices):
  pairs = Rows(rows.images, rows.ids, draws=2)
  assert len(pairs) == 2 * NUM
  mapped = map_rows(pairs, 5, devices)
  ids, draws = mapped["row"]
  np.testing.assert_array_equal(ids, np.repeat(rows.ids, 2))
  np.testing.assert_array_equal(draws, np.tile([0, 1], NUM))
  singly = row_kernel(WEIGHTS, whole(rows))["values"]
  assert_close(mapped["values"], np.stack([singly, 2 * singly], axis=1).ravel())
  assert_close(
    reduce_rows(pairs, 5, devices),
    jax.tree.map(lambda x: 2 * x, sum_kernel(WEIGHTS, whole(rows))),
  )


def test_padding_repeats_the_last_row_with_mask_zero(rows):
  batch = rows.padded_batch(5, 4)
  np.testing.assert_array_equal(batch.mask, [1, 1, 0, 0])
  np.testing.assert_array_equal(batch.ids, rows.ids[[5, 6, 6, 6]])
  np.testing.assert_array_equal(batch.images, rows.images[[5, 6, 6, 6]])
  assert batch.draws is None


def test_rows_need_no_images(devices):
  rows = Rows(None, np.arange(3, dtype=np.uint32))
  kernel = lambda scale, batch: scale * batch.ids
  doubled = map_batches(kernel, 2, rows, batch_size=2, label="test", devices=devices)
  np.testing.assert_array_equal(doubled, [0, 2, 4])


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
def test_every_row_is_reported_as_progress(rows, driver, monkeypatch):
  reported = []
  monkeypatch.setattr(parallel.Progress, "advance", lambda self, amount: reported.append(amount))
  driver(rows, 2, jax.local_devices()[:1])
  assert reported == [2, 2, 2, 1]


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
def test_nothing_to_go_through_is_an_error(rows, driver):
  with pytest.raises(ValueError, match="no examples to go through"):
    driver(Rows(rows.images[:0], rows.ids[:0]), 2, None)


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_an_error(rows, driver, batch_size):
  with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
    driver(rows, batch_size, None)


def test_a_step_updates_from_sums_over_all_devices(devices):
  sums = lambda state, rows: (jnp.sum(rows) * state["scale"], jnp.float32(rows.size))
  update = lambda state, totals: (
    {"scale": state["scale"] + 1, "mean": totals[0] / totals[1]},
    {"count": totals[1]},
  )
  step = parallel.parallel_step(sums, update, devices)
  state = parallel.replicate({"scale": np.float32(2), "mean": np.float32(0)}, devices)
  for scale, rows in ((2, [1, 2, 3, 10]), (3, [0, 0, 0, 4])):
    batch = parallel.shard(np.array(rows, np.float32), devices)
    state, metrics = step(state, batch)
    host = parallel.first(state)
    # Small integers: float32 sums are exact.
    assert host["mean"] == scale * sum(rows) / 4 and host["scale"] == scale + 1
    np.testing.assert_array_equal(metrics["count"], np.full(len(devices), 4))


def test_devices_are_all_local_ones_unless_given(devices):
  assert parallel.num_devices() == jax.local_device_count()
  assert parallel.num_devices(devices) == len(devices)
