"""What a model is also given of each example: its class label, the embedding of its text."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinf.core.arrays import Chosen, converted, is_floating
from jaxinf.core.registry import named
from jaxinf.data.dataset import DataConfig, Dataset
from jaxinf.data.files import as_strings, positions_in, read_npz

_HOLDS = "ids=..., captions=..., embeddings=..."


def conditioned(dataset: Dataset, config: DataConfig) -> Dataset:
  """The data set with the conditioning that the config names, and the captions of its file.

  The conditioning is {name: array}, with the names that are asked for: "labels" is [N] int32,
  "text" [N, E] or [N, L, E] float32.

  Args:
    dataset: whole, with the conditioning that its files hold.
    config: `conditioning` are the names. `captions` is read by `read_captions`, and its embeddings
      are "text".

  Raises:
    ValueError: an unknown or repeated name, labels or text that the data set has not, or captions
      that do not fit it.
  """
  if len(set(config.conditioning)) < len(config.conditioning):
    raise ValueError(f"data.conditioning must name each once; got {config.conditioning}.")
  checked = {name: named(CONDITIONING, name, "conditioning") for name in config.conditioning}
  held, captions = dict(dataset.conditioning or {}), None
  if config.captions is not None:
    captions, embeddings = read_captions(config.captions, dataset.ids)
    if embeddings is not None and "text" in held:
      raise ValueError(
        f"text comes from both {config.path} and data.captions={config.captions!r}. Leave one out."
      )
    held |= {} if embeddings is None else {"text": embeddings}
  if dataset.labels is not None:
    held["labels"] = dataset.labels
  given = {name: of(held.get(name), dataset) for name, of in checked.items()}
  return dataclasses.replace(dataset, conditioning=given or None, captions=captions)


def read_captions(path: str | pathlib.Path, ids: np.ndarray) -> tuple[np.ndarray, Any]:
  """Captions [len(ids)], strings, and their embeddings, of the examples with these ids.

  An .npz file holds `ids` [n] and `captions` [n], and may hold `embeddings` [n, E] or [n, L, E]. A
  folder holds captions.json, an object of two lists `ids` and `captions`, and may hold
  embeddings.npy, which stays on disk. Ids are unique and in any order; all of the data set's must
  be among them, and there may be more.

  Returns:
    captions, and embeddings, which are None where there are none.

  Raises:
    ValueError: nothing there, another form, or ids without a caption.
  """
  path = pathlib.Path(path).expanduser()
  contents = _folder_contents(path) if path.is_dir() else read_npz(path, holds=_HOLDS)
  unknown = sorted(set(contents) - {"ids", "captions", "embeddings"})
  if unknown or not {"ids", "captions"} <= set(contents):
    raise ValueError(
      f"{path}: expected ids, captions and, if wanted, embeddings; "
      f"got {', '.join(sorted(contents)) or 'none'}. Rename or drop the others."
    )
  captions = contents["captions"]
  if captions.dtype.kind != "U":
    raise ValueError(f"{path}: expected captions that are strings; got {captions.dtype}.")
  found = as_strings(contents.pop("ids"))
  positions = positions_in(path, found, ids, "caption", **contents)
  embeddings = contents.get("embeddings")
  if embeddings is None:
    return captions[positions], None
  on_disk = isinstance(embeddings, np.memmap)
  return captions[positions], Chosen(embeddings, positions) if on_disk else embeddings[positions]


def _folder_contents(path: pathlib.Path) -> dict[str, np.ndarray]:
  """What captions.json and embeddings.npy of a folder hold, by name."""
  file = path / "captions.json"
  try:
    texts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(texts, dict) or not all(_are_texts(value) for value in texts.values()):
      raise ValueError("something else.")
  except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are such
    raise ValueError(
      f'{file}: expected {{"ids": [...], "captions": [...]}}, two lists of strings, got: {error}'
    ) from error
  contents = {name: np.array(value, np.str_) for name, value in texts.items()}
  file = path / "embeddings.npy"
  if file.exists():
    try:
      contents["embeddings"] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise ValueError(
        f"{file}: expected an array of numbers, got: {error} Write it again with np.save."
      ) from error
  return contents


def _are_texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _class_labels(labels: Any, dataset: Dataset) -> np.ndarray:
  if labels is None:
    raise ValueError(
      f"data.conditioning asks for labels, and data set {dataset.name!r} has none. Label it, or "
      "take labels out."
    )
  if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
    raise ValueError(
      "Labels that a model is given are numbers of classes, 0, 1, …, of 32 bits; "
      f"got {labels.min()}…{labels.max()}."
    )
  return labels.astype(np.int32)


def _text(text: Any, dataset: Dataset) -> Any:
  if text is None:
    raise ValueError(
      f"data.conditioning asks for text, and data set {dataset.name!r} has no embeddings. Name a "
      "file that holds them in data.captions, or put an array text into the file of arrays."
    )
  if len(text.shape) not in (2, 3) or not is_floating(text.dtype):
    raise ValueError(
      "Embeddings of text must be [N, E] or [N, L, E], floating-point numbers; "
      f"got shape {tuple(text.shape)}, {text.dtype}."
    )
  return text if text.dtype == np.float32 else converted(text, np.float32)


CONDITIONING: dict[str, Callable[[Any, Dataset], Any]] = {"labels": _class_labels, "text": _text}
