"""Arrays of gradient rows on disk: chunked, checksummed, appended to and deleted from (zarr 3).

A store is a folder:
  index.json     its `Ledger`: what the rows are of, the ids of its examples, how many are written
  arrays/leaf_k  one zarr array [rows, W_k] for each array of `Packing`, whose chunks carry CRC-32C
                 checksums that every read verifies; filled up to whole chunks

Chunks and index.json are each written to another file first and renamed, so that a process may be
killed at any time: rows that index.json does not count are written again, but for those that a
file progress.json beside it says are there.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxinf.engine.artifacts import plain
from jaxinf.store.ledger import Ledger, read_sealed, write_sealed

_CHUNK_BYTES = 2**25  # about this many in a chunk, of all arrays together
_CHUNK_EXAMPLES = 256  # and at most these
_MIB = 2**20


@dataclasses.dataclass
class RowStore:
  """Rows on disk.

  Attributes:
    folder: of the store.
    ledger: what it holds.
    cache_bytes: memory for what was read, so that it need not be read again.
  """

  folder: Path
  ledger: Ledger
  cache_bytes: int = 2**30
  _cache: dict = dataclasses.field(default_factory=dict, repr=False)
  _cached_bytes: int = 0
  _stamp: int | None = None

  @classmethod
  def create(
    cls, folder: Path, key: Mapping[str, Any], widths: Sequence[int], dtypes: Sequence, groups: int
  ) -> "RowStore":
    """A store without examples; one of the same key that is there already is opened instead.

    Raises:
      StaleArtifact: the folder holds a store of another key; with the difference.
      ValueError: it holds a damaged one.
    """
    if (folder / "index.json").exists():
      return cls.open(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    example_bytes = groups * sum(
      w * np.dtype(d).itemsize for w, d in zip(widths, dtypes, strict=True)
    )
    examples = min(_CHUNK_EXAMPLES, max(1, _CHUNK_BYTES // example_bytes))
    ledger = Ledger.empty(plain(key), widths, dtypes, groups, examples * groups)
    store = cls(folder, ledger)
    for k, width in enumerate(widths):
      metadata = {**store._metadata(k), "shape": [0, width]}
      spec = {**store._spec(k), "metadata": metadata}
      ts.open(spec, create=True, delete_existing=True).result()
    ledger.write(folder)
    return store

  @classmethod
  def open(cls, folder: Path, key: Mapping[str, Any] | None = None) -> "RowStore":
    """The store in a folder; StaleArtifact if `key` is given and is another one's."""
    return cls(folder, Ledger.read(folder, key))

  @property
  def num_bytes(self) -> int:
    """Bytes of all chunks on disk, when all rows are written."""
    return self.ledger.num_bytes

  def plan(self, ids: np.ndarray, hashes: np.ndarray, reserve_bytes: int) -> int:
    """Takes on examples to be written, unless they are the ones it has taken on; bytes they need.

    Args:
      ids: [n] of the examples.
      hashes: [n] of what their rows are made from.
      reserve_bytes: of the disk that are left free.

    Raises:
      ValueError: an id is taken, others are still to be written, or the disk is too small.
    """
    self.reload()
    ledger = self.ledger.extended(ids, hashes)
    chunks = (self.folder / "arrays").glob("leaf_*/c/*/*")
    needed = max(0, ledger.num_bytes - sum(path.stat().st_size for path in chunks))
    self._check_disk(needed, reserve_bytes)
    # 1. Arrays first: they may be longer than index.json says, and never shorter.
    for k, width in enumerate(ledger.widths):
      self._array(k).resize(exclusive_max=[ledger.padded_rows, width]).result()
    # 2. From here on the examples belong to the store.
    self._save(ledger)
    return needed

  def write(self, begin: int, arrays: Sequence[np.ndarray], reserve_bytes: int) -> None:
    """Writes rows begin, begin + 1, …; on return they are on disk, but not yet counted."""
    self._check_disk(sum(array.nbytes for array in arrays), reserve_bytes)
    self._write(begin, arrays)

  def progress(self, worker: str) -> int:
    """The row up to which a worker has written what it was to write, 0 where that is not known."""
    path = self._progress_path(worker)
    try:
      return read_sealed(path)["row"] if path.exists() else 0
    except ValueError:
      return 0  # damaged: written again

  def save_progress(self, worker: str, row: int) -> None:
    """Notes that a worker has written its rows up to `row`."""
    write_sealed(self._progress_path(worker), {"row": row})

  def finish(self) -> None:
    """Counts all examples as written: all workers are done."""
    self.reload()
    self._save(dataclasses.replace(self.ledger, num_written=len(self.ledger.ids)))
    for path in self.folder.glob("progress*.json"):
      path.unlink()

  def reload(self) -> None:
    """Takes over what another process has done to the store."""
    self.ledger = Ledger.read(self.folder, self.ledger.key)
    self._forget()

  def refresh(self) -> None:
    """Takes over what another process has done, where index.json has been written since."""
    stamp = (self.folder / "index.json").stat().st_mtime_ns
    if stamp != self._stamp:
      self.reload()
      self._stamp = stamp

  def read(
    self, begin: int, end: int, columns: Sequence[tuple[int, int]] | None = None
  ) -> list[np.ndarray]:
    """Rows begin … end − 1 of every array, some of their columns; ValueError where damaged."""
    columns = self._all_columns if columns is None else tuple(columns)
    place = (begin, end, columns)
    if place in self._cache:
      return self._cache[place]
    arrays = self._read(*place)
    num_bytes = sum(array.nbytes for array in arrays)
    if self._cached_bytes + num_bytes <= self.cache_bytes:
      self._cache[place] = arrays
      self._cached_bytes += num_bytes
    return arrays

  def blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cut [begin, end) at the borders of chunks."""
    size = self.ledger.chunk_rows
    while begin < end:
      border = min(end, (begin // size + 1) * size)
      yield begin, border
      begin = border

  def delete(self, ids: Sequence) -> None:
    """Deletes examples: first from the index, then their rows, which become zeros.

    One that was deleted before has its rows zeroed again, as after a deletion that was stopped.

    Raises:
      ValueError: an id was never there; or other rows of a chunk cannot be read to be kept.
    """
    self.reload()
    ledger, places = self.ledger.without(ids)
    self._save(ledger)
    kept, groups = np.repeat(ledger.kept, ledger.groups), ledger.groups
    gone = np.zeros(len(kept), bool)
    gone[(places[:, None] * groups + np.arange(groups)).ravel()] = True
    damage = None
    for begin, end in self.blocks(0, len(kept)):
      if not gone[begin:end].any():
        continue
      if not kept[begin:end].any():  # replaced without being read, so also where it is damaged
        self._write(begin, self._zeros(end - begin if len(ledger.waiting) else ledger.chunk_rows))
        continue
      try:
        arrays = self._read(begin, end, self._all_columns)
      except ValueError as error:
        damage = damage or error
        continue
      zeros = self._zeros(1)
      pairs = zip(zeros, arrays, strict=True)
      self._write(begin, [np.where(gone[begin:end, None], zero, rows) for zero, rows in pairs])
    if damage is not None:
      raise damage

  def verify(self) -> int:
    """Reads everything that is written; the number of bytes. ValueError names the first damage."""
    total = 0
    for begin, end in self.blocks(0, self.ledger.num_written * self.ledger.groups):
      total += sum(array.nbytes for array in self._read(begin, end, self._all_columns))
    return total

  @property
  def _all_columns(self) -> tuple[tuple[int, int], ...]:
    return tuple((0, width) for width in self.ledger.widths)

  def _read(self, begin: int, end: int, columns: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    slices = [(begin, end, *span) for span in columns]
    futures = [self._array(k)[b:e, f:t].read() for k, (b, e, f, t) in enumerate(slices)]
    try:
      return [np.asarray(future.result()) for future in futures]
    except ValueError as error:
      size, groups = self.ledger.chunk_rows, self.ledger.groups
      first, last = begin // size * size // groups, -(-end // size) * size // groups
      ids = self.ledger.ids[first : min(last, self.ledger.num_written)].tolist()
      raise ValueError(
        f"Rows {begin} – {end - 1} of {self.folder} cannot be read: {_brief(error)}. The store is "
        f"damaged: delete the {len(ids)} examples {ids[0]!r} … {ids[-1]!r}, in the order of its "
        "index.json, together and append them again; or build it anew."
      ) from error

  def _write(self, begin: int, arrays: Sequence[np.ndarray]) -> None:
    end = begin + len(arrays[0])
    # The writes of all arrays go on at once.
    futures = [
      self._array(k)[begin:end].write(np.ascontiguousarray(array)) for k, array in enumerate(arrays)
    ]
    for future in futures:
      future.result()

  def _zeros(self, rows: int) -> list[np.ndarray]:
    sizes = zip(self.ledger.widths, self.ledger.dtypes, strict=True)
    return [np.zeros((rows, width), dtype) for width, dtype in sizes]

  def _save(self, ledger: Ledger) -> None:
    ledger.write(self.folder)
    self.ledger = ledger
    self._forget()

  def _forget(self) -> None:
    self._cache, self._cached_bytes = {}, 0

  def _progress_path(self, worker: str) -> Path:
    return self.folder / f"progress{worker}.json"

  def _metadata(self, k: int) -> dict[str, Any]:
    """What zarr.json says of an array but for its shape, and is held to whenever it is opened."""
    return {
      "data_type": self.ledger.dtypes[k].name,
      "chunk_grid": {
        "name": "regular",
        "configuration": {"chunk_shape": [self.ledger.chunk_rows, self.ledger.widths[k]]},
      },
      "chunk_key_encoding": {"name": "default"},
      "fill_value": 0,
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }

  def _spec(self, k: int) -> dict[str, Any]:
    path = (self.folder / "arrays" / f"leaf_{k}").absolute()
    return {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": str(path)},
      "metadata": self._metadata(k),
      # A chunk of zeros is a file too, so that one that is missing is damage and not zeros.
      "store_data_equal_to_fill_value": True,
      "fill_missing_data_reads": False,
    }

  def _array(self, k: int) -> Any:
    path = self.folder / "arrays" / f"leaf_{k}" / "zarr.json"
    try:  # another process may have made it larger
      array = ts.open(self._spec(k), open=True, recheck_cached_metadata="open").result()
    except ValueError as error:
      raise ValueError(f"{path} cannot be read: {_brief(error)}. Build the store anew.") from error
    rows, width = self.ledger.padded_rows, self.ledger.widths[k]
    if array.shape[0] < rows or array.shape[1] != width:
      raise ValueError(
        f"{path} is damaged: it says {array.shape} where there are [{rows}, {width}] numbers. "
        "Build the store anew."
      )
    return array

  def _check_disk(self, needed: int, reserve: int) -> None:
    free = shutil.disk_usage(self.folder).free
    if needed + reserve > free:
      raise ValueError(
        f"{self.folder} needs {needed / _MIB:,.1f} MiB more and is to leave {reserve / _MIB:,.0f} "
        f"MiB of its disk free, of which {free / _MIB:,.1f} MiB are. What is written stays: make "
        "room and run it again, or take a smaller compression or fewer replicates."
      )


def _brief(error: Exception) -> str:
  """A message of TensorStore without its own settings."""
  return str(error).split(" [tensorstore_spec=")[0].rstrip(".")
