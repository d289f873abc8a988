"""What is read is what was written for exactly this key, or an error says why not."""

import json
import struct
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Checkpoints, MetricsLog, StaleArtifact

KEY = {"seed": 0, "train": {"steps": 10, "shape": (2, 3), "decay": None}}


@pytest.fixture
def arrays():
  return {
    "down/kernel": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32),
    "ids": np.array(["a", "bc"]),
    "scalar": np.array(3, np.int32),
  }


@pytest.fixture
def folder(tmp_path, arrays):
  """A finished artefact."""
  write(tmp_path / "stage", arrays)
  return tmp_path / "stage"


def write(folder, arrays):
  return artifacts.write(folder, KEY, arrays, notes={"rows": [1, 2]}, cost={"seconds": 0.5})


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(actual[name], array, strict=True)


def test_what_was_written_is_read(folder, arrays):
  artifact = artifacts.read(folder)
  assert_equal(artifact.arrays, arrays)
  assert artifact.notes == {"rows": [1, 2]}
  assert artifact.content == artifacts.fingerprint(arrays)
  assert artifact.manifest["key"] == json.loads(json.dumps(KEY))
  assert artifact.manifest["shapes"]["down/kernel"] == ["float32", 2, 3]
  assert artifacts.finished(folder, KEY)


def test_writing_returns_what_reading_does(tmp_path, arrays):
  written, read = write(tmp_path, arrays), artifacts.read(tmp_path)
  assert_equal(written.arrays, read.arrays)
  assert written.manifest == read.manifest


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"seed": 1}, "  seed: 0 → 1\n"),
    ({"train": KEY["train"] | {"steps": 20}}, "  train.steps: 10 → 20\n"),
    ({"train": KEY["train"] | {"shape": [2, 4]}}, "  train.shape: [2, 3] → [2, 4]\n"),
    ({"train": KEY["train"] | {"decay": "cosine"}}, "  train.decay: None → 'cosine'\n"),
    ({"train": {"steps": 10, "shape": [2, 3]}}, "  train.decay: None → '(absent)'\n"),
    ({"data": {"name": "digits"}}, "  data: '(absent)' → {'name': 'digits'}\n"),
  ],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
def test_a_changed_key_is_refused_with_the_difference(tmp_path, arrays, change, line, finished):
  if finished:
    write(tmp_path, arrays)
  else:
    artifacts.begin(tmp_path, KEY)
    (tmp_path / "checkpoints").mkdir()
  with pytest.raises(StaleArtifact) as caught:
    artifacts.finished(tmp_path, KEY | change)
  difference = str(caught.value).split("settings:\n")[1].split("Use another")[0]
  assert difference == line
  assert str(tmp_path) in str(caught.value)


def test_a_folder_begun_in_vain_may_hold_something_else(tmp_path):
  artifacts.begin(tmp_path, KEY | {"seed": "wrong"})  # such as settings that the stage refused
  assert not artifacts.finished(tmp_path, KEY)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path, arrays):
  assert not artifacts.finished(tmp_path / "absent", KEY)
  artifacts.begin(tmp_path, KEY)
  assert not artifacts.finished(tmp_path, KEY)
  np.savez(tmp_path / "arrays.npz", **arrays)
  assert not artifacts.finished(tmp_path, KEY)
  with pytest.raises(ValueError, match=f"{tmp_path} holds no finished result"):
    artifacts.read(tmp_path)


def test_no_flipped_byte_is_read_as_a_result(folder, arrays):
  path = folder / "arrays.npz"
  sound = path.read_bytes()
  refused = 0
  for position in range(0, len(sound), 5):
    damaged = bytearray(sound)
    damaged[position] ^= 0xFF
    path.write_bytes(damaged)
    try:
      assert_equal(artifacts.read(folder).arrays, arrays)  # a time stamp, say
    except ValueError as error:
      assert str(error).startswith(str(path))
      refused += 1
  # Dates, attributes and other fields that nobody reads are a small part of the file.
  assert refused > 0.7 * len(sound) / 5


def test_a_cached_result_is_computed_once_and_its_unfinished_work_deleted(tmp_path, arrays, caplog):
  computed = []

  def compute():
    (tmp_path / "stage" / "sums").mkdir()
    assert json.loads((tmp_path / "stage" / "started.json").read_text())["key"]["seed"] == 0
    computed.append(1)
    return arrays, {"rows": [1, 2]}, "three arrays"

  with caplog.at_level("INFO", "jaxinf"):
    first, again = (
      artifacts.cached(tmp_path / "stage", KEY, compute, label="fit", then="next: rest")
      for _ in range(2)
    )
  assert computed == [1] and not (tmp_path / "stage" / "sums").exists()
  assert_equal(again.arrays, first.arrays)
  assert first.manifest == again.manifest and first.manifest["cost"]["seconds"] >= 0
  begins, wrote, reused = caplog.messages
  assert begins.startswith("fit: begins") and wrote.startswith("fit: wrote three arrays to ")
  assert reused == f"fit: reused {tmp_path / 'stage'}; next: rest"
  assert wrote.endswith("; next: rest")


def test_a_cached_result_of_another_key_is_refused_or_made_anew(folder, arrays):
  other = {"ids": arrays["ids"]}
  cached = lambda **how: artifacts.cached(
    folder, KEY | {"seed": 1}, lambda: (other, {}, "one array"), label="fit", **how
  )
  with pytest.raises(StaleArtifact, match="seed: 0 → 1"):
    cached()
  assert_equal(cached(anew=True).arrays, other)
  assert_equal(cached().arrays, other)


def test_what_fails_leaves_no_result(tmp_path):
  def compute():
    raise ValueError("no such thing")

  with pytest.raises(ValueError, match="no such thing"):
    artifacts.cached(tmp_path / "stage", KEY, compute, label="fit")
  assert not artifacts.finished(tmp_path / "stage", KEY)


@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
def test_a_truncated_file_is_refused_by_name(folder, kept):
  path = folder / "arrays.npz"
  sound = path.read_bytes()
  path.write_bytes(sound[: int(kept * len(sound))])
  with pytest.raises(ValueError, match="arrays.npz cannot be read .* Delete the folder"):
    artifacts.read(folder)


def test_arrays_of_another_run_are_refused(folder, arrays):
  np.savez(folder / "arrays.npz", **(arrays | {"scalar": np.array(4, np.int32)}))
  with pytest.raises(ValueError, match="arrays.npz differs from its manifest"):
    artifacts.read(folder)


def test_an_interrupted_write_leaves_the_old_state(folder, arrays, monkeypatch):
  def interrupted(path, **arrays):
    path.write_bytes(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez", interrupted)
    for place in (folder, folder / "new"):
      with pytest.raises(KeyboardInterrupt):
        write(place, arrays | {"scalar": np.array(5, np.int32)})
  assert_equal(artifacts.read(folder).arrays, arrays)
  assert not artifacts.finished(folder / "new", KEY)


def test_an_interruption_between_arrays_and_manifest_is_no_result(folder, arrays, monkeypatch):
  def interrupted(path, text):
    raise KeyboardInterrupt

  monkeypatch.setattr(artifacts, "write_text", interrupted)
  with pytest.raises(KeyboardInterrupt):
    write(folder, arrays | {"scalar": np.array(5, np.int32)})
  with pytest.raises(ValueError, match="differs from its manifest"):
    artifacts.read(folder)


def test_a_fingerprint_depends_on_names_types_shapes_and_values():
  zeros = np.zeros((2, 3), np.float32)
  variants = [
    {"a": zeros},
    {"b": zeros},
    {"a": zeros, "b": zeros},
    {"a": zeros.T},
    {"a": zeros.ravel()},
    {"a": zeros.astype(np.int32)},
    {"a": zeros.astype(">f4")},
    {"a": zeros + np.float32(1e-45)},
    {"a": np.float32(0)},
    {"a": np.zeros(1, np.float32)},
    {},
  ]
  assert len({artifacts.fingerprint(variant) for variant in variants}) == len(variants)


def test_a_fingerprint_does_not_depend_on_order_or_memory_layout(arrays):
  reversed_arrays = dict(reversed(arrays.items()))
  in_columns = {name: np.array(array, order="F") for name, array in arrays.items()}
  assert len({artifacts.fingerprint(a) for a in (arrays, reversed_arrays, in_columns)}) == 1


def test_a_resumed_log_drops_the_lines_that_are_done_again(tmp_path):
  log = MetricsLog(tmp_path, resumed_step=0)
  for step in (10, 20, 30):
    log.write(step, {"loss": 1 / step})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "lo')  # cut off in the middle of a write

  log = MetricsLog(tmp_path, resumed_step=20)
  log.write(30, {"loss": 7.0})
  log.close()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [10, 20, 30]
  assert lines[1] == {"step": 20, "loss": 1 / 20} and lines[2]["loss"] == 7.0


@pytest.mark.parametrize("resumed_step", [0, 20])
def test_tensorboard_hides_the_steps_that_are_done_again_and_no_others(tmp_path, resumed_step):
  MetricsLog(tmp_path, resumed_step).close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  starts = [e.step for e in events(path.read_bytes()) if e.session_log.status == SessionLog.START]
  # TensorBoard drops earlier events from the START's step on, that step included.
  assert starts == [resumed_step + 1]


def events(data):
  """The records of a TensorBoard file: length (8 bytes), checksum (4), data, checksum (4)."""
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    yield Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]


def test_checkpoints_give_back_states_with_structure_and_types(tmp_path):
  state = {
    "step": jnp.int32(3),
    "layers": (
      {"kernel": jnp.array([[0.1, -0.0], [1e-45, 3e38]])},
      jnp.arange(3, dtype=jnp.uint32),
    ),
  }
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest() is None
  for step in (1, 2, 3):
    checkpoints.save(step, state | {"step": np.asarray(step, np.int32)})
  checkpoints.close()

  again = Checkpoints(tmp_path)
  assert again.latest() == 3
  restored = again.restore(3, like=jax.tree.map(jnp.zeros_like, state))
  assert again.restore(2, like=state)["step"] == 2
  with pytest.raises(FileNotFoundError):  # the two newest are kept
    again.restore(1, like=state)
  again.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), strict=True)


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
  path = tmp_path / "page.html"
  artifacts.write_text(path, "old ε")

  def interrupted(*paths):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(artifacts.os, "replace", interrupted)
    artifacts.write_text(path, "new")
  assert path.read_text(encoding="utf-8") == "old ε"


def test_the_git_revision_is_that_of_the_checkout():
  """With -dirty behind it while something is not committed; None where jaxinf is installed."""
  root = Path(__file__).parents[2]
  if not (root / ".git").exists():
    pytest.skip("not a checkout")
  said = artifacts.git_revision().removesuffix("-dirty")
  hashes = [
    subprocess.run(["git", "rev-parse", name], cwd=root, capture_output=True, text=True).stdout
    for name in (f"{said}^{{commit}}", "HEAD^{commit}")
  ]
  assert hashes[0] == hashes[1] != ""
