"""Everything is a map or a reduce over examples: the drivers, and the only pmap.

A kernel is pure and sees one unsharded batch: `kernel(operands, batch)`, where `operands` (such as
parameters) are the same for every batch. The drivers own looping, padding, devices, processes,
progress and resuming. Padded rows repeat the last one and have mask 0.
"""

from jaxinf.engine.devices import (
  Kernel,
  first,
  local_devices,
  num_devices,
  num_step_devices,
  on_all,
  parallel_step,
  replicate,
  shard,
  shard_of_step,
)
from jaxinf.engine.maps import Blocks, PartialRows, map_batches, spread, stream_batches
from jaxinf.engine.reductions import Partial, Reduction, reduce_batches
from jaxinf.engine.worklist import Rows

__all__ = [
  "Blocks",
  "Kernel",
  "Partial",
  "PartialRows",
  "Reduction",
  "Rows",
  "first",
  "local_devices",
  "map_batches",
  "num_devices",
  "num_step_devices",
  "on_all",
  "parallel_step",
  "reduce_batches",
  "replicate",
  "shard",
  "shard_of_step",
  "spread",
  "stream_batches",
]
