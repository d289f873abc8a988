"""Every data set keeps one contract; ids are stable, subsets seeded, and bad files named."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxinf.core import arrays
from jaxinf.core.arrays import as_float, read_rows
from jaxinf.data import DATASETS, DataConfig, Dataset, load
from jaxinf.data.dataset import stratified_positions
from tests.data.artbench_tar import ARTBENCH, write_artbench
from tests.stored import Stored

CIFAR_LABELS = [
  "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip


def config(name, **options):
  return DataConfig(name=name, **options)


def write_image(path, size=(6, 4), mode="RGB", value=100, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  colour = value if mode in ("L", "P", "I;16") else (value,) * len(mode)
  Image.new(mode, size, colour).save(path, **options)
  return path


def cifar_folder():
  default = pathlib.Path.home() / "tensorflow_datasets"
  folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", default)) / "cifar10"
  if not folder.is_dir():
    pytest.skip(f"needs the real CIFAR-10, which TFDS has not prepared in {folder}")
  return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """A config of each data set, with files of the test's own where it is not CIFAR or digits."""
  root = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (30, 5, 4, 3)).astype(np.uint8)
  np.savez(root / "images.npz", images=images, labels=np.arange(30) % 3)
  for n, image in enumerate(images):
    path = root / "images" / "abc"[n % 3] / f"{n}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  write_artbench(root / "artbench.tar", range(60))
  paths = {"arrays": root / "images.npz", "folder": root / "images"}
  paths |= dict.fromkeys(("artbench", "artbench2"), root / "artbench.tar")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ARTBENCH, "_ARTBENCH2_STYLE_SIZE", 5)
    yield {n: config(n, path=str(paths[n]) if n in paths else None) for n in DATASETS}


@pytest.fixture(scope="module")
def loaded(configs):
  """name -> data set, each loaded once: decoding CIFAR-10 takes seconds."""
  cache = {}

  def get(name):
    if name.startswith("cifar"):
      cifar_folder()
    if name not in cache:
      cache[name] = load(configs[name])
    return cache[name]

  return get


@pytest.fixture(params=DATASETS)
def dataset(request, loaded):
  return loaded(request.param)


def small(**fields):
  """Four one-channel images, unless `fields` say otherwise."""
  images = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 1)
  ids, labels = np.array(["a", "b", "c", "d"]), np.array([0, 1, 0, 1])
  return Dataset(**({"name": "small", "images": images, "ids": ids, "labels": labels} | fields))


# The contract of every data set.


def test_images_ids_and_labels_have_the_stated_shapes_and_ranges(dataset):
  assert dataset.name in DATASETS
  assert dataset.images.shape == (len(dataset), *dataset.image_shape)
  assert dataset.images.dtype in (np.uint8, np.float32)
  assert dataset.ids.dtype.kind == "U" and len(set(dataset.ids.tolist())) == len(dataset)
  assert dataset.labels.shape == (len(dataset),)
  if dataset.label_names:
    assert set(np.unique(dataset.labels)) == set(range(len(dataset.label_names)))


def test_pixels_fill_the_range_from_minus_one_to_one(dataset):
  sample = dataset.take(np.arange(0, len(dataset), 1 + len(dataset) // 200))
  images = as_float(sample.images)
  assert images.dtype == np.float32 and images.shape == sample.images.shape
  assert images.min() >= -1 and images.max() <= 1
  assert images.min() < -0.9 and images.max() > 0.9  # as real pictures do
  assert dataset.is_pixels


def test_take_and_select_carry_ids_labels_and_pixels_together(dataset):
  indices = np.array([len(dataset) - 1, 0, 7])
  taken = dataset.take(indices)
  selected = dataset.select(dataset.ids[indices])
  np.testing.assert_array_equal(dataset.positions(taken.ids), indices)
  for part in (taken, selected):
    np.testing.assert_array_equal(part.images, dataset.images[indices])
    np.testing.assert_array_equal(part.ids, dataset.ids[indices])
    np.testing.assert_array_equal(part.labels, dataset.labels[indices])
    assert part.random_flip == dataset.random_flip and part.label_names == dataset.label_names


def test_fingerprint_tells_one_pixel_one_id_and_the_order_but_not_the_name(dataset):
  some = dataset.take(range(10))
  images, ids = some.images.copy(), some.ids.copy()
  images[3, 1, 2, 0] = 1 if images[3, 1, 2, 0] == 0 else 0
  ids[3] = "other"
  changed = [
    dataclasses.replace(some, images=images),
    dataclasses.replace(some, ids=ids),
    some.take(np.arange(10)[::-1]),
    some.take(range(9)),
  ]
  prints = {part.fingerprint() for part in [some, *changed]}
  assert len(prints) == 5
  assert dataclasses.replace(some, name="renamed").fingerprint() == some.fingerprint()
  assert len(some.fingerprint()) == 64


@pytest.mark.parametrize("name", ["digits", "arrays", "folder", "artbench", "artbench2"])
def test_loading_twice_gives_the_same_examples(name, configs, loaded):
  assert load(configs[name]).fingerprint() == loaded(name).fingerprint()


@pytest.mark.parametrize("name", ["digits", "arrays", "folder"])
def test_num_examples_is_seeded_and_keeps_examples_as_they_are(name, configs, loaded):
  subset = load(dataclasses.replace(configs[name], num_examples=12))
  again = load(dataclasses.replace(configs[name], num_examples=12))
  other = load(dataclasses.replace(configs[name], num_examples=12, seed=1))
  assert len(subset) == 12
  assert subset.fingerprint() == again.fingerprint() != other.fingerprint()
  assert subset.fingerprint() == loaded(name).select(subset.ids).fingerprint()


@pytest.mark.parametrize("name", DATASETS)
def test_options_that_a_data_set_does_not_read_are_refused(name, configs):
  pictures = ["path", "skip_damaged"]
  reads = {"cifar10": ["data_dir"], "cifar2": ["data_dir"], "arrays": ["path"]}
  reads |= {"folder": pictures, "artbench": pictures, "artbench2": pictures}
  options = {"data_dir": "x", "path": "x", "skip_damaged": True}
  for option in options.keys() - set(reads.get(name, [])):
    with pytest.raises(ValueError, match=rf"'{name}' does not read data\.{option}"):
      load(dataclasses.replace(configs[name], **{option: options[option]}))


def test_an_unknown_name_and_too_large_a_subset_are_refused(configs):
  with pytest.raises(ValueError, match="'mnist'.*digits, cifar10, cifar2, arrays, folder"):
    load(config("mnist"))
  for num_examples in (0, 1798):
    with pytest.raises(ValueError, match=rf"num_examples must .*got {num_examples}\."):
      load(dataclasses.replace(configs["digits"], num_examples=num_examples))


# Subsets.


@pytest.mark.parametrize("num_examples", [10, 100, 777])
def test_a_subset_has_the_labels_proportions_to_within_one_example(num_examples, loaded):
  labels = loaded("digits").labels
  chosen = stratified_positions(loaded("digits").ids, labels, num_examples=num_examples, seed=5)
  assert len(set(chosen)) == num_examples and np.all(np.diff(chosen) > 0)
  quota = num_examples * np.bincount(labels) / len(labels)
  assert np.all(np.abs(np.bincount(labels[chosen], minlength=10) - quota) <= 1)


def test_subsets_are_nested_and_do_not_depend_on_the_order_of_examples():
  ids, labels = np.array([f"x{n}" for n in range(200)]), np.arange(200) % 7

  def pick(ids, labels, num_examples):
    return set(ids[stratified_positions(ids, labels, num_examples=num_examples, seed=3)])

  order = np.random.default_rng(0).permutation(200)
  assert pick(ids, labels, 20) < pick(ids, labels, 60)
  assert pick(ids, None, 20) < pick(ids, None, 60)
  # 56 of 200 with classes of 28 and 29 gives 8 each: no ties between classes to break.
  assert pick(ids[order], labels[order], 56) == pick(ids, labels, 56)
  assert pick(ids[order], None, 20) == pick(ids, None, 20)


def test_a_seed_means_the_same_subset_in_every_version():
  ids, labels = np.array([f"x{n}" for n in range(12)]), np.arange(12) % 2
  chosen = stratified_positions(ids, labels, num_examples=4, seed=0)
  assert chosen.tolist() == [0, 3, 4, 5]  # published scores refer to such subsets


def test_every_example_is_equally_likely_to_be_in_a_subset():
  ids = np.array([f"x{n}" for n in range(20)])
  counts = np.zeros(20)
  for seed in range(400):
    counts[stratified_positions(ids, None, num_examples=5, seed=seed)] += 1
  # Binomial(400, 1/4): standard deviation 8.7; 4.5 of them for 20 examples.
  assert np.all(np.abs(counts - 100) < 39)


# CIFAR.


def test_cifar10_holds_the_training_images_in_the_order_of_their_ids(loaded):
  cifar10 = loaded("cifar10")
  assert cifar10.ids.tolist() == [f"train_{n:05d}" for n in range(50_000)]
  assert cifar10.image_shape == (32, 32, 3) and cifar10.random_flip
  assert np.bincount(cifar10.labels).tolist() == [5_000] * 10
  # The published data_batch_1 begins with a frog whose first pixel is (59, 62, 63).
  assert cifar10.images[0, 0, 0].tolist() == [59, 62, 63]
  assert cifar10.label_names[cifar10.labels[0]] == "frog"


def test_cifar10_agrees_with_tfds_own_decoding(loaded):
  cifar10 = loaded("cifar10")
  import tensorflow_datasets as tfds

  source = tfds.data_source("cifar10", split="train", download=False)
  for raw in source.__getitems__(list(range(0, 50_000, 2_500))):
    example = cifar10.select([raw["id"].decode()])
    np.testing.assert_array_equal(example.images[0], raw["image"])
    assert example.labels[0] == raw["label"]


def test_cifar2_is_half_automobiles_and_half_horses_of_cifar10(loaded):
  cifar2, cifar10 = loaded("cifar2"), loaded("cifar10")
  assert cifar2.label_names == ("automobile", "horse")
  assert np.bincount(cifar2.labels).tolist() == [2_500, 2_500]
  original = cifar10.select(cifar2.ids)
  assert original.fingerprint() == cifar2.fingerprint()
  names = [CIFAR_LABELS[label] for label in original.labels]
  assert names == [cifar2.label_names[label] for label in cifar2.labels]


def test_cifar2_depends_on_the_seed_alone_and_loads_quietly_without_tensorflow(loaded):
  cifar2, cifar10 = loaded("cifar2"), loaded("cifar10")
  code = (  # in a process of its own, to see what is imported and printed
    "import sys, jaxinf.data as data\n"
    "assert 'tensorflow_datasets' not in sys.modules\n"
    "print('loading', file=sys.stderr, flush=True)\n"
    "dataset = data.load(data.DataConfig('cifar2', seed=1))\n"
    "assert 'tensorflow' not in sys.modules\n"
    "print(*dataset.ids)"
  )
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  run = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
  )
  assert run.stderr.endswith("loading\n")
  ids = run.stdout.split()
  both = cifar10.take(np.flatnonzero(np.isin(cifar10.labels, [1, 7])))
  here = stratified_positions(both.ids, both.labels, num_examples=5_000, seed=1)
  assert ids == both.ids[here].tolist()
  # Hypergeometric, 2 × (2,500 of 5,000): mean 2,500, standard deviation 25; six of them.
  assert abs(len(set(ids) & set(cifar2.ids)) - 2_500) < 6 * 25


@pytest.mark.parametrize("name", ["cifar10", "cifar2"])
def test_cifar_that_is_not_prepared_says_how_to_prepare_it(name, tmp_path):
  with pytest.raises(ValueError, match="array_record") as error:
    load(config(name, data_dir=str(tmp_path)))
  for part in (str(tmp_path), "download_and_prepare", "tfds build cifar10", "TFDS_DATA_DIR"):
    assert part in str(error.value)
  assert list(tmp_path.iterdir()) == []  # nothing was downloaded


def test_cifar_with_a_missing_shard_names_the_file(tmp_path):
  for path in cifar_folder().glob("*/*.json"):
    target = tmp_path / "cifar10" / path.parent.name / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
  with pytest.raises(ValueError, match="cifar10-train.array_record-00000"):
    load(config("cifar10", data_dir=str(tmp_path)))


# What a Dataset refuses.

FLOATS = np.zeros((4, 2, 2, 1), np.float32)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"images": FLOATS[:, 0, 0, 0]}, r"data \[N, …\].*\(4,\)"),
    ({"images": FLOATS.astype(int)}, r"int64.*astype\('uint8'\)"),
    ({"images": FLOATS[:0]}, r"at least one number in it; got shape \(0, 2, 2, 1\)"),
    ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, r"\(4, 3, 8, 8\).*transpose\(0, 2, 3, 1\)"),
    ({"images": FLOATS + np.float32("nan")}, "finite"),
    ({"images": FLOATS - np.float32("inf")}, "finite"),
    ({"ids": np.arange(4)}, "ids must be strings.*int64"),
    ({"ids": None}, "ids must be strings.*NoneType"),
    ({"ids": np.array(["a", "b"])}, r"4 different ids.*\(2,\)"),
    ({"ids": np.array(["a", "b", "a", "c"])}, "different; got more than once: 'a'"),
    ({"labels": np.zeros(4)}, "4 integers.*float64"),
    ({"labels": np.zeros(3, int)}, r"4 integers.*\(3,\)"),
    ({"label_names": ("only",)}, "0…0.*got 0…1: labels without a class"),
    ({"conditioning": {}}, "holds no arrays"),
    ({"conditioning": {"text": np.zeros((3, 2))}}, r"\['text'\].*each of the 4.*\(3, 2\)"),
    ({"conditioning": {"text": FLOATS + np.float32("nan")}}, r"\['text'\] must be finite"),
    ({"captions": np.array(["a", "b"])}, r"captions must be .* 4 strings.*\(2,\)"),
    ({"captions": np.zeros(4)}, "captions must be .* 4 strings.*float64"),
    ({"captions": ["a", "b", "c", "d"]}, "captions must be a NumPy array.*list"),
  ],
)
def test_a_data_set_refuses_what_breaks_its_contract(fields, message):
  with pytest.raises(ValueError, match=message):
    small(**fields)


def test_take_and_select_refuse_what_is_not_there():
  with pytest.raises(ValueError, match="0…3; got 0…4"):
    small().take([0, 4])
  with pytest.raises(ValueError, match="0…3; got -1…-1"):
    small().take([-1])
  for indices in ([], np.array([True, False, True, False]), [[0, 1]]):
    with pytest.raises(ValueError, match="non-empty list of integers"):
      small().take(indices)
  with pytest.raises(ValueError, match="different; got more than once: 'b'"):
    small().take([1, 1])
  with pytest.raises(ValueError, match="2 of 3 ids are not in data set 'small': 'x', 'y'"):
    small().select(["x", "a", "y"])


@pytest.mark.parametrize(
  ("images", "pixels"),
  [
    (np.zeros((4, 3, 3, 2), np.uint8), True),
    (FLOATS - np.float32(1), True),
    (FLOATS.astype(np.float16) + 1, True),
    (FLOATS.astype(np.float64), True),
    (FLOATS + np.float32(4), False),  # latents
    (np.zeros((4, 2, 2, 16), np.float32) - 3, False),
    (FLOATS[..., 0], False),  # a series
    (FLOATS[:, 0, 0], False),  # vectors
    (FLOATS[..., None], False),  # volumes
    (np.zeros((4, 2, 2, 2, 3), np.uint8), True),
  ],
)
def test_data_of_any_shape_are_taken_and_pixels_known(images, pixels):
  dataset = small(images=images)
  assert dataset.is_pixels == pixels and dataset.image_shape == images.shape[1:]
  assert dataset.examples.data is dataset.images is images
  assert dataset.examples.groups.tolist() == [0, 1, 0, 1]


def test_a_list_of_numbers_becomes_an_array():
  assert small(images=FLOATS.tolist()).take([1, 0]).images.shape == (2, 2, 2, 1)


@pytest.mark.parametrize("kind", ["memmap", "h5py"])
def test_images_on_disk_are_the_same_data_set_read_a_few_rows_at_a_time(
  kind, tmp_path, monkeypatch
):
  images = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 1)).astype(np.uint8)
  np.save(tmp_path / "images.npy", images)
  lazy = np.load(tmp_path / "images.npy", mmap_mode="r") if kind == "memmap" else Stored(images)
  fields = dict(ids=np.array([f"x{n}" for n in range(40)]), labels=np.arange(40) % 3)
  whole, dataset = small(images=images, **fields), small(images=lazy, **fields)
  monkeypatch.setattr(arrays, "_BLOCK_BYTES", 5 * 12)
  assert dataset.fingerprint() == whole.fingerprint() and dataset.is_pixels
  some, same = dataset.sample(7, seed=1), whole.sample(7, seed=1)
  assert some.fingerprint() == same.fingerprint()
  np.testing.assert_array_equal(some.take([4, 0]).images, same.images[[4, 0]])
  assert dataset.images is lazy and (kind == "memmap" or lazy.most <= 7)


@pytest.mark.parametrize("kind", ["memory", "h5py"])
def test_conditioning_and_captions_go_with_their_examples(kind):
  text = np.random.default_rng(0).normal(size=(4, 2, 3))
  given = {"labels": np.arange(4), "text": text if kind == "memory" else Stored(text)}
  dataset = small(conditioning=given, captions=np.array(["A", "B", "C", "D"]))
  for part, rows in (
    (dataset, [0, 1, 2, 3]),
    (dataset.take([3, 1]), [3, 1]),
    (dataset.sample(3, seed=2), dataset.positions(dataset.sample(3, seed=2).ids)),
  ):
    assert part.captions.tolist() == [i.upper() for i in part.ids]
    examples = part.examples
    assert examples.conditioning.keys() == {"labels", "text"}
    labels, found = (read_rows(x, np.arange(len(part))) for x in examples.conditioning.values())
    assert labels.dtype == np.int32 and labels.tolist() == list(rows)
    np.testing.assert_array_equal(found, text[rows].astype(np.float32), strict=True)


def test_a_fingerprint_tells_conditioning_but_no_captions():
  text = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  other = text.copy()
  other[2, 1] += 1
  given = [None, {"text": text}, {"text": other}, {"other": text}, {"text": text[:, None]}]
  assert len({small(conditioning=each).fingerprint() for each in given}) == 5
  again = small(conditioning={"text": text.copy()}, captions=np.array(list("abcd")))
  assert again.fingerprint() == small(conditioning={"text": Stored(text)}).fingerprint()


def test_a_fingerprint_is_that_of_published_runs():
  """Results that were kept are found by it."""
  expected = "b09724903f36d77483053c8b69bd677c1c62495da420ba8f45457cb236be0c94"
  assert small().fingerprint() == expected


# Users' files.


def test_arrays_keep_given_ids_and_default_to_the_index(tmp_path):
  images = np.zeros((3, 2, 2, 1), np.float32)
  for ids, expected in [
    (np.array(["b", "a", "c"]), ["b", "a", "c"]),
    (np.array([7, 5, 6]), ["7", "5", "6"]),
    (np.array([b"x", b"y", b"z"]), ["x", "y", "z"]),
  ]:
    np.savez(tmp_path / "ids.npz", images=images, ids=ids)
    assert load(config("arrays", path=str(tmp_path / "ids.npz"))).ids.tolist() == expected
  np.savez_compressed(tmp_path / "plain.npz", images=images)
  plain = load(config("arrays", path=str(tmp_path / "plain.npz")))
  assert plain.ids.tolist() == ["0", "1", "2"] and plain.labels is None


@pytest.mark.parametrize(
  ("contents", "message"),
  [
    ({"images": FLOATS[:, 0, 0, 0]}, r"data \[N, …\]"),
    ({"images": np.float32(0)}, r"data \[N, …\]"),
    ({"images": FLOATS.astype(int)}, "int64"),
    ({"images": FLOATS, "ids": np.array([1, 1, 2, 3])}, "more than once: '1'"),
    ({"images": FLOATS, "ids": np.zeros(4)}, "ids must be strings"),
    ({"images": FLOATS, "labels": np.zeros(3, int)}, "4 integers"),
    ({"images": FLOATS, "label": np.zeros(4, int)}, "got images, label"),
    ({"pictures": FLOATS}, "expected the arrays images"),
    ({"images": np.array([None])}, "without object arrays"),
  ],
)
def test_arrays_with_wrong_contents_name_the_file(contents, message, tmp_path):
  path = tmp_path / "wrong.npz"
  np.savez(path, **contents)
  with pytest.raises(ValueError, match=rf"wrong\.npz: .*{message}"):
    load(config("arrays", path=str(path)))


def test_arrays_that_are_missing_or_damaged_name_the_file(tmp_path):
  path = tmp_path / "file.npz"
  with pytest.raises(ValueError, match="'arrays' needs data.path"):
    load(config("arrays"))
  with pytest.raises(ValueError, match=r"file\.npz: .*got none"):
    load(config("arrays", path=str(path)))
  np.savez(path, images=np.random.default_rng(0).random((50, 8, 8, 1), np.float32))
  whole = path.read_bytes()
  damaged = whole[:4000] + bytes(8) + whole[4008:]
  for content in (whole[:-200], b"", b"not a zip file", damaged):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.npz: expected"):
      load(config("arrays", path=str(path)))


@pytest.mark.parametrize("shape", [(5,), (6, 2), (2, 3, 3, 2), (4, 4, 16)])
def test_arrays_may_be_latents_series_vectors_or_volumes(shape, tmp_path):
  values = np.random.default_rng(0).normal(size=(3, *shape)) * 4
  np.savez(tmp_path / "file.npz", images=values)
  dataset = load(config("arrays", path=str(tmp_path / "file.npz")))
  assert dataset.image_shape == shape and not dataset.is_pixels
  np.testing.assert_array_equal(dataset.images, values)


def test_folder_ids_are_relative_paths_and_labels_first_level_folders(tmp_path):
  for name in ("b/2.PNG", "b/deep/1.jpeg", "a/9.bmp", "a/3.webp", ".hidden/x.png", "b/._2.png"):
    write_image(tmp_path / name)
  (tmp_path / "README.txt").write_text("not an image")
  dataset = load(config("folder", path=str(tmp_path)))
  assert dataset.ids.tolist() == ["a/3.webp", "a/9.bmp", "b/2.PNG", "b/deep/1.jpeg"]
  assert dataset.labels.tolist() == [0, 0, 1, 1] and dataset.label_names == ("a", "b")
  write_image(tmp_path / "outside.png")
  mixed = load(config("folder", path=str(tmp_path)))
  assert mixed.labels is None and len(mixed) == 5


def test_folder_keeps_grey_images_one_channel_unless_one_is_coloured(tmp_path):
  write_image(tmp_path / "a.png", mode="L", value=10)
  write_image(tmp_path / "b.png", mode="LA", value=255)
  grey = load(config("folder", path=str(tmp_path)))
  assert grey.image_shape == (4, 6, 1) and grey.images[:, 0, 0, 0].tolist() == [10, 255]
  write_image(tmp_path / "c.png", mode="RGBA", value=255)
  coloured = load(config("folder", path=str(tmp_path)))
  assert coloured.image_shape == (4, 6, 3) and coloured.images[0, 0, 0].tolist() == [10] * 3


def test_folder_crops_the_central_square_and_resizes(tmp_path):
  pixels = np.zeros((4, 10, 3), np.uint8)
  pixels[:, 3:7] = 200
  Image.fromarray(pixels).save(tmp_path / "wide.png")
  Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
  same = load(config("folder", path=str(tmp_path), image_size=4))
  assert same.images.shape == (2, 4, 4, 3) and np.all(same.images == 200)
  assert np.all(load(config("folder", path=str(tmp_path), image_size=2)).images == 200)
  with pytest.raises(ValueError, match="image_size must be positive.*got 0"):
    load(config("folder", path=str(tmp_path), image_size=0))


def test_a_folder_beyond_what_memory_is_given_is_the_same_data_set(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  for colours in (0, 3):  # first all are grey, then one is coloured
    for n in range(6):
      shape = (5, 4, colours) if colours and n == 3 else (5, 4)
      Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f"{n}.png")
    monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", 2**30)
    whole = load(config("folder", path=str(tmp_path)))
    monkeypatch.setattr(arrays, "_MOST_HELD_BYTES", 0)
    lazy = load(config("folder", path=str(tmp_path)))
    assert whole.image_shape == lazy.image_shape == (5, 4, colours or 1)
    assert isinstance(lazy.images, arrays.Rows) and lazy.fingerprint() == whole.fingerprint()


def test_folder_leaves_damaged_images_out_where_asked_and_names_them(tmp_path, caplog):
  for n in range(5):
    write_image(tmp_path / f"{n}.png", value=50 * n)
  whole = load(config("folder", path=str(tmp_path)))
  (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
  (tmp_path / "3.png").write_bytes(b"")
  caplog.set_level("WARNING", "jaxinf")
  some = load(config("folder", path=str(tmp_path), skip_damaged=True))
  assert some.fingerprint() == whole.select(["0.png", "2.png", "4.png"]).fingerprint()
  (record,) = caplog.records
  assert "2 of 5 images cannot be read and are left out: '1.png', '3.png'" in record.getMessage()
  write_image(tmp_path / "2.png", mode="RGBA", value=100)  # readable, but no such image
  with pytest.raises(ValueError, match=r"2\.png: .*transparent"):
    load(config("folder", path=str(tmp_path), skip_damaged=True))
  for n in range(5):
    (tmp_path / f"{n}.png").write_bytes(b"")
  with pytest.raises(ValueError, match="none of 5 images can be read"):
    load(config("folder", path=str(tmp_path), skip_damaged=True))


def test_folder_counts_files_that_it_does_not_read(tmp_path, caplog):
  for name in ("a.png", "b.jpg", "c.gif", "d.GIF", "sub/e.tiff", ".hidden.gif"):
    write_image(tmp_path / name)
  caplog.set_level("WARNING", "jaxinf")
  assert len(load(config("folder", path=str(tmp_path)))) == 2
  (record,) = caplog.records
  assert "3 files are not read (2 .gif, 1 .tiff): images are .png" in record.getMessage()


def test_a_file_is_read_by_its_content_and_only_by_four_formats(tmp_path):
  write_image(tmp_path / "a.png")
  write_image(tmp_path / "b.png", format="JPEG")
  assert len(load(config("folder", path=str(tmp_path)))) == 2
  write_image(tmp_path / "b.png", format="GIF")  # as EPS, for which another program would run
  with pytest.raises(ValueError, match=r"b\.png: .*got: none of PNG, JPEG, WEBP, BMP\."):
    load(config("folder", path=str(tmp_path)))


def test_folder_turns_photographs_upright(tmp_path):
  image = Image.new("RGB", (6, 4))
  exif = image.getexif()
  exif[0x0112] = 6  # orientation: a quarter turn
  image.save(tmp_path / "a.jpg", exif=exif)
  assert load(config("folder", path=str(tmp_path))).image_shape == (6, 4, 3)


def test_folder_without_images_names_the_folder(tmp_path):
  with pytest.raises(ValueError, match="'folder' needs data.path"):
    load(config("folder"))
  with pytest.raises(ValueError, match="nowhere: expected a folder"):
    load(config("folder", path=str(tmp_path / "nowhere")))
  (tmp_path / "notes.txt").write_text("no images here")
  with pytest.raises(ValueError, match=rf"{tmp_path.name}: expected images \(\.png, \.jpg"):
    load(config("folder", path=str(tmp_path)))


def test_folder_with_a_bad_image_names_the_file(tmp_path):
  write_image(tmp_path / "a.png")
  bad = tmp_path / "sub" / "bad.png"

  def load_folder():
    return load(config("folder", path=str(tmp_path)))

  write_image(bad, size=(5, 5))
  with pytest.raises(ValueError, match=r"sub/bad\.png: expected 6 × 4.*a\.png.*image_size"):
    load_folder()
  write_image(bad, mode="RGBA", value=100)
  with pytest.raises(ValueError, match=r"sub/bad\.png: .*transparent"):
    load_folder()
  write_image(bad, mode="P", value=0, transparency=0)
  with pytest.raises(ValueError, match=r"sub/bad\.png: .*transparent"):
    load_folder()
  write_image(bad, mode="I;16", value=1000)
  with pytest.raises(ValueError, match=r"sub/bad\.png: .*8 bits"):
    load_folder()
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
  for suffix in (".png", ".jpg", ".webp", ".bmp"):
    bad.unlink(missing_ok=True)
    bad = bad.with_suffix(suffix)
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an image"):
      bad.write_bytes(content)
      with pytest.raises(ValueError, match=rf"sub/bad\{suffix}: expected a readable image"):
        load_folder()
