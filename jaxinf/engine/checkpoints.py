"""Work that is not finished, on disk: a stopped stage goes on from there."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.types import PyTree
from jaxinf.engine import processes
from jaxinf.engine.artifacts import plain, refuse_stale


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """Where a computation keeps what it has so far, so that a killed one goes on from there.

  Attributes:
    folder: of the files; delete it when the result is safe.
    every: batches between two savings.

  Raises:
    ValueError: every is too small.
  """

  folder: Path  # text is taken too
  every: int = 100

  def __post_init__(self):
    object.__setattr__(self, "folder", Path(self.folder))
    object.__setattr__(self, "every", checked_count(self.every, "every"))

  def path(self, name: str) -> Path:
    """A file or folder of that name within the folder."""
    return Path(self.folder) / name


class PartialSums:
  """The sums of an unfinished reduction (an `engine.Partial`), in one file written atomically.

  With several processes each keeps a file of its own.

  Args:
    path: the file, an .npz.
    key: what the sums depend on, as JSON.
    every: batches between two savings.
  """

  def __init__(self, path: Path, key: Mapping[str, Any], every: int):
    path = path.with_name(path.stem + processes.suffix() + path.suffix)
    self._path, self._key, self.every = path, plain(key), checked_count(every, "every")

  def save(self, rows_done: int, sums: list[np.ndarray]) -> None:
    arrays = {"key": np.array(json.dumps(self._key)), "rows_done": np.array(rows_done)}
    arrays |= {f"sum_{i}": array for i, array in enumerate(sums)}
    _write(self._path, arrays)

  def load(self) -> tuple[int, list[np.ndarray]] | None:
    """(rows done, sums) as saved, or None; StaleArtifact for another key, ValueError if damaged."""
    if not self._path.exists():
      return None
    arrays = _read(self._path, self._key, "Delete it to begin again from the first row.")
    rows_done = int(arrays.pop("rows_done"))
    sums = [arrays[f"sum_{i}"] for i in range(len(arrays))]
    return rows_done, sums


class PartialOutputs:
  """Rows of an unfinished map (an `engine.PartialRows`): files that are written once, atomically.

  Args:
    folder: of the files; each process keeps its own there.
    key: what the rows depend on, as JSON.
    every: batches between two savings.
    structure: a pytree with the structure of the rows.
  """

  def __init__(self, folder: Path, key: Mapping[str, Any], every: int, structure: PyTree = 0):
    self._folder, self._key, self.every = folder, plain(key), checked_count(every, "every")
    self._structure = jax.tree.structure(structure)
    self._num_saved = 0

  def load(self) -> list[PyTree]:
    """The rows saved so far, file by file; StaleArtifact for another key, ValueError if damaged."""
    rows: list[PyTree] = []
    while (path := self._path(len(rows))).exists():
      arrays = _read(path, self._key, f"Delete {self._folder} to begin again.")
      leaves = [arrays[f"leaf_{i}"] for i in range(len(arrays))]
      rows.append(jax.tree.unflatten(self._structure, leaves))
    self._num_saved = len(rows)
    return rows

  def save(self, outputs: list[PyTree]) -> None:
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
    arrays = {f"leaf_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(whole))}
    _write(self._path(self._num_saved), {"key": np.array(json.dumps(self._key)), **arrays})
    self._num_saved += 1

  def _path(self, number: int) -> Path:
    return self._folder / f"rows-{number:06d}{processes.suffix()}.npz"


class Kept:
  """Arrays by name in a folder: kept(name, compute) computes and keeps, or reads what was kept.

  With several processes all of them compute, and the primary writes.
  """

  def __init__(self, folder: Path):
    self._folder = folder

  def __call__(
    self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    path = self._folder / f"{name}.npz"
    if not processes.agreed(path.exists()):
      arrays = dict(compute())
      if processes.is_primary():
        _write(path, arrays)
      processes.wait_for_all(f"{name} kept")
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}


class PartialState:
  """Where an iteration stands, in one file written atomically; the next saving replaces it.

  With several processes all have the same state: the primary writes it, and all go on from there.

  Args:
    path: the file, an .npz.
    key: what the state depends on, as JSON.
    every: batches between two savings.
  """

  def __init__(self, path: Path, key: Mapping[str, Any], every: int):
    self._path, self._key, self._every = path, plain(key), checked_count(every, "every")
    self._batches = 0

  def load(self) -> dict[str, np.ndarray] | None:
    """The arrays saved last, or None; StaleArtifact for another key, ValueError if damaged."""
    if not processes.agreed(self._path.exists()):
      return None
    return _read(self._path, self._key, "Delete it to begin again.")

  def save(self, arrays: Mapping[str, np.ndarray]) -> None:
    if processes.is_primary():
      _write(self._path, {"key": np.array(json.dumps(self._key)), **arrays})

  def passed(self, batches: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Says that so many batches are done since the last time; saves where they are enough."""
    self._batches += batches
    if self._batches >= self._every:
      self._batches = 0
      self.save(arrays)


def _read(path: Path, key: Any, way_out: str) -> dict[str, np.ndarray]:
  """The arrays of a file by name, but its key; StaleArtifact for another, ValueError if damaged."""
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    found = json.loads(str(arrays.pop("key")))
  except Exception as error:  # zipfile and NumPy raise many kinds for damaged files
    raise ValueError(f"{path} cannot be read ({error}). {way_out}") from error
  refuse_stale(path, found, key, "file")
  return arrays


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an .npz file atomically, and its folder where there is none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with _unfinished(path).open("wb") as file:
    np.savez(file, allow_pickle=False, **arrays)
  os.replace(_unfinished(path), path)


def _unfinished(path: Path) -> Path:
  return path.with_name(path.name + ".partial")
