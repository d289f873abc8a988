"""Work that is not finished, on disk: a stopped stage goes on from there."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.artifacts import plain, refuse_stale


class PartialSums:
  """The sums of an unfinished reduction (a `parallel.Partial`), in one file written atomically.

  Args:
    path: the file, an .npz.
    key: what the sums depend on, as JSON.
    every: batches between two savings.
  """

  def __init__(self, path: Path, key: Mapping[str, Any], every: int):
    if every < 1:
      raise ValueError(f"Sums are saved every so many batches, at least 1; got every={every}.")
    self._path, self._key, self.every = path, plain(key), every
    self._unfinished = path.with_name(path.name + ".partial")

  def save(self, rows_done: int, sums: list[np.ndarray]) -> None:
    arrays = {"key": np.array(json.dumps(self._key)), "rows_done": np.array(rows_done)}
    arrays |= {f"sum_{i}": array for i, array in enumerate(sums)}
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._unfinished.open("wb") as file:
      np.savez(file, allow_pickle=False, **arrays)
    os.replace(self._unfinished, self._path)

  def load(self) -> tuple[int, list[np.ndarray]] | None:
    """(rows done, sums) as saved, or None; StaleArtifact for another key, ValueError if damaged."""
    if not self._path.exists():
      return None
    try:
      with np.load(self._path, allow_pickle=False) as file:
        key, rows_done = json.loads(str(file["key"])), int(file["rows_done"])
        sums = [file[f"sum_{i}"] for i in range(len(file.files) - 2)]
    except Exception as error:  # zipfile and NumPy raise many kinds for damaged files
      raise ValueError(
        f"{self._path} cannot be read ({error}). Delete it to begin again from the first row."
      ) from error
    refuse_stale(self._path, key, self._key, "file")
    return rows_done, sums

  def discard(self) -> None:
    """Removes the file, if there is one."""
    for path in (self._path, self._unfinished):
      path.unlink(missing_ok=True)


class Kept:
  """Arrays by name in a folder: kept(name, compute) computes and keeps, or reads what was kept."""

  def __init__(self, folder: Path):
    self._folder = folder

  def __call__(
    self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    path = self._folder / f"{name}.npz"
    if not path.exists():
      self._folder.mkdir(parents=True, exist_ok=True)
      partial = path.with_name(path.name + ".partial")
      with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(compute()))
      os.replace(partial, path)
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
