"""How something is computed, and never what: results do not depend on it."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.engine.checkpoints import Checkpointing


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a computation is carried out.

  Attributes:
    batch_size: (example, draw) pairs at a time over all devices. At least one replicate of draws on
      each device goes through at once, so that more replicates need less memory.
    devices: local devices; all of them where None.
    checkpoint: keeps what is computed so far on disk; None: a killed computation begins again.
    query_chunk: queries whose preconditioned gradients are on the devices at a time, for more
      queries than fit; all of them where None.
    block_mib: MiB of gradients that wait on the host and are projected at once (TRAK and its kin).
      The more, the less often the projection is made. The devices share them.

  Raises:
    ValueError: a size is too small.
  """

  batch_size: int = 128
  devices: Sequence[jax.Device] | None = None
  checkpoint: Checkpointing | None = None
  query_chunk: int | None = None
  block_mib: float = 1024

  def __post_init__(self):
    object.__setattr__(self, "batch_size", checked_count(self.batch_size, "batch_size"))
    if self.query_chunk is not None:
      object.__setattr__(self, "query_chunk", checked_count(self.query_chunk, "query_chunk"))
    if not self.block_mib > 0:
      raise ValueError(f"block_mib must be positive; got {self.block_mib}.")

  def rows(self, draws: Draws) -> int:
    """(example, replicate) rows at a time, each of draws.size pairs."""
    return max(1, self.batch_size // draws.size)

  def query_blocks(self, num_queries: int) -> int:
    """Parts of the queries, of which one is on the devices at a time."""
    return 1 if self.query_chunk is None else math.ceil(num_queries / self.query_chunk)

  def within(self, name: str) -> "Compute":
    """The same, with what is kept on disk in a folder of that name within the folder."""
    if self.checkpoint is None:
      return self
    inner = dataclasses.replace(self.checkpoint, folder=self.checkpoint.path(name))
    return dataclasses.replace(self, checkpoint=inner)
