"""Stand-ins for arrays on disk as h5py and zarr give them: rows by slice or ascending numbers."""

import numpy as np


class Stored:
  """An array that is read like h5py's: no negative, repeated or descending rows.

  Attributes:
    most: rows of the largest read so far.
  """

  def __init__(self, values: np.ndarray):
    self._values, self.most = values, 0
    self.shape, self.dtype = values.shape, values.dtype

  def __getitem__(self, rows):
    if not isinstance(rows, slice):
      rows = np.asarray(rows)
      if rows.ndim != 1 or (np.diff(rows) <= 0).any() or (rows < 0).any():
        raise TypeError("Indexing elements must be in increasing order")
    found = self._values[rows]
    self.most = max(self.most, len(found))
    return found


class Zarr(Stored):
  """Likewise, with row numbers through `oindex` alone."""

  @property
  def oindex(self) -> Stored:
    return Stored(self._values)

  def __getitem__(self, rows):
    if not isinstance(rows, slice):
      raise IndexError("unsupported selection")
    return super().__getitem__(rows)
