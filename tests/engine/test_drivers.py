"""The drivers give what the kernel gives on all rows at once, however the work is cut up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import engine
from jaxinf.core.random import fold_in_each, stream
from jaxinf.engine import Blocks, Rows, map_batches, reduce_batches, spread, stream_batches
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import PartialOutputs, PartialSums
from tests.stored import Stored

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
  values = jnp.sum(batch.data * weights, axis=(1, 2, 3)) + noise
  return {"values": values * (1 + draws), "row": (batch.ids, draws)}


def sum_kernel(weights, batch):
  masked = batch.mask[:, None, None, None] * batch.data * weights
  return {"data": jnp.sum(masked, axis=0), "ids": jnp.sum(batch.mask * batch.ids)}


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
  shuffled = Rows(rows.data[order], rows.ids[order])
  expected = jax.tree.map(lambda x: x[order], row_kernel(WEIGHTS, whole(rows)))
  assert_close(map_rows(shuffled, 3, devices), expected)
  assert_close(reduce_rows(shuffled, 3, devices), sum_kernel(WEIGHTS, whole(rows)))


def test_pairs_of_example_and_draw_arrive_example_major(rows, devices):
  pairs = Rows(rows.data, rows.ids, draws=2)
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
  np.testing.assert_array_equal(batch.data, rows.data[[5, 6, 6, 6]])
  assert batch.draws is None


def test_padding_takes_conditioning_along(rows):
  """Every leaf's rows stay with their examples, through draws and padding."""
  labels = np.arange(NUM) % 3
  text = np.random.default_rng(2).normal(size=(NUM, 4, 2)).astype(np.float32)
  pairs = Rows(rows.data, rows.ids, draws=2, conditioning={"labels": labels, "text": text})
  batch = pairs.padded_batch(11, 5)
  examples = [5, 6, 6, 6, 6]
  np.testing.assert_array_equal(batch.ids, rows.ids[examples])
  np.testing.assert_array_equal(batch.conditioning["labels"], labels[examples])
  np.testing.assert_array_equal(batch.conditioning["text"], text[examples])
  assert rows.padded_batch(0, 2).conditioning is None


def test_a_kernel_sees_each_rows_own_conditioning(rows, devices):
  labels = np.arange(NUM, dtype=np.int32) * 7
  pairs = Rows(rows.data, rows.ids, draws=2, conditioning=(labels,))
  kernel = lambda _, batch: (batch.ids, batch.conditioning[0])
  ids, seen = map_batches(kernel, 0, pairs, batch_size=5, label="test", devices=devices)
  np.testing.assert_array_equal(ids, np.repeat(rows.ids, 2))
  np.testing.assert_array_equal(seen, np.repeat(labels, 2))


def test_rows_need_no_data(devices):
  rows = Rows(None, np.arange(3, dtype=np.uint32))
  kernel = lambda scale, batch: scale * batch.ids
  doubled = map_batches(kernel, 2, rows, batch_size=2, label="test", devices=devices)
  np.testing.assert_array_equal(doubled, [0, 2, 4])


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
def test_every_row_is_reported_as_progress(rows, driver, monkeypatch):
  reported = []
  record = lambda self, amount: reported.append(amount)
  monkeypatch.setattr("jaxinf.engine.progress.Progress.advance", record)
  driver(rows, 2, jax.local_devices()[:1])
  assert reported == [2, 2, 2, 1]


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
def test_nothing_to_go_through_is_an_error(rows, driver):
  with pytest.raises(ValueError, match="no examples to go through"):
    driver(Rows(rows.data[:0], rows.ids[:0]), 2, None)


@pytest.mark.parametrize("driver", [map_rows, reduce_rows])
@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_an_error(rows, driver, batch_size):
  with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
    driver(rows, batch_size, None)


def test_rows_on_disk_are_read_batch_by_batch(rows, devices):
  stored = Stored(rows.data)
  pairs = Rows(stored, rows.ids, draws=2)
  found = map_rows(pairs, 4, devices)
  assert_close(found, map_rows(dataclasses.replace(pairs, data=rows.data), 4, devices))
  assert stored.most <= 3  # four pairs are of at most three examples


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_kernels_see_float32_whatever_the_data_are(rows, dtype):
  data = rows.data.astype(dtype)
  found = map_rows(dataclasses.replace(rows, data=data), 3, None)
  expected = dataclasses.replace(rows, data=data.astype(np.float32))
  jax.tree.map(np.testing.assert_array_equal, found, map_rows(expected, 3, None))


def test_kernels_see_pixels_as_they_are(devices):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1)).astype(np.uint8)
  same = lambda _, batch: batch.data
  rows = Rows(pixels, np.arange(5, dtype=np.uint32))
  found = map_batches(same, 0, rows, batch_size=2, label=None, devices=devices)
  np.testing.assert_array_equal(found, pixels, strict=True)


# --- a second kernel, and parts of the rows ---


def multiply(vectors, values):
  return values["values"][:, None] * vectors


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_second_kernel_sees_what_the_first_made_block_by_block(
  rows, devices, batch_size, num_blocks
):
  vectors = np.arange(6, dtype=np.float32)
  found = map_batches(
    row_kernel, WEIGHTS, rows, batch_size=batch_size, label=None, devices=devices,
    then=Blocks(multiply, np.split(vectors, num_blocks)),
  )  # fmt: skip
  assert_close(found, multiply(vectors, row_kernel(WEIGHTS, whole(rows))))


@pytest.mark.parametrize("span", [(0, 14), (3, 11), (13, 14)])
def test_a_stream_of_a_span_gives_its_rows_in_order(rows, devices, span):
  pairs = Rows(rows.data, rows.ids, draws=2)
  parts = list(
    stream_batches(row_kernel, WEIGHTS, pairs, batch_size=4, label=None, devices=devices, span=span)
  )
  joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  expected = jax.tree.map(lambda x: x[slice(*span)], row_kernel(WEIGHTS, whole(pairs)))
  assert_close(joined, expected)


def test_draws_may_be_numbered_from_any_one_on(rows, devices):
  pairs = Rows(rows.data, rows.ids, draws=2, first_draw=6)
  _, draws = map_rows(pairs, 5, devices)["row"]
  np.testing.assert_array_equal(draws, np.tile([6, 7], NUM))


def test_items_are_spread_by_cost_and_all_come_back(devices):
  sizes = {"large": 6, "small": 1, "middle": 3, "other": 3}
  items = {name: np.full(size, size, np.float32) for name, size in sizes.items()}
  found = spread(lambda x: {"sum": jnp.sum(x)}, items, cost=len, devices=devices)
  assert {name: float(value["sum"]) for name, value in found.items()} == {
    name: size**2 for name, size in sizes.items()
  }
  assert list(found) == list(items)


# --- passes that are stopped ---


class StoppedRows(PartialOutputs):
  """Stops the map once it has saved."""

  def save(self, outputs):
    super().save(outputs)
    raise KeyboardInterrupt


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_resumed_map_is_the_uninterrupted_one_bitwise(tmp_path, rows, devices, every):
  seen = []

  def watched(weights, batch):
    jax.debug.callback(lambda ids, mask: seen.extend(ids[mask > 0]), batch.ids, batch.mask)
    return row_kernel(weights, batch)

  def through(partial, kernel=row_kernel):
    return map_batches(
      kernel, WEIGHTS, rows, batch_size=2, label=None, devices=devices, partial=partial
    )

  like = {"values": 0, "row": (0, 0)}
  with pytest.raises(KeyboardInterrupt):
    through(StoppedRows(tmp_path, {"seed": 0}, every, like))
  resumed = through(PartialOutputs(tmp_path, {"seed": 0}, 1, like), watched)
  jax.effects_barrier()
  assert sorted(seen) == list(rows.ids[2 * every :])  # and nothing is computed twice
  jax.tree.map(np.testing.assert_array_equal, resumed, through(None))
  again = through(PartialOutputs(tmp_path, {"seed": 0}, 1, like), pytest.fail)
  jax.tree.map(np.testing.assert_array_equal, again, resumed)


def test_a_reduction_without_a_label_shows_no_progress(rows, monkeypatch, caplog):
  caplog.set_level("INFO", logger="jaxinf")
  monkeypatch.setattr("jaxinf.engine.progress._QUIET_SECONDS", 0.0)
  for label in (None, "seen"):
    reduce_batches(sum_kernel, WEIGHTS, rows, batch_size=3, label=label)
    assert bool(caplog.records) == (label is not None)


class Interrupted(PartialSums):
  """Stops the reduction once it has saved."""

  def save(self, rows_done, sums):
    super().save(rows_done, sums)
    raise KeyboardInterrupt


def interrupt(path, rows, batch_size, devices, every, key=None):
  """A reduction that stops after `every` batches."""
  with pytest.raises(KeyboardInterrupt):
    resume(Interrupted(path, key or {"seed": 0}, every), rows, batch_size, devices)


def resume(partial, rows, batch_size, devices, kernel=sum_kernel):
  return reduce_batches(
    kernel, WEIGHTS, rows, batch_size=batch_size, label="test", devices=devices, partial=partial
  )


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_resumed_reduction_is_the_uninterrupted_one_bitwise(tmp_path, rows, devices, every):
  seen = []

  def sums(weights, batch):
    jax.debug.callback(lambda ids, mask: seen.extend(ids[mask > 0]), batch.ids, batch.mask)
    return sum_kernel(weights, batch)

  interrupt(tmp_path / "sums.npz", rows, 2, devices, every)
  resumed = resume(PartialSums(tmp_path / "sums.npz", {"seed": 0}, 1), rows, 2, devices, sums)
  jax.effects_barrier()
  assert sorted(seen) == list(rows.ids[2 * every :])  # and nothing is summed twice
  uninterrupted = reduce_rows(rows, 2, devices)
  jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("others", [1, 2], ids=["to_one_device", "to_two_devices"])
def test_a_reduction_resumes_in_other_batches_on_other_devices(
  tmp_path, rows, devices, others, batch_size
):
  interrupt(tmp_path / "sums.npz", rows, 2, devices, every=2)
  partial = PartialSums(tmp_path / "sums.npz", {"seed": 0}, every=100)
  resumed = resume(partial, rows, batch_size, jax.local_devices()[:others])
  assert_close(resumed, sum_kernel(WEIGHTS, whole(rows)))
  assert resumed["ids"] == 11 * sum(range(NUM))  # float32 sums of small integers are exact


def test_a_reduction_whose_last_batch_was_saved_has_nothing_left_to_do(tmp_path, rows, devices):
  interrupt(tmp_path / "sums.npz", rows, NUM, devices, every=1)
  partial = PartialSums(tmp_path / "sums.npz", {"seed": 0}, every=1)
  assert_close(resume(partial, rows, 3, devices), sum_kernel(WEIGHTS, whole(rows)))


def test_sums_of_something_else_are_not_gone_on_from(tmp_path, rows):
  path, device = tmp_path / "sums.npz", jax.local_devices()[:1]
  interrupt(path, rows, 2, device, every=2)
  with pytest.raises(StaleArtifact, match=f"{path} was made with other settings:\n  seed: 0 → 1"):
    resume(PartialSums(path, {"seed": 1}, every=1), rows, 2, device)
  same_key = PartialSums(path, {"seed": 0}, every=1)
  fewer = Rows(rows.data[:3], rows.ids[:3])
  with pytest.raises(ValueError, match="over 4 rows, where .* over at most 3 are expected"):
    resume(same_key, fewer, 2, device)
  with pytest.raises(ValueError, match="The partial sums are those of another computation"):
    resume(same_key, rows, 2, device, kernel=lambda weights, batch: jnp.sum(batch.mask))


def test_a_step_updates_from_sums_over_all_devices(devices):
  sums = lambda state, rows: (jnp.sum(rows) * state["scale"], jnp.float32(rows.size))
  update = lambda state, totals: (
    {"scale": state["scale"] + 1, "mean": totals[0] / totals[1]},
    {"count": totals[1]},
  )
  step = engine.parallel_step(sums, update, devices)
  state = engine.replicate({"scale": np.float32(2), "mean": np.float32(0)}, devices)
  for scale, rows in ((2, [1, 2, 3, 10]), (3, [0, 0, 0, 4])):
    batch = engine.shard(np.array(rows, np.float32), devices)
    state, metrics = step(state, batch)
    host = engine.first(state)
    # Small integers: float32 sums are exact.
    assert host["mean"] == scale * sum(rows) / 4 and host["scale"] == scale + 1
    np.testing.assert_array_equal(metrics["count"], np.full(len(devices), 4))


def test_devices_are_all_local_ones_unless_given(devices):
  assert engine.num_devices() == jax.local_device_count()
  assert engine.num_devices(devices) == len(devices)
