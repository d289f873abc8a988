"""What a driver goes through, and its batches."""

import dataclasses

import jax
import numpy as np

from jaxinf.core.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a driver goes through: examples, or the (example, draw) pairs of `draws` draws each.

  Attributes:
    images: [N, H, W, C], or None where rows have no image yet.
    ids: [N] uint32 example numbers.
    draws: None for one row an example; S for S rows an example, example-major.
    first_draw: number of the first of them.
    conditioning: pytree of arrays [N, …] that go with the examples, or None.
  """

  images: Array | None
  ids: np.ndarray
  draws: int | None = None
  conditioning: PyTree = None
  first_draw: int = 0

  def __len__(self) -> int:
    return len(self.ids) * (self.draws or 1)

  def padded_batch(self, start: int, size: int, end: int | None = None) -> Batch:
    """Rows start … start + size − 1; from `end` on (None: past the last) they are padding."""
    rows = np.arange(start, start + size)
    mask = (rows < (len(self) if end is None else end)).astype(np.float32)
    rows = np.minimum(rows, len(self) - 1)
    examples, draws = np.divmod(rows, self.draws or 1)
    return Batch(
      images=None if self.images is None else self.images[examples],
      ids=self.ids[examples],
      draws=None if self.draws is None else (self.first_draw + draws).astype(np.int32),
      mask=mask,
      conditioning=jax.tree.map(lambda x: x[examples], self.conditioning),
    )
