"""A user's own images, in a NumPy .npz file or a folder of image files; and embeddings of them."""

import pathlib
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageOps

from jaxinf.data.dataset import DataConfig, Dataset, check_options

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_GREY_MODES = ("1", "L", "LA", "La")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP_MODES = ("I", "F")  # and "I;16", …: more than eight bits a channel


def arrays(config: DataConfig) -> Dataset:
  """The images of an .npz file at `config.path`.

  It holds `images` [N, H, W, C], uint8 in 0…255 or float32 in [-1, 1], and may hold `ids` [N]
  (strings or integers; the default is the index) and `labels` [N] (integers). Other arrays are an
  error, since a misspelt `ids` would change what scores refer to.
  """
  check_options(config, reads=("path",))
  path = _path(config, "an .npz file")
  contents = _read_npz(path)
  unknown = sorted(set(contents) - {"images", "ids", "labels"})
  if unknown or "images" not in contents:
    raise ValueError(
      f"{path}: expected the arrays images and, if wanted, ids and labels; "
      f"got {', '.join(sorted(contents)) or 'none'}. Rename or drop the others."
    )
  images = contents["images"]
  ids = contents.get("ids", np.arange(len(images) if images.ndim else 0))
  try:
    return Dataset(
      name="arrays", images=images, ids=_as_strings(ids), labels=contents.get("labels")
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def folder(config: DataConfig) -> Dataset:
  """The PNG, JPEG, WebP and BMP files under the folder `config.path`, at any depth.

  An id is the path within the folder (`cats/tabby.png`), and examples are sorted by it. Labels are
  the first-level sub-folders if every image lies in one, else None. Images are one-channel if all
  are grey, else RGB. With `config.image_size` they are cropped to their central square and resized
  to it. Names that start with a dot and links to folders are skipped; an animation counts with
  its first frame.

  Raises:
    ValueError: no folder, no images in it, an image that is damaged, deeper than eight bits or
      partly transparent, or images that differ in size where `config.image_size` is None.
  """
  check_options(config, reads=("path", "image_size"))
  root = _path(config, "a folder of images")
  if config.image_size is not None and config.image_size < 1:
    raise ValueError(f"data.image_size must be positive or None; got {config.image_size}.")
  names = _image_names(root)
  images = [_read_image(root / name, config.image_size) for name in names]
  for name, image in zip(names, images, strict=True):
    if image.shape[:2] != images[0].shape[:2]:
      raise ValueError(
        f"{root / name}: expected {_size(images[0])} pixels as in {names[0]}, got {_size(image)}. "
        "Set data.image_size to crop and resize all images to one size."
      )
  channels = max(image.shape[2] for image in images)
  labels, label_names = _folder_labels(names)
  return Dataset(
    name="folder",
    images=np.stack([np.broadcast_to(x, (*x.shape[:2], channels)) for x in images]),
    ids=np.array(names),
    labels=labels,
    label_names=label_names,
  )


def read_embeddings(path: str | pathlib.Path, ids: np.ndarray) -> np.ndarray:
  """Embeddings [len(ids), E] of the examples with these ids, in that order, from an .npz file.

  It holds `embeddings` [n, E] and `ids` [n] (unique strings or integers), of these and maybe more.

  Raises:
    ValueError: the file lacks, or has other arrays; they do not fit; or an id is not in it.
  """
  path = pathlib.Path(path).expanduser()
  contents = _read_npz(path, holds="embeddings=..., ids=...")
  if set(contents) != {"embeddings", "ids"}:
    names = ", ".join(sorted(contents)) or "none"
    raise ValueError(f"{path}: expected the arrays embeddings and ids; got {names}. Rename them.")
  embeddings, found = contents["embeddings"], _as_strings(contents["ids"])
  position_of = {i: n for n, i in enumerate(found.tolist())} if found.ndim == 1 else {}
  if embeddings.ndim != 2 or not len(embeddings) == len(position_of) == len(found):
    raise ValueError(
      f"{path}: expected embeddings [n, E] and n different ids; got shapes {embeddings.shape} and "
      f"{found.shape}, {len(position_of)} different."
    )
  wanted = _as_strings(np.asarray(ids)).tolist()
  unknown = [i for i in wanted if i not in position_of]
  if unknown:
    raise ValueError(
      f"{path}: {len(unknown)} of {len(wanted)} ids have no embedding, such as {unknown[0]!r}; its "
      f"ids look like {found[0]!r}."
    )
  return embeddings[[position_of[i] for i in wanted]]


def _path(config: DataConfig, kind: str) -> pathlib.Path:
  if config.path is None:
    raise ValueError(f"data set {config.name!r} needs data.path, {kind}; got None.")
  return pathlib.Path(config.path).expanduser()


def _read_npz(path: pathlib.Path, holds: str = "images=...") -> dict[str, np.ndarray]:
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


def _as_strings(ids: np.ndarray) -> np.ndarray:
  """Ids as strings where they are integers or bytes; others as they are, for Dataset to refuse."""
  if ids.dtype.kind == "S":
    return np.char.decode(ids, "utf-8")
  return ids.astype(str) if ids.dtype.kind in "iu" else ids


def _image_names(root: pathlib.Path) -> list[str]:
  """Sorted posix paths, relative to `root`, of the image files under it."""
  if not root.is_dir():
    raise ValueError(f"{root}: expected a folder of images, got none. Check data.path.")
  files = (file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
  names = [file.relative_to(root) for file in files]
  visible = [n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts)]
  if not visible:
    raise ValueError(f"{root}: expected images ({', '.join(_SUFFIXES)}) in the folder, got none.")
  return sorted(visible)


def _read_image(path: pathlib.Path, image_size: int | None) -> np.ndarray:
  """Pixels [H, W, C] of one file, uint8: C = 1 for grey images, 3 for others."""
  try:
    with Image.open(path) as file:
      image = ImageOps.exif_transpose(file)  # upright, as viewers show it; loads all pixels
  except Exception as error:  # Pillow's decoders raise many types
    raise ValueError(
      f"{path}: expected a readable image, got: {error}. Mend or remove the file."
    ) from error
  if image.mode.startswith(_DEEP_MODES):
    raise ValueError(
      f"{path}: expected 8 bits a channel, got mode {image.mode!r}. Convert the file to 8 bits."
    )
  may_be_transparent = image.mode in _ALPHA_MODES or "transparency" in image.info
  if may_be_transparent and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
    raise ValueError(
      f"{path}: expected an opaque image, got transparent pixels. Flatten it onto a background."
    )
  image = image.convert("L" if image.mode in _GREY_MODES else "RGB")
  if image_size is not None:
    image = _central_square(image).resize((image_size, image_size), Image.Resampling.LANCZOS)
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _central_square(image: Image.Image) -> Image.Image:
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return image.crop((left, top, left + side, top + side))


def _folder_labels(names: list[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """Labels [N] and their names from first-level sub-folders; none if an image lies outside."""
  if not all("/" in name for name in names):
    return None, ()
  label_names, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
  return labels, tuple(label_names.tolist())


def _size(image: np.ndarray) -> str:
  return f"{image.shape[1]} × {image.shape[0]}"
