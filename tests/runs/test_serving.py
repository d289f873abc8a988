"""The stages on the store of a tiny run: they say what the library says, reuse, refuse, survive."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinf.attribution.influence import influence
from jaxinf.core.damping import RelativeDamping
from jaxinf.core.examples import Examples
from jaxinf.engine import artifacts
from jaxinf.explorer.uploads import Asked, StoreScorer
from jaxinf.runs import serving
from jaxinf.runs.perform import perform
from jaxinf.runs.run import Run, load_curvature, load_model
from jaxinf.store.rows import RowStore
from tests.running import kill_when, run_of, start

NUM_TRAIN = 24
EXACT_ROWS = {"index.compression": None}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
  """A trained model and its curvature."""
  run = run_of(tmp_path_factory.mktemp("run") / "work")
  perform(run, "train")
  perform(run, "curvature")
  return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """Two new images twice: a file, and a folder of PNGs."""
  folder = tmp_path_factory.mktemp("images") / "new"
  folder.mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
  ids = np.array(["one.png", "two.png"])
  for image_id, image in zip(ids, pixels, strict=True):
    Image.fromarray(image[..., 0]).save(folder / image_id)
  np.savez(folder.with_suffix(".npz"), images=pixels, ids=ids)
  return folder


@pytest.fixture(scope="module")
def indexed(fitted):
  """The run with a store of float32 rows."""
  run = run_of(fitted.workdir, EXACT_ROWS)
  perform(run, "index")
  return run


@pytest.fixture
def copy(indexed, tmp_path):
  """The same without answers, to be changed."""
  shutil.copytree(indexed.workdir, tmp_path / "work", ignore=shutil.ignore_patterns("query"))
  return dataclasses.replace(indexed, workdir=tmp_path / "work")


def given(run: Run, path: Path) -> Run:
  return dataclasses.replace(run, images=path)


def best_of_influence(run: Run, queries: np.ndarray, ids: np.ndarray, kind=float):
  query, index = run.config.query, run.config.index
  return influence(
    load_curvature(run, load_model(run)),
    queries=Examples(queries, ids),
    train=run.dataset.examples,
    damping=kind(query.damping),
    draws=run.draws(index.draws, index.replicates, index.design, index.loss_power),
    query_draws=run.draws(query.draws, query.query_replicates, index.design),
    compression=None,
    compute=run.compute(query.batch_size),
  ).top(query.top_k)


def assert_best(arrays, expected) -> None:
  np.testing.assert_array_equal(arrays["ids"], expected.ids)
  np.testing.assert_array_equal(arrays["positions"], expected.positions)
  for name in ("values", "std_errors"):
    wanted = getattr(expected, name)
    # float32 rounding of gradients that turn into the eigenbasis
    np.testing.assert_allclose(arrays[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_query_finds_what_influence_finds_in_files_and_folders(indexed, images, capsys):
  contents = np.load(images.with_suffix(".npz"))
  expected = best_of_influence(indexed, contents["images"], contents["ids"])
  for path in (images.with_suffix(".npz"), images):
    artifact = serving.query(given(indexed, path))
    np.testing.assert_array_equal(artifact.arrays["query_ids"], contents["ids"])
    assert_best(artifact.arrays, expected)
    _, *table = capsys.readouterr().out.splitlines()  # after a line that says what they are
    assert [line.split()[0] for line in table] == [
      "one.png", *expected.ids[0], "two.png", *expected.ids[1]
    ]  # fmt: skip
  serving.query(dataclasses.replace(given(indexed, images), as_json=True))
  one, two = json.loads(capsys.readouterr().out)["queries"]
  assert (one["query"], two["query"]) == ("one.png", "two.png")
  assert [best["id"] for best in two["best"]] == expected.ids[1].tolist()
  assert one["best"][0]["score"] == artifact.arrays["values"][0, 0]
  # The two hold the same images under the same ids: one answer, found once.
  assert len(list(indexed.folder("query").iterdir())) == 1


def test_a_query_at_relative_damping_finds_what_influence_finds(copy, images):
  query = dataclasses.replace(copy.config.query, damping=0.1, damping_kind="relative")
  run = dataclasses.replace(copy, config=dataclasses.replace(copy.config, query=query))
  contents = np.load(images.with_suffix(".npz"))
  expected = best_of_influence(run, contents["images"], contents["ids"], RelativeDamping)
  assert_best(serving.query(given(run, images)).arrays, expected)


def test_an_answer_is_reused_until_the_store_or_the_question_changes(copy, images, monkeypatch):
  asked = []
  original = serving.Store.top
  monkeypatch.setattr(serving.Store, "top", lambda *a, **k: (asked.append(1), original(*a, **k))[1])
  run = given(copy, images)
  first = serving.query(run)
  again = serving.query(run)
  assert len(asked) == 1
  np.testing.assert_array_equal(first.arrays["values"], again.arrays["values"])
  query = dataclasses.replace(run.config.query, damping=1e-2)
  serving.query(dataclasses.replace(run, config=dataclasses.replace(run.config, query=query)))
  assert len(asked) == 2
  best = first.arrays["ids"][0, 0]
  serving.delete(dataclasses.replace(copy, ids=(best,)))
  after = serving.query(run)
  assert len(asked) == 3 and best not in after.arrays["ids"]


def test_images_are_appended_and_deleted(copy, images):
  store = serving.append(given(copy, images))
  assert len(store) == NUM_TRAIN + 2
  with pytest.raises(ValueError, match=r"2 of 2 ids are in the store already, such as 'one.png'"):
    serving.append(given(copy, images))
  # A training image that is itself the query, with draws of its own, is found at once.
  found = serving.query(given(copy, images)).arrays
  scores = best_of_influence(
    copy, *(np.load(images.with_suffix(".npz"))[n] for n in ("images", "ids"))
  )
  assert not np.array_equal(found["ids"], scores.ids)
  assert {"one.png", "two.png"} & set(found["ids"].ravel().tolist())
  serving.delete(dataclasses.replace(copy, ids=("one.png", "two.png")))
  assert_best(serving.query(given(copy, images)).arrays, scores)


def test_a_finished_store_is_reused_and_a_missing_one_is_made_again(copy, monkeypatch):
  made = []
  original = serving.build_store
  monkeypatch.setattr(
    serving, "build_store", lambda *a, **k: (made.append(1), original(*a, **k))[1]
  )
  pace = {"index.batch_size": 7, "index.reserve_mib": 1}
  slower = run_of(copy.workdir, {**EXACT_ROWS, **pace})
  perform(slower, "index")
  assert not made
  before = RowStore.open(serving.store_folder(copy)).read(0, NUM_TRAIN)
  shutil.rmtree(serving.store_folder(copy))
  with pytest.raises(ValueError, match=r"holds no store.*or stage index"):
    serving.verify(copy)
  perform(copy, "index")
  assert made
  after = RowStore.open(serving.store_folder(copy)).read(0, NUM_TRAIN)
  for ours, theirs in zip(after, before, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_an_upload_is_scored_as_the_stage_query_scores_files(indexed, images):
  """By the explorer, which tells of its progress, and at any other damping."""
  contents = np.load(images.with_suffix(".npz"))
  told, scorer = [], StoreScorer(indexed)
  assert not scorer.needs_label
  image = scorer.image_of((images / "two.png").read_bytes())
  np.testing.assert_array_equal(image, contents["images"][1])
  found = scorer.scores(image, Asked("two.png"), lambda *step: told.append(step))
  expected = serving.query(given(indexed, images)).arrays
  best = found.top(indexed.config.query.top_k)
  np.testing.assert_array_equal(best.ids[0], expected["ids"][1])
  # float32: the two images of the file are multiplied with the rows together
  np.testing.assert_allclose(best.values[0], expected["values"][1], rtol=1e-4)
  step, done, total = told[-1]
  assert step == "products with the store" and done == total >= NUM_TRAIN
  other = scorer.scores(image, Asked("two.png", damping=1e-1), lambda *step: None)
  assert other.settings["damping"] == 1e-1 and not np.allclose(other.values, found.values)


@pytest.mark.parametrize(("field", "value"), [("draws", 6), ("compression", "int8")])
def test_other_settings_refuse_the_store_with_the_difference(indexed, field, value):
  run = run_of(indexed.workdir, {**EXACT_ROWS, f"index.{field}": value})
  with pytest.raises(artifacts.StaleArtifact, match=rf"index\.{field}: .* → "):
    perform(run, "index")


def test_a_store_of_another_model_answers_nothing(copy, images):
  shutil.rmtree(copy.folder("curvature"))
  run = run_of(copy.workdir, {**EXACT_ROWS, "curvature.draws": 4}, images=images)
  perform(run, "curvature")
  with pytest.raises(artifacts.StaleArtifact, match="curvature: "):
    serving.query(run)
  with pytest.raises(artifacts.StaleArtifact, match="curvature_content: "):
    perform(run, "index")


def test_damage_is_told_and_the_file_named(copy, images):
  serving.verify(copy)
  path = serving.store_folder(copy) / "arrays/leaf_0/c/0/0"
  content = bytearray(path.read_bytes())
  content[100] ^= 1
  path.write_bytes(content)
  for stage in (serving.verify, serving.query):
    with pytest.raises(ValueError, match=f"{path}.*The store is damaged"):
      stage(given(copy, images))


@pytest.mark.parametrize(
  ("stage", "what", "message"),
  [
    ("query", {}, "Say which images: --images="),
    ("index-append", {}, "Say which images: --images="),
    ("query", {"images": Path("nowhere.npz")}, "--images=nowhere.npz does not exist"),
    ("query", {"images": Path(__file__)}, "--images must be an .npz file or a folder"),
    ("index-delete", {}, "Say which images to delete: --ids="),
    ("index-delete", {"ids": ("nobody",)}, "1 of 1 ids are not in the store, such as 'nobody'"),
  ],
)
def test_questions_without_sense_say_what_to_do(indexed, stage, what, message):
  with pytest.raises(ValueError, match=message):
    perform(dataclasses.replace(indexed, **what), stage)


# A stage with chunks of one image, so that a process can be killed between two of them.
SMALL_CHUNKS = (
  "-c",
  "import jaxinf.store.rows as s; s._CHUNK_EXAMPLES = 1; from jaxinf.__main__ import run; run()",
)
SLOW = {"index.draws": 2000, "index.batch_size": 1, "index.compression": "bfloat16"}


def test_a_killed_index_goes_on_to_the_same_scores(fitted, images, tmp_path):
  workdir = tmp_path / "work"
  for stage in ("train", "curvature"):
    shutil.copytree(fitted.folder(stage), workdir / stage)
  folder = workdir / "index" / "store"
  process = start("index", workdir, fields=SLOW, program=SMALL_CHUNKS)
  kill_when((folder / "progress.json").exists, process)
  store = RowStore.open(folder)
  done = store.progress("")
  assert 0 < done < 2 * NUM_TRAIN and store.ledger.num_written == 0
  assert not (workdir / "index" / "manifest.json").exists()
  written = {p: p.stat().st_mtime_ns for p in folder.glob("arrays/*/c/*/*")}
  # Here one device too, and as many rows at a time.
  run = run_of(workdir, SLOW, images=images)
  perform(run, "index")
  kept = [p for p, time_ns in written.items() if p.stat().st_mtime_ns == time_ns]
  assert len(kept) >= done // 2  # they are not written again
  whole = run_of(tmp_path / "whole", SLOW, images=images)
  for stage in ("train", "curvature"):
    shutil.copytree(fitted.folder(stage), whole.folder(stage))
  perform(whole, "index")
  ours, theirs = (serving.query(r).arrays for r in (run, whole))
  for name, wanted in theirs.items():
    np.testing.assert_array_equal(ours[name], wanted)
