"""Computes what is pinned and writes it, thinned, to tests/golden/*.npz, as the tests compute it.

python -m tests.golden.make_golden
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import tests.conftest  # noqa: F401  (JAX as in the tests, before it starts)
from tests.golden import runs

FOLDER = Path(__file__).parent
MOST = 24  # numbers kept of an array


def computed(section: str, folder: Path) -> dict[str, np.ndarray]:
  """The arrays of one section, thinned; its runs lie below `folder`."""
  function, before = runs.SECTIONS[section]
  arrays = function(folder / (before or section))
  return {name: thinned(np.asarray(array)) for name, array in arrays.items()}


def thinned(array: np.ndarray) -> np.ndarray:
  """A large array of floats at a fixed stride, with the root mean square of all of it at the end.

  Integers, booleans and strings stay whole.
  """
  if array.size <= MOST or array.dtype.kind != "f":
    return array
  stride = -(-array.size // MOST)
  stride += 1 - stride % 2  # odd, so that it meets all columns
  rms = np.sqrt(np.mean(np.square(array, dtype=np.float64)))
  return np.append(array.ravel()[::stride], rms).astype(array.dtype)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays end to end, one file entry a type: entries by the hundred would be mostly heads.

  For each type there are names [n], shapes [n] as text, and values.
  """
  kinds: dict[str, list[str]] = {}
  for name, array in arrays.items():
    kinds.setdefault(array.dtype.kind + str(array.dtype.itemsize), []).append(name)
  packed = {}
  for kind, names in kinds.items():
    packed[f"{kind}/names"] = np.array(names)
    packed[f"{kind}/shapes"] = np.array([" ".join(map(str, arrays[n].shape)) for n in names])
    packed[f"{kind}/values"] = np.concatenate([arrays[n].ravel() for n in names])
  np.savez_compressed(path, **packed)


def read(path: Path) -> dict[str, np.ndarray]:
  """The arrays that `write` wrote."""
  found = {}
  with np.load(path, allow_pickle=False) as file:
    for kind in sorted({entry.split("/")[0] for entry in file.files}):
      names, texts, values = (file[f"{kind}/{part}"] for part in ("names", "shapes", "values"))
      shapes = [tuple(map(int, text.split())) for text in texts]
      ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
      parts = np.split(values, ends[:-1])
      found |= {n: p.reshape(s) for n, p, s in zip(names.tolist(), parts, shapes, strict=True)}
  return found


def main(folder: Path) -> None:
  with tempfile.TemporaryDirectory() as work:
    for section in runs.SECTIONS:
      start, path = time.monotonic(), folder / f"{section}.npz"
      arrays = computed(section, Path(work))
      write(path, arrays)
      size, seconds = path.stat().st_size / 1024, time.monotonic() - start
      print(f"{section}: {len(arrays)} arrays, {size:.1f} KiB, {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
  main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
