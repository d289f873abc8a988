"""Conditioning of data sets: what is asked for, row by row with the images, or a clear refusal."""

import json

import numpy as np
import pytest

from jaxinf.core.arrays import Rows, read_rows
from jaxinf.data import DataConfig, load

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 2, 2, 1)).astype(np.uint8)
IDS = np.array([f"image_{n}" for n in range(6)])
CAPTIONS = np.array([f"a picture of {n} cats" for n in range(6)])
LABELS = np.array([2, 0, 1, 1, 0, 2])
SHUFFLED = np.array([4, 0, 5, 2, 1, 3])


@pytest.fixture
def arrays(tmp_path):
  """Loads a file of the images, with further arrays, by a config with further options."""

  def of(held=None, **options):
    path = tmp_path / "images.npz"
    np.savez(path, images=IMAGES, ids=IDS, **{"labels": LABELS} | (held or {}))
    return load(DataConfig("arrays", path=str(path), **options))

  return of


def write_captions(path, *, ids=IDS[SHUFFLED], captions=CAPTIONS[SHUFFLED], embeddings=None):
  """Captions in another order than the images, as a file or a folder."""
  held = {} if embeddings is None else {"embeddings": embeddings}
  if path.suffix == ".npz":
    np.savez(path, ids=ids, captions=captions, **held)
  else:
    path.mkdir(exist_ok=True)
    texts = {"ids": ids.tolist(), "captions": captions.tolist()}
    (path / "captions.json").write_text(json.dumps(texts))
    for name, array in held.items():
      np.save(path / f"{name}.npy", array)
  return str(path)


def rows_of(dataset, name):
  return read_rows(dataset.examples.conditioning[name], np.arange(len(dataset)))


def test_without_names_there_is_none(arrays):
  plain, unasked = arrays(), arrays({"text": np.zeros((6, 3))})
  assert plain.conditioning is None and plain.examples.conditioning is None
  assert unasked.conditioning is None and unasked.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_labels_and_text_are_given_in_the_types_that_models_get(arrays, shape, dtype):
  text = RNG.normal(size=shape).astype(dtype)
  dataset = arrays({"text": text}, conditioning=("text", "labels"))
  np.testing.assert_array_equal(rows_of(dataset, "labels"), LABELS.astype(np.int32), strict=True)
  np.testing.assert_array_equal(rows_of(dataset, "text"), text.astype(np.float32), strict=True)
  only = arrays({"text": text}, conditioning=("labels",))
  assert only.conditioning.keys() == {"labels"}
  assert len({d.fingerprint() for d in (dataset, only, arrays())}) == 3


@pytest.mark.parametrize("kind", ["captions.npz", "captions"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)])
def test_captions_in_any_order_come_to_their_images(arrays, kind, shape, tmp_path):
  text = RNG.normal(size=shape).astype(np.float16)
  path = write_captions(tmp_path / kind, embeddings=text[SHUFFLED])
  dataset = arrays(captions=path, conditioning=("text",))
  assert dataset.captions.tolist() == CAPTIONS.tolist()
  np.testing.assert_array_equal(rows_of(dataset, "text"), text.astype(np.float32), strict=True)
  assert isinstance(dataset.conditioning["text"], Rows) == (kind == "captions")  # stays on disk
  inside = arrays({"text": text}, conditioning=("text",))
  assert dataset.fingerprint() == inside.fingerprint()
  some = arrays(captions=path, conditioning=("text",), num_examples=3)
  chosen = dataset.positions(some.ids)
  assert some.captions.tolist() == CAPTIONS[chosen].tolist()
  np.testing.assert_array_equal(rows_of(some, "text"), text[chosen].astype(np.float32))


@pytest.mark.parametrize("kind", ["captions.npz", "captions"])
def test_captions_alone_are_for_reports_and_change_no_result(arrays, kind, tmp_path):
  path = write_captions(tmp_path / kind)
  dataset = arrays(captions=path)
  assert dataset.captions.tolist() == CAPTIONS.tolist() and dataset.conditioning is None
  assert dataset.fingerprint() == arrays().fingerprint()
  with pytest.raises(ValueError, match=r"asks for text, .*has no embeddings.*data\.captions"):
    arrays(captions=path, conditioning=("text",))


def test_captions_of_more_examples_serve_a_subset_and_missing_ones_are_named(arrays, tmp_path):
  ids = np.array([*IDS, "another"])
  captions = np.array([*CAPTIONS, "none of ours"])
  path = write_captions(tmp_path / "captions.npz", ids=ids, captions=captions)
  assert arrays(captions=path).captions.tolist() == CAPTIONS.tolist()
  path = write_captions(tmp_path / "captions.npz", ids=ids[2:], captions=captions[2:])
  with pytest.raises(ValueError, match=r"captions\.npz: 2 of 6 ids .*'image_0', 'image_1'\..*look"):
    arrays(captions=path)


def test_digits_are_conditioned_on_their_labels():
  dataset = load(DataConfig("digits", conditioning=("labels",), num_examples=20))
  assert rows_of(dataset, "labels").tolist() == dataset.labels.tolist()
  plain = load(DataConfig("digits", num_examples=20))
  assert dataset.ids.tolist() == plain.ids.tolist()
  assert dataset.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
  ("held", "options", "message"),
  [
    ({}, {"conditioning": ("label",)}, "Unknown conditioning 'label'; there are: labels, text"),
    ({}, {"conditioning": ("labels", "labels")}, "must name each once"),
    ({}, {"conditioning": ("text",)}, "'arrays' has no embeddings"),
    ({"labels": LABELS - 1}, {"conditioning": ("labels",)}, "0, 1, ….*got -1…1"),
    ({"labels": LABELS + 2**40}, {"conditioning": ("labels",)}, "32 bits"),
    ({"text": np.zeros((5, 3))}, {"conditioning": ("text",)}, r"npz: .*each of the 6.*\(5, 3\)"),
    ({"text": np.zeros(6)}, {"conditioning": ("text",)}, r"\[N, E\].*shape \(6,\)"),
    ({"text": np.zeros((6, 3), int)}, {"conditioning": ("text",)}, "floating-point.*int"),
    ({"text": np.full((6, 3), np.nan)}, {"conditioning": ("text",)}, "finite; row 0"),
  ],
)
def test_what_cannot_be_given_is_refused(arrays, held, options, message):
  with pytest.raises(ValueError, match=message):
    arrays(held, **options)


def test_labels_of_an_unlabelled_data_set_are_refused(tmp_path):
  np.savez(tmp_path / "plain.npz", images=IMAGES)
  with pytest.raises(ValueError, match="asks for labels, and data set 'arrays' has none"):
    load(DataConfig("arrays", path=str(tmp_path / "plain.npz"), conditioning=("labels",)))


def test_text_from_two_sources_is_refused(arrays, tmp_path):
  path = write_captions(tmp_path / "captions.npz", embeddings=np.zeros((6, 2)))
  with pytest.raises(ValueError, match=r"both .*images\.npz and data\.captions=.*captions\.npz"):
    arrays({"text": np.zeros((6, 2))}, captions=path, conditioning=("text",))
  path = write_captions(tmp_path / "captions.npz")  # captions alone go with the file's own text
  dataset = arrays({"text": np.ones((6, 2))}, captions=path, conditioning=("text",))
  assert dataset.captions.tolist() == CAPTIONS.tolist() and (rows_of(dataset, "text") == 1).all()


@pytest.mark.parametrize("kind", ["captions.npz", "captions"])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"embeddings": np.zeros((5, 2))}, r"n rows of .*embeddings \(5, 2\)"),
    ({"captions": CAPTIONS[:5]}, r"captions \(5,\)"),
    ({"ids": np.array(["a"] * 6)}, "n different ids.* 1 different"),
    ({"embeddings": np.float32(0)}, r"embeddings \(\)"),
  ],
)
def test_captions_whose_parts_do_not_fit_name_the_file(arrays, kind, changes, message, tmp_path):
  path = write_captions(tmp_path / kind, **changes)
  with pytest.raises(ValueError, match=rf"captions.*: expected .*{message}"):
    arrays(captions=path, conditioning=("text",))


def test_files_that_are_no_captions_name_the_file(arrays, tmp_path):
  path = tmp_path / "texts"

  def refused(message):
    with pytest.raises(ValueError, match=message):
      arrays(captions=str(path), conditioning=("text",))

  refused(r"texts: expected an \.npz file, got none")
  path.write_text("no captions")
  refused(r"texts: expected an \.npz file, got something else.*captions=")
  np.savez(tmp_path / "texts.npz", ids=IDS, caption=CAPTIONS)
  (tmp_path / "texts.npz").rename(path)
  refused("texts: expected ids, captions and.*got caption, ids")
  path.unlink()
  path.mkdir()
  refused(r"captions\.json: expected .*two lists of strings")
  for text in ("[1, 2]", '{"ids": [1], "captions": ["a"]}', '{"ids": ["a"]', "\x00"):
    (path / "captions.json").write_text(text)
    refused(r"captions\.json: expected .*two lists of strings")
  write_captions(path, embeddings=np.zeros((6, 20)))
  whole = (path / "embeddings.npy").read_bytes()
  for content in (whole[:-300], whole[:20], b"", b"no array of NumPy's"):
    (path / "embeddings.npy").write_bytes(content)
    refused(r"embeddings\.npy: expected an array of numbers")
