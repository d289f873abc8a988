"""Everything is a map or a reduce over examples and draws: the drivers, and the only pmap.

Kernels (kernels.py) are pure and see one unsharded batch: kernel(operands, batch), where `operands`
(such as parameters) are the same for every batch. The drivers own looping, padding, devices,
processes, progress and resuming. Padded rows repeat the last one and have mask 0.
"""

from jaxinf.engine.compute import Compute
from jaxinf.engine.devices import (
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
from jaxinf.engine.kernels import Kernel, compiled
from jaxinf.engine.maps import Blocks, PartialRows, map_batches, spread, stream_batches
from jaxinf.engine.reductions import Partial, reduce_batches
from jaxinf.engine.worklist import Rows

__all__ = [
  "Blocks",
  "Compute",
  "Kernel",
  "Partial",
  "PartialRows",
  "Rows",
  "compiled",
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
