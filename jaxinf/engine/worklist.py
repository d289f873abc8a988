"""What a driver goes through, and its batches."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxinf.core.arrays import is_floating, read_rows
from jaxinf.core.examples import Examples
from jaxinf.core.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a driver goes through: examples, or the (example, draw) pairs of `draws` draws each.

  Attributes:
    data: [N, …], or None where rows have no data yet. Read a batch at a time.
    ids: [N] uint32 example numbers.
    draws: None for one row an example; S for S rows an example, example-major.
    first_draw: number of the first of them.
    conditioning: pytree of arrays [N, …] that go with the examples, or None.
  """

  data: Any
  ids: np.ndarray
  draws: int | None = None
  conditioning: PyTree = None
  first_draw: int = 0

  @classmethod
  def of(cls, examples: Examples, draws: int | None = None) -> "Rows":
    """Rows of examples, `draws` for each."""
    return cls(examples.data, examples.numbers, draws, examples.conditioning)

  def __len__(self) -> int:
    return len(self.ids) * (self.draws or 1)

  def padded_batch(self, start: int, size: int, end: int | None = None) -> Batch:
    """Rows start … start + size − 1; from `end` on (None: past the last) they are padding."""
    rows = np.arange(start, start + size)
    mask = (rows < (len(self) if end is None else end)).astype(np.float32)
    rows = np.minimum(rows, len(self) - 1)
    examples, draws = np.divmod(rows, self.draws or 1)
    return Batch(
      data=None if self.data is None else _numbers(read_rows(self.data, examples)),
      ids=self.ids[examples],
      draws=None if self.draws is None else (self.first_draw + draws).astype(np.int32),
      mask=mask,
      conditioning=jax.tree.map(lambda x: read_rows(x, examples), self.conditioning),
    )


def _numbers(rows: np.ndarray) -> np.ndarray:
  """Rows as kernels take them: float32, or uint8 as it is."""
  return rows.astype(np.float32) if is_floating(rows.dtype) else rows
