"""A rehearsal goes through a few batches, gives outputs for all rows, and prices all batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.engine import Blocks, Rows, map_batches, rehearsal, stream_batches
from jaxinf.engine.reductions import reduce_batches
from jaxinf.engine.rehearsal import BATCHES, num_operations, rehearsing

BATCH, IN_FULL = 2, 1000
FEW = 4 * BATCHES  # twice as many batches as a rehearsal goes through


def ticking():
  """A clock that goes on by a second whenever it is looked at: batches take one."""
  return itertools.count().__next__


def rows_of(num):
  return Rows(np.arange(num, dtype=np.float32)[:, None], np.arange(num, dtype=np.uint32))


def double(operands, batch):
  return operands * batch.data


def total(operands, batch):
  return jnp.sum(operands * batch.mask * batch.data[:, 0])


def product(rows, values):
  return values @ rows.T


def doubled(num=FEW, **how):
  one = jax.local_devices()[:1]
  return map_batches(
    double, np.float32(2), rows_of(num), batch_size=BATCH, label="map", devices=one, **how
  )


def test_a_map_gives_all_rows_of_which_the_first_are_right():
  with rehearsing({FEW: IN_FULL}, ticking()) as found:
    outputs = doubled()
  assert outputs.shape == (FEW, 1)
  (one,) = found.passes
  done = BATCH * one.num_done
  np.testing.assert_array_equal(outputs[:done], 2 * np.arange(done)[:, None])
  assert BATCHES <= one.num_done < FEW // BATCH
  assert set(outputs[done:, 0]) <= set(outputs[done - BATCH : done, 0])


def test_elsewhere_everything_is_done():
  np.testing.assert_array_equal(doubled(), 2 * np.arange(FEW)[:, None])


def test_batches_are_those_of_the_run_in_full():
  """A second each by the ticking clock; compiling is none of them."""
  with rehearsing({FEW: IN_FULL}, ticking()) as found:
    doubled()
    doubled(6)  # over other examples than those that grow in number
  assert [one.batches for one in found.passes] == [IN_FULL // BATCH, 3]
  assert found.passes[0].seconds == 1 and found.seconds == IN_FULL // BATCH + 3 * 1
  assert found.compiling == 1  # one program: the clock was looked at before and after


def test_a_reduction_stops_early_and_counts_its_batches(devices):
  with rehearsing({FEW: IN_FULL}, ticking()) as found:
    summed = reduce_batches(
      total, np.float32(1), rows_of(FEW), batch_size=BATCH, label="sum", devices=devices
    )
  (one,) = found.passes
  assert BATCHES <= one.num_done < FEW // BATCH
  assert summed < sum(range(FEW)) and one.batches == IN_FULL // BATCH and one.seconds == 1
  # A multiplication by the operand and by the mask, an addition and one more to the sum: XLA's
  # count is within a few of 4 a row.
  rows = BATCH // len(devices)
  assert 3 * rows <= one.operations(0) <= 6 * rows


def test_a_second_kernel_grows_with_its_operands():
  """Its part of a batch, timed by itself, and its operations: 2 · rows · queries."""
  queries = 3
  found = []
  for growth in (1.0, 5.0):
    with rehearsing({FEW: IN_FULL}, ticking(), growth=growth) as rehearsed:
      outputs = doubled(then=Blocks(product, [np.ones((queries, 1), np.float32)]))
    assert outputs.shape == (FEW, queries)
    found.append(rehearsed)
  assert found[0].passes[0].second_seconds == 1
  batches, second = IN_FULL // BATCH, 2 * BATCH * queries
  assert found[1].seconds - found[0].seconds == 4 * batches * 1
  assert found[1].operations - found[0].operations == 4 * batches * second


def test_blocks_of_the_second_kernel_are_joined_as_ever():
  blocks = [np.ones((1, 1), np.float32), 2 * np.ones((2, 1), np.float32)]
  with rehearsing({}, ticking()) as found:
    outputs = doubled(6, then=Blocks(product, blocks))
  np.testing.assert_array_equal(outputs, 2 * np.arange(6)[:, None] * np.array([1, 2, 2]))
  assert found.passes[0].uses[1].operations == 3 * 2 * BATCH * 3  # three batches of three products


def test_what_takes_a_batch_along_goes_on_with_all_rows():
  with rehearsing({FEW: IN_FULL}, ticking()):
    stream = stream_batches(double, np.float32(2), rows_of(FEW), batch_size=5, label=None)
    assert sum(len(batch) for batch in stream) == FEW


def test_a_program_that_does_not_fit_is_compiled_and_not_run():
  def not_run(_):
    raise AssertionError

  def kernel(operands, batch):
    return jax.pure_callback(not_run, batch.data, batch.data) + operands[0]

  large = np.ones(10**6, np.float32)
  with rehearsing({}, ticking(), most_bytes=10**6) as found:
    outputs = map_batches(
      kernel, large, rows_of(4), batch_size=2, label=None, devices=jax.local_devices()[:1]
    )
  assert found.too_large and found.seconds is None
  np.testing.assert_array_equal(outputs, np.zeros((4, 1)))


def test_operations_are_those_of_the_products():
  """2 · rows · columns · inner of a matrix product, and None where a loop hides how many."""
  a, b = np.ones((1, 8, 16), np.float32), np.ones((1, 16, 4), np.float32)
  assert num_operations(lambda a, b: a @ b, (a, b)) == 2 * 8 * 16 * 4
  looped = lambda a: jax.lax.scan(lambda c, _: (c * 2.0, None), a, None, length=5)[0]
  assert num_operations(looped, (a,)) is None


def test_large_factors_are_extrapolated_by_the_cube_of_their_size(monkeypatch):
  monkeypatch.setattr(rehearsal, "_ROWS", 4)
  matrix = np.diag(np.arange(8.0))
  with rehearsing({}, ticking()) as found:
    values, vectors = rehearsal.decomposed(np.linalg.eigh, matrix)
    assert found.decomposing == (8 / 4) ** 3
    np.testing.assert_array_equal(
      rehearsal.decomposed(np.linalg.eigh, matrix[:4, :4])[0], np.arange(4)
    )
  assert values.shape == (8,) and vectors.shape == (8, 8)
  np.testing.assert_array_equal(rehearsal.decomposed(np.linalg.eigh, matrix)[0], np.arange(8))


def test_parts_count_as_often_as_the_run_in_full_has_them():
  """Between two looks at the clock; what planning itself does in there is left out."""
  with rehearsing({}, ticking()) as found:
    with rehearsal.part(7.0):
      pass
    assert found.parts == found.seconds == 7
    with rehearsal.part(7.0), found.paused():
      pass
    assert found.parts == 7 + 7 * 2


@pytest.mark.parametrize("num", [1, 2, 3])
def test_one_batch_tells_its_own_time(num):
  """With so few that all are in flight, their time is that since the first began."""
  with rehearsing({}, ticking()) as found:
    doubled(BATCH * num)
  assert found.passes[0].seconds > 0 and found.besides >= 0
