"""What a store of rows holds, as its index.json says: whose the rows are, and what is written.

The file is small next to the rows, and rewritten only when examples are taken on, finished or
deleted. It carries a checksum of its own.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.engine.artifacts import fingerprint_of, refuse_stale, write_text

_CHECKSUM_BYTES = 4  # of a chunk, CRC-32C


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The examples of a store, `groups` consecutive rows for each.

  Attributes:
    key: what the rows are of and how they were made, as JSON.
    widths: W_k of each array.
    dtypes: of each array.
    groups: rows of an example.
    chunk_rows: rows of a chunk, whole examples.
    ids: [N] ids of the examples in the order of their rows, also of those still to be written.
    hashes: [N] of what each one's rows are made from.
    deleted: positions of examples whose rows are gone, ascending.
    num_written: examples whose rows are complete, the first ones.
  """

  key: Mapping[str, Any]
  widths: Sequence[int]
  dtypes: Sequence[np.dtype]
  groups: int
  chunk_rows: int
  ids: np.ndarray
  hashes: np.ndarray
  deleted: np.ndarray
  num_written: int

  @classmethod
  def read(cls, folder: Path, key: Mapping[str, Any] | None = None) -> "Ledger":
    """The ledger in a folder; StaleArtifact if `key` is given and is another one's.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    if not _path(folder).exists():
      raise ValueError(
        f"{folder} holds no store: it has no index.json. Build one: build_store, or stage index."
      )
    fields = read_sealed(_path(folder))
    if key is not None:
      refuse_stale(folder, fields["key"], key, "folder")
    dtypes = [np.dtype(name) for name in fields.pop("dtypes")]
    ids, hashes = (np.array(fields.pop(n) or _NONE) for n in ("ids", "hashes"))
    deleted = np.array(fields.pop("deleted"), np.int64)
    return cls(**fields, dtypes=dtypes, ids=ids, hashes=hashes, deleted=deleted)

  @classmethod
  def empty(
    cls, key: Mapping[str, Any], widths: Sequence[int], dtypes: Sequence, groups: int, rows: int
  ) -> "Ledger":
    """The ledger of a store without examples, with that many rows in a chunk."""
    kinds = [np.dtype(dtype) for dtype in dtypes]
    return cls(key, list(widths), kinds, groups, rows, _NONE, _NONE, np.zeros(0, np.int64), 0)

  def write(self, folder: Path) -> None:
    """Writes it atomically."""
    arrays = {name: getattr(self, name).tolist() for name in ("ids", "hashes", "deleted")}
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    write_sealed(_path(folder), fields | arrays | {"dtypes": [d.name for d in self.dtypes]})

  @property
  def waiting(self) -> np.ndarray:
    """Ids of the examples whose rows are still to be written."""
    return self.ids[self.num_written :]

  @property
  def kept(self) -> np.ndarray:
    """[num_written] whether each example is there, that is, not deleted."""
    kept = np.ones(self.num_written, bool)
    kept[self.deleted] = False
    return kept

  @property
  def content(self) -> str:
    """A hash of what the rows are of, and which are there."""
    written = slice(self.num_written)
    fields = [self.ids[written].tolist(), self.hashes[written].tolist(), self.deleted.tolist()]
    return fingerprint_of([self.key, *fields])

  @property
  def padded_rows(self) -> int:
    """Rows of all examples, filled up to whole chunks."""
    return -(-len(self.ids) * self.groups // self.chunk_rows) * self.chunk_rows

  @property
  def num_bytes(self) -> int:
    """Bytes of all chunks with their checksums, when all rows are written."""
    row_bytes = sum(w * dtype.itemsize for w, dtype in zip(self.widths, self.dtypes, strict=True))
    num_chunks = len(self.widths) * self.padded_rows // self.chunk_rows
    return self.padded_rows * row_bytes + num_chunks * _CHECKSUM_BYTES

  def holds(self, ids: np.ndarray, hashes: np.ndarray) -> bool:
    """Whether all these examples are written, be it that some were deleted since.

    Raises:
      ValueError: one of them is there, but made from something else.
    """
    there = dict(zip(self.ids[: self.num_written].tolist(), range(self.num_written), strict=True))
    places = [there.get(example_id) for example_id in ids.tolist()]
    if None in places:
      return False
    deleted = set(self.deleted.tolist())
    pairs = zip(ids.tolist(), places, hashes.tolist(), strict=True)
    if other := [i for i, n, h in pairs if n not in deleted and self.hashes[n] != h]:
      raise ValueError(
        f"The store holds other examples under {len(other)} of the {len(ids)} ids, such as "
        f"{other[0]!r}: use another folder, or delete these examples and append them again."
      )
    return True

  def extended(self, ids: np.ndarray, hashes: np.ndarray) -> "Ledger":
    """With these examples to be written, unless they are the ones that it is waiting for.

    Raises:
      ValueError: an id is taken or of another kind, or others are still to be written.
    """
    ids = _checked_kind(ids)
    if len(self.waiting):
      expected = (self.waiting, self.hashes[self.num_written :])
      if not all(map(np.array_equal, expected, (ids, hashes))):
        raise ValueError(
          f"The store still lacks the rows of {len(self.waiting)} examples, "
          f"{self.waiting[0].item()!r} …: go on with the same examples before others are added, or "
          "delete its folder."
        )
      return self
    if len(self.ids) and self.ids.dtype.kind != ids.dtype.kind:
      kinds = [_KINDS[array.dtype.kind] for array in (self.ids, ids)]
      raise ValueError(
        f"The ids of the store are {kinds[0]}; those of the new examples, {kinds[1]}."
      )
    if taken := sorted(set(self.ids[self.kept].tolist()) & set(ids.tolist())):
      raise ValueError(
        f"{len(taken)} of {len(ids)} ids are in the store already, such as {taken[0]!r}: append "
        "only examples that are new."
      )
    joined = lambda old, new: np.concatenate([old, new]) if len(old) else new
    return dataclasses.replace(
      self, ids=joined(self.ids, ids), hashes=joined(self.hashes, np.asarray(hashes))
    )

  def without(self, ids: Sequence) -> tuple["Ledger", np.ndarray]:
    """With these examples deleted; and [n] all the positions that they have, ascending.

    Raises:
      ValueError: an id was never there.
    """
    wanted = set(np.asarray(ids).tolist())
    written = self.ids[: self.num_written].tolist()
    places = np.array([n for n, i in enumerate(written) if i in wanted], np.int64)
    if missing := sorted(wanted - {written[n] for n in places}):
      raise ValueError(
        f"{len(missing)} of {len(wanted)} ids are not in the store, such as {missing[0]!r}: "
        "none was deleted."
      )
    return dataclasses.replace(self, deleted=np.union1d(self.deleted, places)), places


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
  """Writes fields as JSON, atomically and with a checksum."""
  write_text(path, json.dumps({**fields, "checksum": fingerprint_of(fields)}))


def read_sealed(path: Path) -> dict[str, Any]:
  """The fields as they were written; ValueError where the file is damaged."""
  try:
    fields = json.loads(path.read_bytes())
    intact = fields.pop("checksum") == fingerprint_of(fields)
    problem = "it does not match its checksum"
  except Exception as error:  # of many kinds, by where the damage is
    intact, problem = False, str(error)
  if not intact:
    raise ValueError(
      f"{path} is damaged ({problem}): put it back from a copy, or delete the folder and build the "
      "store anew."
    )
  return fields


def _path(folder: Path) -> Path:
  return folder / "index.json"


def _checked_kind(ids: np.ndarray) -> np.ndarray:
  """Ids as JSON gives them back: int64 or strings; ValueError for others."""
  if ids.dtype.kind not in "iuU":
    raise ValueError(f"Ids of a store must be integers or strings, not {ids.dtype}.")
  return ids if ids.dtype.kind == "U" else ids.astype(np.int64)


_NONE = np.array([], dtype=str)
_KINDS = {"i": "integers", "U": "strings"}
