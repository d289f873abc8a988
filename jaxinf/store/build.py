"""Training gradients spent once, and kept to answer new queries (paper, Algorithm 2).

`build_store` computes a row for each (training example, replicate of draws) and gives a `Store` of
them; `open_store` opens one that is there, for the curvature that it was made with.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.influence import LOSS_POWER
from jaxinf.compression.compression import (
  COMPRESSIONS,
  STORE_COMPRESSION,
  Compression,
  LowRank,
  compression_named,
  settings_of,
)
from jaxinf.compression.projection import RandomProjection
from jaxinf.core.arrays import fingerprint
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.curvature.curvature import Curvature
from jaxinf.engine import processes
from jaxinf.engine.artifacts import refuse_stale
from jaxinf.engine.compute import Compute
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore
from jaxinf.store.store import RESERVE_BYTES, Store, hashes_of


def build_store(
  folder: str | Path,
  curvature: Curvature,
  *,
  train: Examples,
  draws: Draws = Draws(),
  compression: str | Compression | None = STORE_COMPRESSION,
  reserve_bytes: int = RESERVE_BYTES,
  compute: Compute = Compute(),
) -> Store:
  """Computes the gradients of all training examples and keeps them in a folder.

  It says first how much disk they take. One that was stopped, even by a full disk, goes on where it
  was; a finished one is opened.

  Args:
    folder: of the store; made where it does not exist.
    curvature: of the model; not the exact one.
    train: the training examples, with random_flip where training mirrored images.
    draws: of (t, ε) for each example. A row is kept for each of the replicates, from which standard
      errors come: 1 takes the least disk and leaves none. The loss_power is ½ where none is given.
    compression: of the rows: int4, int8, int16, bfloat16, truncation or None (float32).
    reserve_bytes: of the disk that are left free.
    compute: how.

  Raises:
    ValueError: the arguments don't fit together, the folder holds the rows of something else, or
      they do not fit on the disk.
  """
  if draws.stop is not None:
    raise ValueError("A store keeps a fixed number of draws: Draws(num).")
  draws = draws.split().of_power(LOSS_POWER)
  if isinstance(compression, str) or compression is None:
    compression = compression_named(compression)
  packing = packing_of(curvature, compression)
  key = _identity(curvature) | {
    "settings": {
      "draws": draws.num,
      "replicates": draws.replicates,
      "design": draws.design,
      **({} if draws.power == 1 else {"loss_power": draws.power}),  # as stores of before have it
      "seed": draws.seed,
      **train.augmentation.settings,
      "compression": settings_of(compression),
      "shape": list(train.shape),
    }
  }
  if processes.is_primary():
    replicates = draws.replicates or 1
    RowStore.create(Path(folder), key, packing.widths, packing.dtypes, replicates)
  processes.wait_for_all("store created")
  store = Store(RowStore.open(Path(folder), key), curvature, packing)
  if not store.rows.ledger.holds(train.ids, hashes_of(train)):
    store.append(train, reserve_bytes=reserve_bytes, compute=compute)
  return store


def open_store(folder: str | Path, curvature: Curvature) -> Store:
  """Opens a store; ValueError where it was made with another model or curvature."""
  rows = RowStore.open(Path(folder))
  ours = _identity(curvature)
  refuse_stale(Path(folder), {name: rows.ledger.key[name] for name in ours}, ours, "folder")
  name, fields = rows.ledger.key["settings"]["compression"]
  (kind,) = {type(c) for c in COMPRESSIONS.values() if type(c).__name__ == name}
  return Store(rows, curvature, packing_of(curvature, kind(**fields)))


def packing_of(curvature: Curvature, compression: Compression) -> Packing:
  """How a row of the store lies; ValueError where this curvature or compression cannot be kept."""
  if not curvature.has_eigenbasis:
    raise ValueError(
      "Exact curvature has no eigenbasis to keep gradients in: fit KFAC, EKFAC, Shampoo or "
      "Diagonal."
    )
  if isinstance(compression, LowRank | RandomProjection):
    raise ValueError(
      f"A store does not keep gradients by {compression.description}: take int4, int8, int16, "
      "bfloat16, truncation or None."
    )
  return Packing.of(compression, {layer.name: layer.matrix_shape for layer in curvature.layers})


def _identity(curvature: Curvature) -> dict[str, Any]:
  """What the rows of a store are meaningless without: model, process and eigenbases."""
  leaves = enumerate(jax.tree.leaves(curvature.model.params))
  return {
    "params": fingerprint({f"{i}": np.asarray(x) for i, x in leaves}),
    "process": curvature.model.process.settings,
    "curvature": curvature.content(),
    "layers": [layer.name for layer in curvature.layers],
  }
