"""A user's own images, in a NumPy .npz file or a folder of image files; and embeddings of them."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinf.data.dataset import DataConfig, Dataset, check_options, some
from jaxinf.data.pictures import SUFFIXES, FolderFiles, image_names, read_pictures, readable


def arrays(config: DataConfig) -> Dataset:
  """The images of an .npz file at `config.path`.

  It holds `images` [N, H, W, C], uint8 in 0…255 or float32 in [-1, 1], and may hold `ids` [N]
  (strings or integers; the default is the index), `labels` [N] (integers) and `text`, embeddings
  [N, E] or [N, L, E] of what each image was described by. Other arrays are an error, since a
  misspelt `ids` would change what scores refer to.
  """
  check_options(config, reads=("path",))
  path = config_path(config, "an .npz file")
  contents = read_npz(path)
  unknown = sorted(set(contents) - {"images", "ids", "labels", "text"})
  if unknown or "images" not in contents:
    raise ValueError(
      f"{path}: expected the arrays images and, if wanted, ids, labels and text; "
      f"got {', '.join(sorted(contents)) or 'none'}. Rename or drop the others."
    )
  images = contents["images"]
  ids = contents.get("ids", np.arange(len(images) if images.ndim else 0))
  try:
    return Dataset(
      name="arrays",
      images=images,
      ids=as_strings(ids),
      labels=contents.get("labels"),
      conditioning={"text": contents["text"]} if "text" in contents else None,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def folder(config: DataConfig) -> Dataset:
  """The PNG, JPEG, WebP and BMP files under the folder `config.path`, at any depth.

  An id is the path within the folder (`cats/tabby.png`), and examples are sorted by it. Labels are
  the first-level sub-folders if every image lies in one, else None. Images are one-channel if all
  are grey, else RGB. With `config.image_size` each is cropped and resized to it. Names that start
  with a dot and links to folders are skipped, a warning counts files of other kinds, and an
  animation counts with its first frame. Beyond 1 GiB, images are decoded when they are asked for.

  Raises:
    ValueError: no folder, no images in it, an image that is damaged (unless `config.skip_damaged`),
      deeper than eight bits or partly transparent, or images that differ in size where
      `config.image_size` is None.
  """
  check_options(config, reads=("path", "skip_damaged"))
  root = config_path(config, "a folder of images")
  names, files = folder_names(root), FolderFiles(root)
  if config.skip_damaged:
    names = readable(files, names, str(root))
  labels, label_names = _folder_labels(names)
  return Dataset(
    name="folder",
    images=read_pictures(files, names, image_size=config.image_size),
    ids=np.array(names),
    labels=labels,
    label_names=label_names,
  )


def folder_names(root: pathlib.Path) -> list[str]:
  """Sorted paths, with slashes and relative to `root`, of the image files under it."""
  if not root.is_dir():
    raise ValueError(f"{root}: expected a folder of images, got none. Check data.path.")
  paths = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
  visible = (p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts))
  names = image_names(visible, str(root))
  if not names:
    raise ValueError(f"{root}: expected images ({', '.join(SUFFIXES)}) in the folder, got none.")
  return names


def read_embeddings(path: str | pathlib.Path, ids: np.ndarray) -> np.ndarray:
  """Embeddings [len(ids), E] of the examples with these ids, in that order, from an .npz file.

  It holds `embeddings` [n, E] and `ids` [n] (unique strings or integers), of these and maybe more.

  Raises:
    ValueError: the file lacks, or has other arrays; they do not fit; or an id is not in it.
  """
  path = pathlib.Path(path).expanduser()
  contents = read_npz(path, holds="embeddings=..., ids=...")
  if set(contents) != {"embeddings", "ids"}:
    names = ", ".join(sorted(contents)) or "none"
    raise ValueError(f"{path}: expected the arrays embeddings and ids; got {names}. Rename them.")
  embeddings, found = contents["embeddings"], as_strings(contents["ids"])
  if embeddings.ndim != 2:
    raise ValueError(f"{path}: expected embeddings [n, E]; got shape {embeddings.shape}.")
  return embeddings[positions_in(path, found, ids, "embedding", embeddings=embeddings)]


def positions_in(
  path: pathlib.Path, found: np.ndarray, ids: np.ndarray, noun: str, **arrays: Any
) -> np.ndarray:
  """Where the examples with these ids stand among those `found` in a file, [len(ids)] integers.

  Args:
    path: the file or folder, for messages.
    found: [n] strings.
    ids: of the data set, strings or integers; `found` may hold more.
    noun: what an id has a row of, for messages.
    **arrays: what the file holds of each of `found`, by name.

  Raises:
    ValueError: `found` are no n different strings, an array has not n rows, or ids are missing.
  """
  position_of = {i: n for n, i in enumerate(found.tolist())} if found.ndim == 1 else {}
  sizes = {len(found) if found.ndim else 0, *(len(a) if a.ndim else 0 for a in arrays.values())}
  if sizes != {len(position_of)} or found.dtype.kind != "U":
    shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
    raise ValueError(
      f"{path}: expected n rows of {' and '.join(arrays)}, and n different ids; got shapes "
      f"{shapes} and ids {found.shape} of type {found.dtype}, {len(position_of)} different."
    )
  wanted = as_strings(np.asarray(ids)).tolist()
  missing = [i for i in wanted if i not in position_of]
  if missing:
    raise ValueError(
      f"{path}: {len(missing)} of {len(wanted)} ids have no {noun}, such as {some(missing)}. "
      f"Its ids look like {some(found)}; add the missing ones."
    )
  return np.array([position_of[i] for i in wanted], np.int64)


def config_path(config: DataConfig, kind: str) -> pathlib.Path:
  """`config.path`; ValueError, which says what `kind` of thing lies there, where it is None."""
  if config.path is None:
    raise ValueError(f"data set {config.name!r} needs data.path, {kind}; got None.")
  return pathlib.Path(config.path).expanduser()


def read_npz(path: pathlib.Path, holds: str = "images=...") -> dict[str, np.ndarray]:
  """All arrays of an .npz file, by name; ValueError where it is none or damaged."""
  if not path.is_file():
    raise ValueError(f"{path}: expected an .npz file, got none. Check the path.")
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{path}: expected an .npz file, got something else or a damaged one. "
      f"Write it with np.savez(path, {holds})."
    )
  try:
    with np.load(path, allow_pickle=False) as contents:
      return {name: contents[name] for name in contents.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(
      f"{path}: expected readable arrays of numbers or strings, got: {error} "
      f"Write it again with np.savez(path, {holds}), without object arrays."
    ) from error


def read_array(path: str | pathlib.Path) -> np.ndarray:
  """The array of numbers or booleans in an .npy file; ValueError where there is none."""
  path = pathlib.Path(path).expanduser()
  try:
    array = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(
      f"{path}: expected an .npy file, got none or a damaged one ({error}). Write it with "
      "np.save(path, array)."
    ) from error
  if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
    raise ValueError(f"{path}: expected one array of numbers; write it with np.save(path, array).")
  return array


def write_npz(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays of numbers or strings as an .npz file that `read_npz` reads, atomically.

  Raises:
    ValueError: the name does not end in .npz, its folder does not exist, or an array holds objects.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix != ".npz" or not path.parent.is_dir():
    raise ValueError(f"{path}: expected the name of an .npz file in a folder that exists.")
  objects = [name for name, array in arrays.items() if array.dtype.kind == "O"]
  if objects:
    raise ValueError(f"{path}: expected numbers or strings; {', '.join(objects)} hold objects.")
  partial = path.with_name(path.stem + ".partial.npz")
  np.savez(partial, allow_pickle=False, **arrays)
  os.replace(partial, path)


def as_strings(ids: np.ndarray) -> np.ndarray:
  """Ids as strings where they are integers or bytes; others as they are, for Dataset to refuse."""
  if ids.dtype.kind == "S":
    return np.char.decode(ids, "utf-8")
  return ids.astype(str) if ids.dtype.kind in "iu" else ids


def _folder_labels(names: list[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """Labels [N] and their names from first-level sub-folders; none if an image lies outside."""
  if not all("/" in name for name in names):
    return None, ()
  label_names, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
  return labels, tuple(label_names.tolist())
