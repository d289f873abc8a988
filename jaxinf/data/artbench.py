"""ArtBench-10: 50,000 training pictures of 256 × 256 pixels, 5,000 in each of ten styles.

They are read from the published tar of image folders, or from the folder that it extracts to.

P. Liao et al., "The ArtBench dataset: benchmarking generative models with artworks", 2022.
"""

import collections
import hashlib
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxinf.data.dataset import DataConfig, Dataset, check_options, some, stratified_positions
from jaxinf.data.files import config_path, folder_names
from jaxinf.data.pictures import Files, FolderFiles, image_names, read_pictures, readable
from jaxinf.data.tars import TarFiles

_STYLES = (
  "art_nouveau", "baroque", "expressionism", "impressionism", "post_impressionism", "realism",
  "renaissance", "romanticism", "surrealism", "ukiyo_e",
)  # fmt: skip
_ARTBENCH2_STYLES = ("post_impressionism", "ukiyo_e")
_STYLE_SIZE = 5_000
_ARTBENCH2_STYLE_SIZE = 2_500
_FOLDER = "artbench-10-imagefolder-split"
_URL = f"https://artbench.eecs.berkeley.edu/files/{_FOLDER}.tar"
_MD5 = "64f4d66dcf34b3c77e8c7d68fed2ec8c"
_LOG = logging.getLogger("jaxinf")


def artbench(config: DataConfig) -> Dataset:
  """The 50,000 training images [N, 256, 256, 3], uint8, of ten styles.

  `config.path` is artbench-10-imagefolder-split.tar or the folder of that name. An id is the path
  within its folder train (`ukiyo_e/name.jpg`), as of data set `folder`, and examples are sorted by
  it. Images of more than 1 GiB are decoded when they are asked for; with `config.image_size` each
  is resized.

  Raises:
    ValueError: nothing there, a tar that is cut off or damaged, styles that lack, or an image that
      is damaged (unless `config.skip_damaged`); where images are decoded when they are asked for,
      the last comes then.
  """
  files, names = _training_files(config, _STYLES)
  counts = collections.Counter(map(_style, names))
  if any(counts[style] != _STYLE_SIZE for style in _STYLES):
    few = ", ".join(f"{style} {counts[style]}" for style in _STYLES)
    _LOG.warning("%s: expected %d images a style, got: %s.", config.path, _STYLE_SIZE, few)
  return _dataset(config, files, names, _STYLES)


def artbench2(config: DataConfig) -> Dataset:
  """2,500 images each of post-impressionism and ukiyo-e, drawn with `config.seed`; see `artbench`.

  Damaged images, where they are skipped, are left out before the draw.
  """
  files, names = _training_files(config, _ARTBENCH2_STYLES)
  chosen = []
  for style in _ARTBENCH2_STYLES:
    members = np.array([name for name in names if _style(name) == style])
    if len(members) < _ARTBENCH2_STYLE_SIZE:
      raise ValueError(
        f"{config.path}: expected at least {_ARTBENCH2_STYLE_SIZE} images of {style}, got "
        f"{len(members)}. Get {_URL}, md5 {_MD5}."
      )
    places = stratified_positions(
      members, None, num_examples=_ARTBENCH2_STYLE_SIZE, seed=config.seed
    )
    chosen += members[places].tolist()
  return _dataset(config, files, chosen, _ARTBENCH2_STYLES)


def _dataset(
  config: DataConfig, files: Files, names: Sequence[str], styles: tuple[str, ...]
) -> Dataset:
  return Dataset(
    name=config.name,
    images=read_pictures(files, names, image_size=config.image_size, channels=3),
    ids=np.array(names),
    labels=np.array([styles.index(_style(name)) for name in names]),
    label_names=styles,
    random_flip=True,
  )


def _training_files(config: DataConfig, styles: tuple[str, ...]) -> tuple[Files, list[str]]:
  """Where the training images lie, and the sorted names, STYLE/NAME.jpg, of those of these styles.

  Raises:
    ValueError: another layout, or a style without images.
  """
  check_options(config, reads=("path", "skip_damaged"))
  path = config_path(config, f"{_FOLDER}.tar or the folder that it extracts to")
  files: Files
  if path.is_file():
    tar = TarFiles(path, f"{_FOLDER}/train")
    files, names = tar, image_names(tar.names, str(path))
  else:
    root = next((p for p in (path / _FOLDER, path) if (p / "train").is_dir()), path)
    files, names = FolderFiles(root / "train"), folder_names(root / "train")
  strange = [name for name in names if _style(name) not in _STYLES or name.count("/") != 1]
  absent = [style for style in styles if style not in set(map(_style, names))]
  if strange or absent:
    got = f"none of {', '.join(absent)}" if absent else f"also {some(strange)}"
    raise ValueError(
      f"{path}: expected images {_FOLDER}/train/STYLE/NAME.jpg of {', '.join(_STYLES)}; got "
      f"{len(names)} images, and {got}. Get {_URL}, md5 {_MD5}."
    )
  if path.is_file():
    _check_md5(path)
  names = [name for name in names if _style(name) in styles]
  return files, readable(files, names, str(path)) if config.skip_damaged else names


def _check_md5(path: pathlib.Path) -> None:
  """Warns where the tar is not the published one."""
  with path.open("rb") as file:
    found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
  if found != _MD5:
    _LOG.warning(
      "%s is not the published tar of ArtBench-10, though laid out as it: its md5 is %s, not %s.",
      path, found, _MD5,
    )  # fmt: skip


def _style(name: str) -> str:
  return name.split("/")[0]
