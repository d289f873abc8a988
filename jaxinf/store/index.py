"""Training gradients spent once, and kept to answer new queries (paper, Algorithm 2).

`build_index` computes a row for each (training example, group of draws) and gives a `Store` of
them; `open_index` opens one that is there, for the model and curvature that it was made with.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.examples import examples_of
from jaxinf.compression.compression import (
  COMPRESSIONS,
  Compression,
  LowRank,
  compression_named,
  settings_of,
)
from jaxinf.compression.projection import RandomProjection
from jaxinf.core.types import Array, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine import processes
from jaxinf.engine.artifacts import fingerprint, refuse_stale
from jaxinf.layers.per_example import checked_draws
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore
from jaxinf.store.store import RESERVE_BYTES, Store, hashes_of


def build_index(
  folder: str | Path,
  task: Task,
  curvature: Curvature,
  train_images: Array,
  *,
  draws: int,
  seed: int,
  train_ids: np.ndarray | None = None,
  train_conditioning: PyTree = None,
  draw_groups: int = 2,
  design: DrawDesign = DrawDesign(),
  compression: str | Compression | None = "int8",
  batch_size: int = 128,
  reserve_bytes: int = RESERVE_BYTES,
  devices: Sequence[jax.Device] | None = None,
) -> Store:
  """Computes the gradients of all training images and keeps them in a folder.

  It says first how much disk they take. One that was stopped, even by a full disk, goes on where it
  was; a finished one is opened.

  Args:
    folder: of the store; made where it does not exist.
    task: the model.
    curvature: fitted at the task's parameters; not the exact one.
    train_images: [N, H, W, C] float32 in [-1, 1] or uint8.
    draws: of (t, ε) for each image.
    seed: of the draws.
    train_ids: [N] stable ids, which the random keys follow; row numbers where None.
    train_conditioning: pytree of arrays [N, …] where the model takes it.
    draw_groups: rows kept for each image, each the mean over a group of draws, from which standard
      errors come; 1 takes half of the disk and leaves none.
    design: how the draws of a group depend on each other; with random_flip where training had it.
    compression: of the rows: int4, int8, int16, bfloat16, truncation or None (float32).
    batch_size: (image, draw) pairs at a time over all devices.
    reserve_bytes: of the disk that are left free.
    devices: local devices; all of them where None.

  Raises:
    ValueError: the arguments don't fit together, the folder holds the rows of something else, or
      they do not fit on the disk.
  """
  train = examples_of(train_images, train_ids, train_conditioning, "train")
  checked_draws(draws, draw_groups)
  if isinstance(compression, str) or compression is None:
    compression = compression_named(compression)
  packing = packing_of(curvature, compression)
  key = _identity(task, curvature) | {
    "settings": {
      "draws": draws, "draw_groups": draw_groups, "design": dataclasses.asdict(design),
      "seed": seed, "compression": settings_of(compression),
      "image_shape": list(train.images.shape[1:]),
    }
  }  # fmt: skip
  if processes.is_primary():
    RowStore.create(Path(folder), key, packing.widths, packing.dtypes, draw_groups)
  processes.wait_for_all("index created")
  store = Store(RowStore.open(Path(folder), key), task, curvature, packing)
  if not store.rows.ledger.holds(train.ids, hashes_of(train)):
    store.append(
      train.images, train.ids, conditioning=train.conditioning, batch_size=batch_size,
      reserve_bytes=reserve_bytes, devices=devices,
    )  # fmt: skip
  return store


def open_index(folder: str | Path, task: Task, curvature: Curvature) -> Store:
  """Opens a store; ValueError where it was made with another model or curvature."""
  rows = RowStore.open(Path(folder))
  ours = _identity(task, curvature)
  refuse_stale(Path(folder), {name: rows.ledger.key[name] for name in ours}, ours, "folder")
  name, fields = rows.ledger.key["settings"]["compression"]
  (kind,) = {type(c) for c in COMPRESSIONS.values() if type(c).__name__ == name}
  return Store(rows, task, curvature, packing_of(curvature, kind(**fields)))


def packing_of(curvature: Curvature, compression: Compression) -> Packing:
  """How a row of the store lies; ValueError where this curvature or compression cannot be kept."""
  if curvature.exact is not None:
    raise ValueError(
      "Exact curvature has no eigenbasis to keep gradients in: fit kfac, ekfac or diagonal."
    )
  if isinstance(compression, LowRank | RandomProjection):
    raise ValueError(
      f"A store does not keep gradients by {compression.description}: take int4, int8, int16, "
      "bfloat16, truncation or None."
    )
  return Packing.of(compression, {layer.name: layer.matrix_shape for layer in curvature.layers})


def _identity(task: Task, curvature: Curvature) -> dict[str, Any]:
  """What the rows of a store are meaningless without: model, schedule and eigenbases."""
  leaves = lambda *trees: {f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(trees))}
  return {
    "params": fingerprint(leaves(task.params)),
    "schedule": fingerprint(leaves(task.schedule)),
    "curvature": fingerprint(leaves(curvature.bases)),
    "layers": [layer.name for layer in curvature.layers],
  }
