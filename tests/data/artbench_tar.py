"""ArtBench-10 in small: a tar that is laid out as the published one."""

import importlib
import io
import pathlib
import tarfile
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

ARTBENCH = importlib.import_module("jaxinf.data.artbench")  # of which the package has a function
STYLES = (
  "art_nouveau", "baroque", "expressionism", "impressionism", "post_impressionism", "realism",
  "renaissance", "romanticism", "surrealism", "ukiyo_e",
)  # fmt: skip
ROOT = "artbench-10-imagefolder-split"


def picture(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
  """A JPEG of noise that the number seeds."""
  shape = size if mode == "L" else (*size, 3)
  pixels = np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=95)
  return file.getvalue()


def write_artbench(
  path: pathlib.Path, numbers: Iterable[int], others: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
  """Writes one training picture a number, of the styles in turn; `others` are further members.

  Returns:
    the files by ids, in the order of the numbers.
  """
  files = {f"{STYLES[n % 10]}/{n:03d}.jpg": picture(n) for n in numbers}
  members = {f"{ROOT}/train/{name}": content for name, content in files.items()}
  members |= {f"{ROOT}/test/ukiyo_e/held_out.jpg": picture(999)}
  with tarfile.open(path, "w") as tar:
    for name, content in (members | dict(others or {})).items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return files


def decoded(content: bytes) -> np.ndarray:
  """Pillow's pixels [H, W, 3] of a file."""
  return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
