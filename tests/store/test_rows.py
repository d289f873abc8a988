"""Rows on disk: round trips, chunk borders, damage, interruption, and how much of everything."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.store import rows as module
from jaxinf.store.ledger import Ledger
from jaxinf.store.rows import RowStore

GROUPS = 2
# The arrays of each compression: integers and steps, or floats alone.
ARRAYS = {
  "int8": ([128, 2], [np.int8, np.float32]),
  "int4": ([64, 2], [np.uint8, np.float32]),
  "int16": ([128, 2], [np.int16, np.float32]),
  "bfloat16": ([7], [jnp.bfloat16]),
  "float32": ([7], [np.float32]),
}
WIDTHS, DTYPES = [5, 2], [np.int8, np.float32]
EXAMPLE_BYTES = GROUPS * (5 + 2 * 4)
KEY = {"params": "abc", "settings": {"draws": 4, "seed": 0}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Chunks of three examples, of the arrays WIDTHS."""
  monkeypatch.setattr(module, "_CHUNK_BYTES", 3 * EXAMPLE_BYTES)


def values(begin: int, end: int, widths=WIDTHS, dtypes=DTYPES) -> list[np.ndarray]:
  """Rows begin … end − 1 of some arrays, no two alike; none are zero."""
  found = []
  for width, dtype in zip(widths, dtypes, strict=True):
    numbers = 1 + np.arange(begin * width, end * width).reshape(-1, width) % 120
    found.append(numbers.astype(dtype))
  return found


def names(begin: int, end: int) -> np.ndarray:
  return np.array([f"image {n}" for n in range(begin, end)])


def hashes(begin: int, end: int) -> np.ndarray:
  return np.array([f"{n:04x}" for n in range(begin, end)])


def create(folder: Path, widths=WIDTHS, dtypes=DTYPES) -> RowStore:
  return RowStore.create(folder, KEY, widths, dtypes, GROUPS)


def append(store: RowStore, num: int) -> None:
  """The next `num` examples, written a chunk at a time."""
  ledger = store.ledger
  first = len(ledger.ids)
  store.plan(names(first, first + num), hashes(first, first + num), 0)
  for begin, end in store.blocks(first * GROUPS, (first + num) * GROUPS):
    store.write(begin, values(begin, end, ledger.widths, ledger.dtypes), 0)
  store.finish()


def filled(folder: Path, num: int) -> RowStore:
  store = create(folder)
  append(store, num)
  return store


def chunks(store: RowStore) -> list[Path]:
  return sorted((store.folder / "arrays").glob("leaf_*/c/*/*"))


def assert_rows(store: RowStore, begin: int, end: int, gone=()) -> None:
  """The rows of examples begin … end − 1 are `values`, or zeros."""
  keep = ~np.isin(np.repeat(np.arange(begin, end), GROUPS), list(gone))
  expected = values(begin * GROUPS, end * GROUPS, store.ledger.widths, store.ledger.dtypes)
  found = store.read(begin * GROUPS, end * GROUPS)
  for actual, array in zip(found, expected, strict=True):
    assert actual.dtype == array.dtype
    np.testing.assert_array_equal(actual, np.where(keep[:, None], array, 0 * array))


def flip(path: Path, place: int, bit: int = 0) -> bytes:
  """Flips a bit of a file; its bytes before."""
  before = path.read_bytes()
  damaged = bytearray(before)
  damaged[place] ^= 1 << bit
  path.write_bytes(damaged)
  return before


# --- what is written is read ---


@pytest.mark.parametrize(("widths", "dtypes"), ARRAYS.values(), ids=ARRAYS)
def test_rows_come_back_bit_for_bit(tmp_path, widths, dtypes):
  store = create(tmp_path, widths, dtypes)
  append(store, 7)
  again = RowStore.open(tmp_path, KEY)
  assert [d.name for d in again.ledger.dtypes] == [np.dtype(d).name for d in dtypes]
  assert_rows(again, 0, 7)
  cut = again.read(3, 9, tuple((1, width - 1) for width in widths))
  for actual, array in zip(cut, values(3, 9, widths, dtypes), strict=True):
    np.testing.assert_array_equal(actual, array[:, 1:-1])


def test_appending_in_parts_across_borders_makes_the_same_files(tmp_path):
  whole, parts = filled(tmp_path / "whole", 11), create(tmp_path / "parts")
  for num in (4, 1, 1, 5):  # chunks are of three
    append(parts, num)
  for ours, theirs in zip(chunks(parts), chunks(whole), strict=True):
    assert ours.read_bytes() == theirs.read_bytes()
  assert (parts.folder / "index.json").read_bytes() == (whole.folder / "index.json").read_bytes()


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 5), (6, 12), (4, 15), (7, 8)])
def test_blocks_tile_a_range_and_cross_no_border(tmp_path, begin, end):
  store = create(tmp_path)
  blocks = list(store.blocks(begin, end))
  assert [row for block in blocks for row in range(*block)] == list(range(begin, end))
  assert all(first // 6 == (last - 1) // 6 for first, last in blocks)


def test_a_chunk_holds_an_example_at_least_and_256_at_most(tmp_path):
  for width, examples in ((10**6, 1), (1, 3 * EXAMPLE_BYTES // 8)):
    assert create(tmp_path / str(width), [width], [np.float32]).ledger.chunk_rows == 2 * examples
  module._CHUNK_BYTES = 2**25  # undone by the fixture
  assert create(tmp_path / "narrow").ledger.chunk_rows == 256 * GROUPS


def test_chunks_stay_as_they_were_made_when_the_default_changes(tmp_path, monkeypatch):
  filled(tmp_path, 4)
  monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * EXAMPLE_BYTES)
  store = RowStore.open(tmp_path)
  append(store, 6)
  assert store.ledger.chunk_rows == 3 * GROUPS
  assert_rows(store, 0, 10)


# --- damage ---


@pytest.mark.parametrize("leaf", [0, 1])
def test_any_flipped_bit_of_a_chunk_is_found_and_its_file_named(tmp_path, leaf):
  store = filled(tmp_path, 7)
  path = tmp_path / "arrays" / f"leaf_{leaf}" / "c" / "1" / "0"
  for place in range(path.stat().st_size):
    before = flip(path, place, place % 8)
    for act in (store.verify, lambda: store.read(6, 12), lambda: store.read(8, 9)):
      with pytest.raises(ValueError, match=str(path)):
        act()
    path.write_bytes(before)
  assert store.verify() == 7 * EXAMPLE_BYTES


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_missing_or_empty_chunk_is_no_zeros(tmp_path, damage):
  store = filled(tmp_path, 7)
  damage(tmp_path / "arrays/leaf_0/c/2/0")
  with pytest.raises(ValueError, match="leaf_0/c/2/0.*delete the 1 examples 'image 6' … 'image 6'"):
    store.verify()
  assert_rows(store, 0, 6)


@pytest.mark.parametrize("chunk", [0, 2])
def test_deleting_the_examples_of_a_damaged_chunk_and_appending_them_heals(tmp_path, chunk):
  """The last chunk, which is not full, too; and some of its examples had been deleted before."""
  store = filled(tmp_path, 8)
  store.delete(names(3 * chunk, 3 * chunk + 1))
  flip(tmp_path / "arrays/leaf_1/c" / str(chunk) / "0", 9)
  lost = names(3 * chunk, min(8, 3 * chunk + 3))
  with pytest.raises(
    ValueError, match=f"delete the {len(lost)} examples '{lost[0]}' … '{lost[-1]}'"
  ):
    store.verify()
  if len(lost) == 3:
    with pytest.raises(ValueError, match="is damaged"):
      store.delete(lost[1:2])  # the third could not be kept
  store.delete(lost)
  assert store.verify() == 8 * EXAMPLE_BYTES
  first = len(store.ledger.ids)
  store.plan(lost, hashes(0, len(lost)), 0)
  rows = (first * GROUPS, (first + len(lost)) * GROUPS)
  for begin, end in store.blocks(*rows):
    store.write(begin, values(begin, end), 0)
  store.finish()
  assert_rows(store, first, first + len(lost))
  kept = store.ledger.ids[store.ledger.kept]
  assert sorted(kept) == sorted(names(0, 8)) and len(kept) == 8


def test_damage_in_one_chunk_keeps_no_other_from_being_deleted(tmp_path):
  store = filled(tmp_path, 8)
  flip(tmp_path / "arrays/leaf_0/c/0/0", 3)
  with pytest.raises(ValueError, match="leaf_0/c/0/0"):
    store.delete(["image 1", "image 4"])
  assert_rows(store, 3, 8, gone=[4])


def test_any_flipped_bit_of_the_index_is_found_and_the_file_named(tmp_path):
  filled(tmp_path, 4)
  path = tmp_path / "index.json"
  for place in range(path.stat().st_size):
    before = flip(path, place, place % 7)
    with pytest.raises(ValueError, match="index.json is damaged"):
      RowStore.open(tmp_path)
    path.write_bytes(before)
  RowStore.open(tmp_path, KEY)


def test_a_flipped_bit_of_zarr_json_is_an_error_or_harmless(tmp_path):
  """Harmless: a digit of the number of rows that makes it larger than index.json needs."""
  store = filled(tmp_path, 4)
  path = tmp_path / "arrays/leaf_0/zarr.json"
  num_errors = 0
  for place in range(path.stat().st_size):
    before = flip(path, place)
    try:
      assert_rows(RowStore.open(tmp_path), 0, 4)
    except ValueError as error:
      assert str(path) in str(error)
      num_errors += 1
    path.write_bytes(before)
  assert num_errors >= path.stat().st_size - 2
  assert_rows(store, 0, 4)


# --- deletion ---


def test_deleted_rows_are_zeros_on_disk_and_the_others_as_they_were(tmp_path):
  store = filled(tmp_path, 8)
  store.delete(["image 2", "image 3", "image 5", "image 7"])
  for opened in (store, RowStore.open(tmp_path)):
    np.testing.assert_array_equal(np.flatnonzero(~opened.ledger.kept), [2, 3, 5, 7])
    assert_rows(opened, 0, 8, gone=[2, 3, 5, 7])
  store.delete([])
  store.delete(["image 2"])  # again
  append(store, 2)
  assert_rows(store, 0, 10, gone=[2, 3, 5, 7])


def test_a_deletion_that_was_stopped_is_finished_by_the_next(tmp_path, monkeypatch):
  store = filled(tmp_path, 8)
  monkeypatch.setattr(RowStore, "_write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    store.delete(["image 1", "image 6"])
  monkeypatch.undo()
  store = RowStore.open(tmp_path)
  np.testing.assert_array_equal(np.flatnonzero(~store.ledger.kept), [1, 6])
  store.delete(["image 1", "image 6"])
  assert_rows(store, 0, 8, gone=[1, 6])


def interrupted(*args, **kwargs):
  raise KeyboardInterrupt


def test_deleting_spares_rows_of_an_append_that_goes_on_in_the_same_chunk(tmp_path):
  store = filled(tmp_path, 4)
  store.plan(names(4, 8), hashes(4, 8), 0)
  store.write(8, values(8, 12), 0)  # of examples 4 and 5, in the chunk of 3
  store.delete(["image 3"])
  store.write(12, values(12, 16), 0)
  store.finish()
  assert_rows(store, 0, 8, gone=[3])


def test_ids_that_are_not_there_are_not_deleted(tmp_path):
  store = filled(tmp_path, 3)
  store.plan(names(3, 5), hashes(3, 5), 0)
  with pytest.raises(ValueError, match="2 of 3 ids are not in the store, such as 'image 4'"):
    store.delete(["image 0", "image 4", "image 9"])
  assert store.ledger.kept.all()


# --- what may be appended ---


def test_integers_are_ids_too(tmp_path):
  store = create(tmp_path)
  store.plan(np.arange(3, dtype=np.uint32), hashes(0, 3), 0)
  store.write(0, values(0, 6), 0)
  store.finish()
  store.plan(np.arange(7, 9), hashes(7, 9), 0)
  store.write(6, values(6, 10), 0)
  store.finish()
  store.delete(np.array([1, 8]))
  np.testing.assert_array_equal(store.ledger.ids[store.ledger.kept], [0, 2, 7])


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    (names(2, 5), "1 of 3 ids are in the store already, such as 'image 2'"),
    (np.arange(3), "The ids of the store are strings; those of the new examples, integers"),
    (np.array([b"a", b"b", b"c"]), "must be integers or strings, not |S1"),
  ],
)
def test_ids_that_do_not_fit_are_refused_and_leave_no_trace(tmp_path, ids, message):
  store = filled(tmp_path, 3)
  before = (tmp_path / "index.json").read_bytes()
  with pytest.raises(ValueError, match=message):
    store.plan(ids, hashes(3, 6), 0)
  assert (tmp_path / "index.json").read_bytes() == before
  append(store, 2)


@pytest.mark.parametrize("change", ["ids", "hashes", "fewer"])
def test_while_examples_wait_only_the_same_ones_go_on(tmp_path, change):
  store = filled(tmp_path, 3)
  store.plan(names(3, 6), hashes(3, 6), 0)
  other = {
    "ids": (names(4, 7), hashes(3, 6)),
    "hashes": (names(3, 6), hashes(4, 7)),
    "fewer": (names(3, 5), hashes(3, 5)),
  }
  with pytest.raises(ValueError, match="still lacks the rows of 3 examples, 'image 3' …"):
    RowStore.open(tmp_path).plan(*other[change], 0)
  RowStore.open(tmp_path).plan(names(3, 6), hashes(3, 6), 0)


def test_examples_of_other_content_are_told_from_those_that_are_there(tmp_path):
  ledger = filled(tmp_path, 4).ledger
  assert ledger.holds(names(1, 4), hashes(1, 4)) and not ledger.holds(names(1, 5), hashes(1, 5))
  with pytest.raises(ValueError, match="other examples under 1 of the 2 ids, such as 'image 2'"):
    ledger.holds(names(1, 3), np.array(["0001", "ffff"]))


def test_a_store_of_another_key_is_refused_with_the_difference(tmp_path):
  create(tmp_path)
  other = {**KEY, "settings": {"draws": 4, "seed": 1}}
  for act in (lambda: RowStore.open(tmp_path, other),
              lambda: RowStore.create(tmp_path, other, WIDTHS, DTYPES, GROUPS)):  # fmt: skip
    with pytest.raises(StaleArtifact, match="settings.seed: 0 → 1"):
      act()
  with pytest.raises(ValueError, match="holds no store"):
    RowStore.open(tmp_path / "nowhere")


# --- interruption ---


def test_a_plan_that_was_cut_short_may_become_another(tmp_path, monkeypatch):
  """Killed when the arrays are longer already, and index.json does not say so yet."""
  store = filled(tmp_path, 2)
  monkeypatch.setattr(Ledger, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    store.plan(names(2, 30), hashes(2, 30), 0)
  monkeypatch.undo()
  store = RowStore.open(tmp_path)
  assert_rows(store, 0, 2)
  append(store, 3)
  assert_rows(store, 0, 5)
  assert sum(path.stat().st_size for path in chunks(store)) == store.num_bytes


def test_progress_is_each_workers_own_and_ends_with_the_append(tmp_path):
  store = create(tmp_path)
  store.plan(names(0, 9), hashes(0, 9), 0)
  store.save_progress(".0of2", 6)
  store.save_progress(".1of2", 12)
  again = RowStore.open(tmp_path)
  assert [again.progress(w) for w in (".0of2", ".1of2", "")] == [6, 12, 0]
  flip(tmp_path / "progress.1of2.json", 8)
  assert [again.progress(w) for w in (".0of2", ".1of2")] == [6, 0]
  again.finish()
  assert not list(tmp_path.glob("progress*"))


def test_two_that_hold_the_store_open_do_not_undo_each_other(tmp_path):
  ours = filled(tmp_path, 4)
  theirs = RowStore.open(tmp_path)
  ours.delete(["image 0"])
  theirs.delete(["image 2"])
  append(ours, 1)
  append(RowStore.open(tmp_path), 1)
  theirs.delete(["image 5"])
  ledger = RowStore.open(tmp_path).ledger
  np.testing.assert_array_equal(ledger.ids[ledger.kept], [f"image {n}" for n in (1, 3, 4)])


# --- sizes ---


@pytest.mark.parametrize("num", [1, 3, 7])
def test_the_bytes_it_speaks_of_are_those_on_the_disk(tmp_path, num):
  """Chunks exactly, with their checksums; index.json and zarr.json come on top."""
  store = create(tmp_path)
  assert store.num_bytes == 0
  assert store.plan(names(0, num), hashes(0, num), 0) == store.num_bytes
  for begin, end in store.blocks(0, num * GROUPS):
    store.write(begin, values(begin, end), 0)
  store.finish()
  assert sum(path.stat().st_size for path in chunks(store)) == store.num_bytes
  others = {p.name for p in tmp_path.rglob("*") if p.is_file() and p not in chunks(store)}
  assert others == {"index.json", "zarr.json"}
  # As many bytes as the rows have, but for one chunk that may be all but empty, and checksums.
  overhead = store.num_bytes - num * EXAMPLE_BYTES
  assert 0 < overhead <= 2 * EXAMPLE_BYTES + 8 * (num // 3 + 1)
  # A chunk with room takes more examples at no cost.
  room = -num % 3
  if room:
    assert store.plan(names(num, num + room), hashes(num, num + room), 0) == 0


def with_free(monkeypatch, free: float) -> None:
  usage = shutil.disk_usage("/")
  monkeypatch.setattr(
    module.shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, int(free))
  )


def test_a_disk_that_is_too_small_is_refused_up_front_with_the_sizes(tmp_path, monkeypatch):
  store = create(tmp_path)
  with_free(monkeypatch, 2.5 * 2**20)
  with pytest.raises(ValueError, match=r"needs 0.0 MiB more and is to leave 3 MiB .* 2.5 MiB are"):
    store.plan(names(0, 3), hashes(0, 3), 3 * 2**20)
  assert not len(RowStore.open(tmp_path).ledger.ids)
  monkeypatch.undo()
  append(RowStore.open(tmp_path), 3)


def test_a_disk_that_fills_up_keeps_what_is_written_and_then_needs_the_rest_alone(
  tmp_path, monkeypatch
):
  store = create(tmp_path)
  needed = store.plan(names(0, 9), hashes(0, 9), 0)
  store.write(0, values(0, 6), 0)
  with_free(monkeypatch, 10)
  with pytest.raises(ValueError, match="What is written stays"):
    store.write(6, values(6, 12), 0)
  with_free(monkeypatch, 2 / 3 * needed)
  store = RowStore.open(tmp_path)
  assert store.plan(names(0, 9), hashes(0, 9), 0) == pytest.approx(2 / 3 * needed)
  for begin, end in store.blocks(6, 18):
    store.write(begin, values(begin, end), 0)
  store.finish()
  assert_rows(store, 0, 9)


def test_the_index_is_written_once_for_a_plan_an_end_and_a_deletion(tmp_path, monkeypatch):
  """Not for every chunk: with many examples it is large."""
  written = []
  original = Ledger.write
  monkeypatch.setattr(Ledger, "write", lambda *args: (written.append(1), original(*args)))
  store = filled(tmp_path, 20)
  assert len(written) == 3  # made, planned, finished
  store.delete(names(2, 19))
  assert len(written) == 4


def test_many_examples_take_no_quadratic_time(tmp_path, monkeypatch):
  """50,000 names: pairs of them would take minutes."""
  monkeypatch.setattr(module, "_CHUNK_BYTES", 2**25)
  monkeypatch.setattr(module, "_CHUNK_EXAMPLES", 25_000)
  num = 50_000
  store = RowStore.create(tmp_path, KEY, [1], [np.int8], 1)
  ids, of = names(0, num), hashes(0, num)
  store.plan(ids, of, 0)
  for begin, end in store.blocks(0, num):
    store.write(begin, [np.ones((end - begin, 1), np.int8)], 0)
  store.finish()
  store.delete(ids[::2])
  store.plan(ids[::2], of[::2], 0)
  ledger = RowStore.open(tmp_path).ledger
  assert ledger.kept.sum() == num // 2 and len(ledger.waiting) == num // 2
  assert ledger.holds(ids, of)


# --- memory ---


def test_what_was_read_is_kept_until_the_store_changes(tmp_path):
  store = filled(tmp_path, 4)
  first = store.read(0, 6)
  assert store.read(0, 6) is first
  assert store.read(0, 6, ((0, 5), (0, 1))) is not first
  store.delete(["image 1"])
  assert_rows(store, 0, 3, gone=[1])
  again = store.read(0, 6)
  append(store, 1)
  assert store.read(0, 6) is not again


def test_what_is_kept_takes_no_more_memory_than_allowed(tmp_path):
  filled(tmp_path, 12)
  store = dataclasses.replace(RowStore.open(tmp_path), cache_bytes=2 * 3 * EXAMPLE_BYTES)
  for _ in range(2):
    blocks = [store.read(*block) for block in store.blocks(0, 24)]
  kept = [
    store.read(*block) is rows for block, rows in zip(store.blocks(0, 24), blocks, strict=True)
  ]
  assert kept == [True, True, False, False]
  store.reload()
  assert store.cache_bytes == 2 * 3 * EXAMPLE_BYTES
  assert_rows(store, 0, 12)


def test_the_index_is_json_that_others_can_read(tmp_path):
  filled(tmp_path, 4)
  fields = json.loads((tmp_path / "index.json").read_text())
  assert fields["key"] == KEY and fields["ids"] == names(0, 4).tolist()
  zarr = json.loads((tmp_path / "arrays/leaf_0/zarr.json").read_text())
  assert zarr["zarr_format"] == 3 and zarr["shape"] == [12, 5]  # two chunks of three examples
