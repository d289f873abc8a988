"""Unfinished work on disk is what was saved for exactly this key, or an error says why not."""

import numpy as np
import pytest

from jaxinf.engine import processes
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import Kept, PartialOutputs, PartialState, PartialSums

KEY = {"seed": 0, "train": {"steps": 10, "shape": (2, 3), "decay": None}}


@pytest.fixture
def arrays():
  return {
    "down/kernel": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32),
    "scalar": np.array(3, np.int32),
  }


# --- sums ---


def test_partial_sums_are_loaded_as_they_were_saved(tmp_path, arrays):
  partial = PartialSums(tmp_path / "fit" / "sums.npz", KEY, every=2)
  assert partial.load() is None
  partial.save(3, [arrays["scalar"]])
  partial.save(7, [arrays["scalar"], arrays["down/kernel"]])
  rows_done, sums = PartialSums(tmp_path / "fit" / "sums.npz", KEY, every=5).load()
  assert rows_done == 7
  for actual, name in zip(sums, ("scalar", "down/kernel"), strict=True):
    np.testing.assert_array_equal(actual, arrays[name], strict=True)


def test_partial_sums_of_another_key_are_refused(tmp_path, arrays):
  path = tmp_path / "sums.npz"
  PartialSums(path, KEY, every=1).save(3, [arrays["scalar"]])
  with pytest.raises(StaleArtifact, match="seed: 0 → 1\n.* delete that file"):
    PartialSums(path, KEY | {"seed": 1}, every=1).load()


@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
def test_damaged_partial_sums_are_refused_by_name(tmp_path, arrays, kept):
  path = tmp_path / "sums.npz"
  partial = PartialSums(path, KEY, every=1)
  partial.save(3, [arrays["down/kernel"]])
  sound = path.read_bytes()
  for damaged in (sound[: int(kept * len(sound))], sound.replace(b"NUMPY", b"NUMPI")):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{path} cannot be read .* Delete it to begin again"):
      partial.load()


def test_an_interrupted_save_leaves_the_sums_before_it(tmp_path, arrays, monkeypatch):
  partial = PartialSums(tmp_path / "sums.npz", KEY, every=1)
  partial.save(3, [arrays["scalar"]])

  def interrupted(file, **arrays):
    file.write(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(np, "savez", interrupted)
    partial.save(6, [arrays["scalar"]])
  assert partial.load()[0] == 3


@pytest.mark.parametrize("partial", [PartialSums, PartialOutputs])
def test_what_is_unfinished_is_saved_every_so_many_batches_at_least_one(tmp_path, partial):
  with pytest.raises(ValueError, match="every must be at least 1; got 0"):
    partial(tmp_path / "sums", KEY, every=0)


# --- rows ---


def rows(begin: int, end: int) -> dict:
  """The outputs of some batches, as a map has them."""
  numbers = np.arange(begin, end)
  return {"values": numbers * 0.5, "pair": (numbers, np.ones(len(numbers)))}


def partial_rows(folder, key=KEY, every=1) -> PartialOutputs:
  return PartialOutputs(folder, key, every, rows(0, 1))


def test_rows_are_loaded_in_order_with_their_structure(tmp_path):
  partial = partial_rows(tmp_path / "rows")
  assert partial.load() == []
  partial.save([rows(0, 2), rows(2, 3)])
  partial.save([rows(3, 7)])
  again = partial_rows(tmp_path / "rows", every=5)
  found = again.load()
  assert [len(part["values"]) for part in found] == [3, 4]  # a file for each time it was saved
  again.save([rows(7, 8)])  # after those that are there
  found = partial_rows(tmp_path / "rows").load()
  np.testing.assert_array_equal(np.concatenate([x["values"] for x in found]), rows(0, 8)["values"])
  np.testing.assert_array_equal(np.concatenate([x["pair"][0] for x in found]), np.arange(8))


def test_rows_of_another_key_and_damaged_ones_are_refused_by_name(tmp_path):
  partial_rows(tmp_path).save([rows(0, 2)])
  with pytest.raises(StaleArtifact, match="rows-000000.npz was made .*\n.*seed: 0 → 1"):
    partial_rows(tmp_path, KEY | {"seed": 1}).load()
  path = tmp_path / "rows-000000.npz"
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(ValueError, match=f"{path} cannot be read .*Delete {tmp_path} to begin again"):
    partial_rows(tmp_path).load()


def test_rows_that_were_being_saved_are_made_again(tmp_path, monkeypatch):
  partial = partial_rows(tmp_path)
  partial.save([rows(0, 2)])

  def interrupted(file, **arrays):
    file.write(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(np, "savez", interrupted)
    partial.save([rows(2, 4)])
  again = partial_rows(tmp_path)
  assert len(again.load()) == 1
  again.save([rows(2, 4)])
  assert len(partial_rows(tmp_path).load()) == 2


# --- arrays by name ---


def test_what_was_kept_is_not_computed_again(tmp_path, arrays):
  computed = []
  kept = Kept(tmp_path / "sums")

  def compute():
    computed.append(1)
    return arrays

  for _ in range(2):
    found = kept("first", compute)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(found[name], array, strict=True)
  assert len(computed) == 1
  Kept(tmp_path / "sums")("second", compute)
  assert len(computed) == 2


def test_the_primary_keeps_for_all_processes(tmp_path, in_processes):
  kept = Kept(tmp_path)
  results = in_processes(3, lambda: kept("sum", lambda: {"x": np.arange(3)}))
  assert [found["x"].tolist() for found in results] == [[0, 1, 2]] * 3
  assert [path.name for path in tmp_path.iterdir()] == ["sum.npz"]


# --- states of iterations ---


def test_the_last_state_is_loaded_in_all_processes(tmp_path, arrays, in_processes):
  path = tmp_path / "solve" / "state.npz"

  def both():
    state = PartialState(path, KEY, every=1)
    state.save({"scalar": np.array(1)})
    state.save(arrays)
    processes.wait_for_all("saved")
    return PartialState(path, KEY, every=5).load()

  assert PartialState(path, KEY, every=1).load() is None
  for found in in_processes(2, both):
    assert found.keys() == arrays.keys()
    for name, array in found.items():
      np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_a_state_of_another_key_or_a_damaged_one_is_refused_by_name(tmp_path, arrays):
  path = tmp_path / "state.npz"
  PartialState(path, KEY, every=1).save(arrays)
  with pytest.raises(StaleArtifact, match="seed: 0 → 1\n.* delete that file"):
    PartialState(path, KEY | {"seed": 1}, every=1).load()
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(ValueError, match=f"{path} cannot be read .* Delete it to begin again"):
    PartialState(path, KEY, every=1).load()


def test_a_state_is_saved_when_enough_batches_have_passed(tmp_path):
  state = PartialState(tmp_path / "state.npz", KEY, every=5)
  found = []
  for number, batches in enumerate((2, 2, 2, 4, 1, 9)):
    state.passed(batches, {"number": np.array(number)})
    saved = state.load()
    found.append(None if saved is None else int(saved["number"]))
  assert found == [None, None, 2, 2, 4, 5]
