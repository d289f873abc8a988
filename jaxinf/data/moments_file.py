"""Posterior moments of latents on disk: a memory-mapped array, with checksums of its rows.

A folder holds `moments.npy`, the array of `Moments`, and `moments.json`: what it was made from, and
the checksum of each block of rows that is written. So writing goes on where it was stopped, and
damage is found on reading.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.engine.artifacts import plain, refuse_stale, write_text

BLOCK_ROWS = 256  # written and checked together


class MomentsFile:
  """The moments in a folder, whole or in the making.

  Attributes:
    key: what they depend on, as JSON; "shape" is that of the array.
    digests: checksums of the blocks that are written, in order.
  """

  def __init__(self, folder: Path, key: Mapping[str, Any], digests: list[str]):
    self._folder, self.key, self.digests = folder, key, digests

  @classmethod
  def begun(cls, folder: Path, key: Mapping[str, Any]) -> "MomentsFile":
    """Those of this key, as far as they are written; the file is made where there is none.

    Raises:
      StaleArtifact: the folder holds those of another key.
      ValueError: it is damaged, or the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _index(folder).exists():
      found = cls.read(folder)
      refuse_stale(folder, found.key, plain(key), "folder")
      return found
    shape = tuple(key["shape"])
    needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
      raise ValueError(
        f"The moments of {shape[0]} images take {needed / 2**20:,.0f} MiB, and the disk of "
        f"{folder} has {free / 2**20:,.0f} MiB left. Make space, or use another folder."
      )
    np.lib.format.open_memmap(folder / "moments.npy", mode="w+", dtype=np.float32, shape=shape)
    found = cls(folder, plain(key), [])
    found._save()
    return found

  @classmethod
  def read(cls, folder: Path) -> "MomentsFile":
    """What a folder says that it holds; ValueError where it holds none, or is damaged."""
    if not _index(folder).exists():
      raise ValueError(f"{folder} holds no moments of latents: encode the images first.")
    try:
      fields = json.loads(_index(folder).read_text())
      return cls(folder, fields["key"], fields["digests"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{_index(folder)} cannot be read ({error}). Delete the folder and encode the images again."
      ) from error

  @property
  def rows_done(self) -> int:
    """Rows that are written."""
    return min(len(self.digests) * BLOCK_ROWS, self.key["shape"][0])

  @property
  def content(self) -> str:
    """A hash of the moments, by their checksums."""
    return hashlib.blake2b("".join(self.digests).encode(), digest_size=16).hexdigest()

  def append(self, rows: np.ndarray) -> None:
    """Writes the next block of rows, and its checksum once they are on disk."""
    begin = self.rows_done
    array = self._open("r+")
    array[begin : begin + len(rows)] = rows
    array.flush()
    self.digests.append(_digest(rows))
    self._save()

  def array(self) -> np.ndarray:
    """The whole array, memory-mapped; ValueError where rows are missing or damaged."""
    num = self.key["shape"][0]
    if self.rows_done < num:
      raise ValueError(
        f"{self._folder} holds the moments of {self.rows_done} of {num} images: encode the rest "
        "first, by the same call."
      )
    array = self._open("r")
    for number, digest in enumerate(self.digests):
      begin = number * BLOCK_ROWS
      if _digest(array[begin : begin + BLOCK_ROWS]) != digest:
        raise ValueError(
          f"{self._folder / 'moments.npy'} differs from its checksums from row {begin} on. Delete "
          "the folder and encode the images again."
        )
    return array

  def _open(self, mode: Any) -> Any:
    path = self._folder / "moments.npy"
    try:
      array = np.load(path, mmap_mode=mode)
    except (OSError, ValueError, EOFError) as error:
      raise ValueError(
        f"{path} cannot be read ({error}). Delete the folder and encode the images again."
      ) from error
    if list(array.shape) != list(self.key["shape"]):
      raise ValueError(
        f"{path} has shape {array.shape}, and {self.key['shape']} was written. Delete the folder "
        "and encode the images again."
      )
    return array

  def _save(self) -> None:
    write_text(_index(self._folder), json.dumps({"key": self.key, "digests": self.digests}))


def _digest(rows: np.ndarray) -> str:
  return hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()


def _index(folder: Path) -> Path:
  return folder / "moments.json"
