"""CIFAR-10 and CIFAR-2 from TensorFlow Datasets, read without TensorFlow.

Ids are TFDS's own (`train_00009`), and examples are sorted by them: TFDS shuffles the files it
writes, so a position there identifies nothing.

A. Krizhevsky, "Learning multiple layers of features from tiny images", technical report, 2009.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from jaxinf.data.dataset import DataConfig, Dataset, check_options, stratified_positions

# Kept here since a data set that was prepared without the publisher's files lacks the names.
_LABEL_NAMES = (
  "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_CIFAR2_NAMES = ("automobile", "horse")
_CIFAR2_SIZE = 5_000


def cifar10(config: DataConfig) -> Dataset:
  """The 50,000 training images [N, 32, 32, 3], uint8, of ten classes."""
  ids, labels, pngs = _read(config)
  return Dataset(
    name="cifar10",
    images=_decode(pngs),
    ids=ids,
    labels=labels,
    label_names=_LABEL_NAMES,
    random_flip=True,
  )


def cifar2(config: DataConfig) -> Dataset:
  """2,500 automobiles and 2,500 horses of CIFAR-10's training images, drawn with `config.seed`."""
  ids, labels, pngs = _read(config)
  classes = [_LABEL_NAMES.index(name) for name in _CIFAR2_NAMES]
  members = np.flatnonzero(np.isin(labels, classes))
  places = stratified_positions(
    ids[members], labels[members], num_examples=_CIFAR2_SIZE, seed=config.seed
  )
  chosen = members[places]
  return Dataset(
    name="cifar2",
    images=_decode([pngs[n] for n in chosen]),
    ids=ids[chosen],
    labels=np.searchsorted(classes, labels[chosen]),
    label_names=_CIFAR2_NAMES,
    random_flip=True,
  )


def _read(config: DataConfig) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
  """Ids [N], labels [N] and PNG files of the training split, sorted by id."""
  check_options(config, reads=("data_dir",))
  import tensorflow_datasets as tfds  # slow, and needed here only

  try:
    source: Any = tfds.data_source(
      "cifar10",
      split="train",
      data_dir=config.data_dir,
      download=False,
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    examples = source.__getitems__(list(range(len(source))))
  except Exception as error:  # a missing folder, another format and a damaged file all differ
    raise ValueError(_not_readable(config.data_dir, error)) from error
  examples.sort(key=lambda example: example["id"])
  ids = np.array([example["id"].decode() for example in examples])
  labels = np.array([example["label"] for example in examples])
  return ids, labels, [example["image"] for example in examples]


def _decode(pngs: list[bytes]) -> np.ndarray:
  """[N, 32, 32, 3] uint8 pixels of PNG files in memory."""
  images = np.empty((len(pngs), 32, 32, 3), np.uint8)
  for n, png in enumerate(pngs):
    images[n] = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
  return images


def _not_readable(data_dir: str | None, error: Exception) -> str:
  folder = data_dir or "TFDS's default folder ($TFDS_DATA_DIR, else ~/tensorflow_datasets)"
  argument = f", data_dir={data_dir!r}" if data_dir else ""
  flag = f" --data_dir={data_dir}" if data_dir else ""
  reason = (str(error).strip('"') or type(error).__name__).splitlines()[0]
  return (
    f"CIFAR-10 cannot be read from {folder}: expected TFDS's cifar10 in the array_record format, "
    f"got: {reason} Prepare it once, in Python, with\n"
    f'  tfds.builder("cifar10", file_format="array_record"{argument}).download_and_prepare()\n'
    "or, where TensorFlow is installed, with\n"
    f"  tfds build cifar10 --file_format=array_record{flag}\n"
    "or point data.data_dir or $TFDS_DATA_DIR to a folder that holds it."
  )
