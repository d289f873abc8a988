"""Arrays of gradient rows on disk: chunked, checksummed, appended to and deleted from (zarr 3).

A store is a folder:
  index.json     what the rows are of and how they were made (`key`), the ids of its examples in
                 order, which of them are deleted, and how many rows are written
  arrays/leaf_k  one zarr array [rows, W_k] for each array of `Packing`, whose chunks carry CRC-32C
                 checksums that every read verifies

Chunks and index.json are each written to another file first and renamed, so that a process may be
killed at any time: rows that index.json does not count are written again.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxinf.artifacts import fingerprint_of, plain, refuse_stale, write_text

_CHUNK_BYTES = 2**25  # about this many in a chunk, of all arrays together
_MIB = 2**20


@dataclasses.dataclass
class RowStore:
  """Rows on disk, `groups` consecutive ones for each example.

  Attributes:
    folder: of the store.
    key: what the rows are of, as JSON.
    widths: W_k of each array.
    dtypes: of each array.
    groups: rows of an example.
    ids: [N] ids of the examples in the order of their rows, also of those still to be written.
    deleted: ids of examples whose rows are gone.
    num_written: examples whose rows are complete, the first ones.
    pending: hash of what the rows still to be written are made from.
    cache_bytes: memory for what was read, so that it need not be read again.
  """

  folder: Path
  key: Mapping[str, Any]
  widths: Sequence[int]
  dtypes: Sequence[np.dtype]
  groups: int
  ids: np.ndarray
  deleted: frozenset
  num_written: int
  pending: str | None = None
  cache_bytes: int = 2**30
  _cache: dict = dataclasses.field(default_factory=dict, repr=False)

  @classmethod
  def create(
    cls, folder: Path, key: Mapping[str, Any], widths: Sequence[int], dtypes: Sequence, groups: int
  ) -> "RowStore":
    """A store without examples; one of the same key that is there already is opened instead.

    Raises:
      StaleArtifact: the folder holds a store of another key; with the difference.
    """
    if (folder / "index.json").exists():
      return cls.open(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    store = cls(folder, plain(key), list(widths), [np.dtype(d) for d in dtypes], groups,
                np.array([], dtype=str), frozenset(), 0)  # fmt: skip
    for k in range(len(store.widths)):
      store._array(k, create=True)
    store._save()
    return store

  @classmethod
  def open(cls, folder: Path, key: Mapping[str, Any] | None = None) -> "RowStore":
    """The store in a folder; StaleArtifact if `key` is given and is another one's."""
    path = folder / "index.json"
    if not path.exists():
      raise ValueError(f"{folder} holds no store: it has no index.json. Run the stage index.")
    fields = json.loads(path.read_text())
    if key is not None:
      refuse_stale(folder, fields["key"], key, "folder")
    return cls(
      folder, fields["key"], fields["widths"], [np.dtype(d) for d in fields["dtypes"]],
      fields["groups"], np.array(fields["ids"]), frozenset(fields["deleted"]),
      fields["num_written"], fields["pending"],
    )  # fmt: skip

  @property
  def row_bytes(self) -> int:
    """Bytes of one row."""
    return sum(w * d.itemsize for w, d in zip(self.widths, self.dtypes, strict=True))

  @property
  def chunk_rows(self) -> int:
    """Rows of a chunk, whole examples."""
    examples = max(1, _CHUNK_BYTES // (self.row_bytes * self.groups))
    return min(256, examples) * self.groups

  @property
  def content(self) -> str:
    """A hash of what the rows are of, and which are there."""
    fields = [self.key, self.ids[: self.num_written].tolist(), sorted(self.deleted)]
    return fingerprint_of(fields)

  @property
  def kept(self) -> np.ndarray:
    """[num_written] whether each example is there, that is, not deleted."""
    return ~np.isin(self.ids[: self.num_written], list(self.deleted))

  def plan(self, new_ids: np.ndarray, content: str, reserve_bytes: int) -> int:
    """Takes on examples to be written, unless they are the ones it has taken on; bytes they need.

    Args:
      new_ids: of the examples.
      content: hash of what their rows are made from.
      reserve_bytes: of the disk that are left free.

    Raises:
      ValueError: an id is taken, others are still to be written, or the disk is too small.
    """
    waiting = self.ids[self.num_written :]
    if len(waiting):
      if not np.array_equal(waiting, new_ids) or content != self.pending:
        raise ValueError(
          f"{self.folder} still lacks the rows of {len(waiting)} examples, {waiting[0]!r} …: go on "
          "with the same images before others are added, or delete the folder."
        )
    elif len(self.ids) and self.ids.dtype.kind != new_ids.dtype.kind:
      raise ValueError(f"The ids of {self.folder} are {self.ids.dtype}; the new ones differ.")
    elif taken := sorted(set(self.ids.tolist()) & set(new_ids.tolist())):
      raise ValueError(f"{len(taken)} ids are in {self.folder} already, such as {taken[0]!r}.")
    else:
      waiting = new_ids
    needed = len(waiting) * self.groups * self.row_bytes
    self._check_disk(needed, reserve_bytes)
    if len(self.ids) == self.num_written:
      old = self.ids if len(self.ids) else self.ids.astype(waiting.dtype)
      self.ids, self.pending = np.concatenate([old, waiting]), content
      rows = len(self.ids) * self.groups
      for k, width in enumerate(self.widths):
        self._array(k).resize(exclusive_max=[rows, width]).result()
      self._save()
    return needed

  def write(self, begin: int, arrays: Sequence[np.ndarray], reserve_bytes: int) -> None:
    """Writes rows begin, begin + 1, …; on return they are on disk, but not yet counted."""
    self._check_disk(sum(array.nbytes for array in arrays), reserve_bytes)
    handles = [self._array(k) for k in range(len(self.widths))]
    end = begin + len(arrays[0])
    # The writes of all arrays go on at once.
    futures = [
      handle[begin:end].write(np.ascontiguousarray(a))
      for handle, a in zip(handles, arrays, strict=True)
    ]
    for future in futures:
      future.result()

  def progress(self, worker: str) -> int:
    """The row up to which a worker has written what it was to write, 0 where that is not known."""
    path = self._progress_path(worker)
    return json.loads(path.read_text())["row"] if path.exists() else 0

  def save_progress(self, worker: str, row: int) -> None:
    """Notes that a worker has written its rows up to `row`."""
    write_text(self._progress_path(worker), json.dumps({"row": row}))

  def finish(self) -> None:
    """Counts all examples as written: all workers are done."""
    self.num_written, self.pending = len(self.ids), None
    self._save()
    for path in self.folder.glob("progress*.json"):
      path.unlink()

  def reload(self) -> None:
    """Takes over what another process has done to the index."""
    self.__dict__.update(self.open(self.folder).__dict__)

  def read(
    self, begin: int, end: int, columns: Sequence[tuple[int, int]] | None = None
  ) -> list[np.ndarray]:
    """Rows begin … end − 1 of every array, some of their columns; ValueError where damaged."""
    columns = tuple((0, width) for width in self.widths) if columns is None else tuple(columns)
    place = (begin, end, columns)
    if place not in self._cache:
      arrays = self._read(*place)
      if self._cached_bytes + sum(a.nbytes for a in arrays) > self.cache_bytes:
        return arrays
      self._cache[place] = arrays
    return self._cache[place]

  def blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cut [begin, end) at the borders of chunks."""
    while begin < end:
      border = min(end, (begin // self.chunk_rows + 1) * self.chunk_rows)
      yield begin, border
      begin = border

  def delete(self, ids: Sequence) -> None:
    """Deletes examples: first from the index, then their rows, which become zeros.

    Raises:
      ValueError: an id is not there.
    """
    wanted = set(np.asarray(ids).tolist())
    there = set(self.ids[: self.num_written].tolist()) - self.deleted
    if missing := sorted(wanted - there):
      raise ValueError(
        f"{len(missing)} of {len(wanted)} ids are not in {self.folder}, such as {missing[0]!r}."
      )
    self.deleted = self.deleted | wanted
    self._save()
    self._cache.clear()
    positions = np.flatnonzero(np.isin(self.ids, list(wanted)))
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    for run in runs:  # a whole chunk is replaced without being read, so also where it is damaged
      begin, end = int(run[0]) * self.groups, (int(run[-1]) + 1) * self.groups
      for k in range(len(self.widths)):
        self._array(k)[begin:end].write(np.zeros((), self.dtypes[k])).result()

  def verify(self) -> int:
    """Reads everything that is written; the number of bytes. ValueError names the first damage."""
    total, columns = 0, [(0, width) for width in self.widths]
    for begin, end in self.blocks(0, self.num_written * self.groups):
      total += sum(array.nbytes for array in self._read(begin, end, columns))
    return total

  def _read(self, begin: int, end: int, columns: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    futures = [
      self._array(k)[begin:end, first:last].read() for k, (first, last) in enumerate(columns)
    ]
    try:
      return [np.asarray(future.result()) for future in futures]
    except ValueError as error:
      first_id, last_id = (self.ids[row // self.groups] for row in (begin, end - 1))
      raise ValueError(
        f"Rows {begin} – {end - 1} of {self.folder} cannot be read: {error}. The store is damaged: "
        f"delete the examples {str(first_id)!r} … {str(last_id)!r} together and append them again, "
        "or build it anew."
      ) from error

  @property
  def _cached_bytes(self) -> int:
    return sum(array.nbytes for arrays in self._cache.values() for array in arrays)

  def _progress_path(self, worker: str) -> Path:
    return self.folder / f"progress{worker}.json"

  def _array(self, k: int, create: bool = False) -> Any:
    width, dtype = self.widths[k], self.dtypes[k]
    spec: dict[str, Any] = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": str((self.folder / "arrays" / f"leaf_{k}").absolute())},
    }
    if create:
      spec["metadata"] = {
        "shape": [0, width],
        "data_type": dtype.name,
        "chunk_grid": {
          "name": "regular",
          "configuration": {"chunk_shape": [self.chunk_rows, width]},
        },
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
      }
      return ts.open(spec, create=True, delete_existing=True).result()
    # Another process may have made it larger.
    return ts.open(spec, open=True, recheck_cached_metadata="open").result()

  def _check_disk(self, needed: int, reserve: int) -> None:
    free = shutil.disk_usage(self.folder).free
    if needed + reserve > free:
      raise ValueError(
        f"{self.folder} needs {needed / _MIB:,.0f} MiB more and is to leave {reserve / _MIB:,.0f} "
        f"MiB of its disk free, of which {free / _MIB:,.0f} MiB are. What is written stays: make "
        "room and run it again, or take a smaller compression or fewer draw_groups."
      )

  def _save(self) -> None:
    fields = {
      "key": self.key, "widths": list(self.widths), "dtypes": [d.name for d in self.dtypes],
      "groups": self.groups, "num_written": self.num_written, "pending": self.pending,
      "deleted": sorted(self.deleted),
      "ids": self.ids.tolist(),
    }  # fmt: skip
    write_text(self.folder / "index.json", json.dumps(fields))
