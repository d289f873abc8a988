"""What the stage index takes."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from jaxinf.compression.compression import compression_named
from jaxinf.engine import processes
from jaxinf.layers.per_example import checked_draws
from jaxinf.planning.cost import StageCost
from jaxinf.planning.gradients import Gradients, try_on_gradients
from jaxinf.planning.subject import Subject, random_basis
from jaxinf.planning.trials import added, num_bytes, times
from jaxinf.store.eigenrows import pack_kernel
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore


def index_cost(subject: Subject, found: Gradients) -> StageCost:
  """Gradients of training images, in the eigenbasis, compressed and written."""
  run, config = subject.run, subject.run.config.index
  checked_draws(config.draws, config.draw_groups)
  group_size, num_images = config.draws // config.draw_groups, len(subject.ids)
  size, batches = subject.batches(
    num_images * config.draw_groups, max(1, config.batch_size // group_size)
  )
  layers = subject.model.layers
  compression = compression_named(config.compression, config.compression_size)
  packing = Packing.of(compression, {layer.name: layer.matrix_shape for layer in layers})
  bases = {layer.name: random_basis(layer) for layer in layers}
  packed, operations = try_on_gradients(subject, pack_kernel(packing), bases, size, fetched=True)
  pairs = batches * size * group_size
  rotations, (rows, chunk) = num_bytes(bases), store_bytes(packing, config.draw_groups, num_images)
  each = size // len(subject.devices)
  return StageCost(
    "index", num_images * config.draws, "pairs",
    operations=added([found.operations_of(pairs), times(operations, batches)]),
    seconds={
      "compiling": subject.registering + found.trial.compiling + packed.compiling,
      "batches": added([found.seconds_of(pairs), times(packed.batch, batches)]),
      "disk": rows / processes.count() / subject.disk_rate,
    },
    device={
      "parameters": subject.params_bytes, "rotations": rotations,
      "gradients": each * (subject.gradient_bytes + packing.row_bytes),
      "workspace": max(found.trial.workspace, packed.workspace),
    },
    host={
      "images": subject.images_bytes, "eigenbases": subject.eigenbases_bytes,
      "rotations": rotations, "rows": 2 * chunk,  # those that wait, and those being written
    },
    disk={"rows": rows},
    notes=() if run.config.attribute.precision is None else (
      "its gradients are taken to be as fast as in attribute.precision; they are in float32.",
    ),
  )  # fmt: skip


def store_bytes(packing: Packing, groups: int, num_examples: int) -> tuple[int, int]:
  """Bytes of a store of that many examples, and of one chunk of it."""
  with tempfile.TemporaryDirectory() as folder:  # an empty store knows its chunks
    store = RowStore.create(Path(folder), {}, packing.widths, packing.dtypes, groups)
    names = np.array([f"{n}" for n in range(num_examples)])
    full = dataclasses.replace(store, ledger=store.ledger.extended(names, names))
    return full.num_bytes, store.ledger.chunk_rows * packing.row_bytes
