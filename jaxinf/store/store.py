"""Kept training gradients that answer new queries.

`Store` holds a row for each (training example, group of draws); see eigenrows.py. Examples are
added and deleted, and new samples scored at any damping, without a backward pass over the others.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf import engine
from jaxinf.attribution.examples import Examples, examples_of, registered
from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  DrawGroups,
  gradient_kernel,
  gradient_operands,
)
from jaxinf.attribution.queries import gradient_batches
from jaxinf.core.types import Array, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import checked_damping
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine import processes
from jaxinf.layers.per_example import checked_draws, default_groups
from jaxinf.scores.scores import Ranking, Scores
from jaxinf.store.eigenrows import pack_kernel, query_vectors, rotations
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore
from jaxinf.store.search import Search, matching_layers

_LOG = logging.getLogger("jaxinf")

RESERVE_BYTES = 2**30  # left free on the disk


@dataclasses.dataclass(frozen=True)
class Store:
  """A store with the model and curvature that its rows belong to.

  Attributes:
    rows: on disk.
    task: the model.
    curvature: whose eigenbasis they are in.
    packing: how the layers lie in a row.
  """

  rows: RowStore
  task: Task
  curvature: Curvature
  packing: Packing
  _models: dict = dataclasses.field(default_factory=dict, repr=False)

  @property
  def settings(self) -> Mapping[str, Any]:
    """How the gradients were made: draws, draw_groups, design, seed, compression."""
    return self.rows.ledger.key["settings"]

  @property
  def num_bytes(self) -> int:
    """Bytes of all rows on disk, which come in whole chunks."""
    return self.rows.num_bytes

  def __len__(self) -> int:
    """Examples that are there."""
    return int(self.rows.ledger.kept.sum())

  def append(
    self,
    images: Array,
    ids: np.ndarray,
    *,
    conditioning: PyTree = None,
    batch_size: int = 128,
    reserve_bytes: int = RESERVE_BYTES,
    devices: Sequence[jax.Device] | None = None,
  ) -> None:
    """Adds training examples; one that was stopped goes on where it was, given the same again.

    Args:
      images: [N, H, W, C] float32 in [-1, 1] or uint8.
      ids: [N] stable ids, which the random keys follow; none may be in the store.
      conditioning: pytree of arrays [N, …] where the model takes it.
      batch_size: (image, draw) pairs at a time over all devices.
      reserve_bytes: of the disk that are left free.
      devices: local devices; all of them where None.

    Raises:
      ValueError: ids are taken, or the rows do not fit on the disk: what is written stays.
    """
    train = examples_of(images, ids, conditioning, "train")
    settings, store, size = self.settings, self.rows, self.rows.ledger.groups
    groups = DrawGroups(
      settings["seed"], settings["draws"] // size, DrawDesign(**settings["design"])
    )
    # What cannot be computed is refused before the store waits for it.
    rows, kernel = train.rows(size), self._gradients(train, LOSS, groups)
    if processes.is_primary():
      needed = store.plan(train.ids, hashes_of(train), reserve_bytes)
      _LOG.info("%s: %.1f MiB more on disk, in whole chunks", store.folder, needed / 2**20)
    processes.wait_for_all("index planned")
    store.reload()
    last = len(store.ledger.ids) * size
    first = last - len(rows)  # row of the first of them
    blocks = list(store.blocks(first, last))
    begin, end = processes.share(len(blocks))
    mine = blocks[begin:end]
    if mine:
      self._write_rows(
        mine[0][0], mine[-1][1], first, rows, kernel,
        batch_size=max(1, batch_size // groups.size), reserve_bytes=reserve_bytes, devices=devices,
      )  # fmt: skip
    processes.wait_for_all("index written")
    if processes.is_primary():
      store.finish()
    processes.wait_for_all("index finished")
    store.reload()

  def delete(self, ids: Sequence) -> None:
    """Deletes examples by id: they are in no later answer, and their rows become zeros.

    Their ids may be appended again.
    """
    if processes.is_primary():
      self.rows.delete(ids)
    processes.wait_for_all("index deleted")
    self.rows.reload()

  def verify(self) -> int:
    """Reads all rows and compares their checksums; bytes read. ValueError names what is damaged."""
    return self.rows.verify()

  def query(
    self,
    queries: Array,
    *,
    damping: float,
    draws: int,
    seed: int,
    measurement: str | Measurement = "loss",
    query_ids: np.ndarray | None = None,
    query_conditioning: PyTree = None,
    query_groups: int | None = None,
    layers: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_size: int = 128,
    devices: Sequence[jax.Device] | None = None,
  ) -> Scores | Ranking:
    """Scores the examples of the store for new queries, without a backward pass over them.

    Equal to `influence` over the same examples and draws but for compression. The query vectors are
    held in float32, Q · query_groups rows of the parameters: ask many queries of a large model in
    several calls, which need not read the store again.

    Args:
      queries: [Q, H, W, C] float32 in [-1, 1] or uint8; or trajectories, as for `influence`.
      damping: λ > 0, in the units of the curvature; any, at no cost.
      draws: of (t, ε) for each query, by the store's design but without flips.
      seed: of them.
      measurement: what is measured of a query, by name or as an object.
      query_ids: stable ids, which the random keys follow; row numbers where None.
      query_conditioning: pytree of arrays [Q, …] where the model takes it.
      query_groups: groups the draws are split into, for standard errors; 2 where None and even.
      layers: regular expressions on layer names, of which only the matching count; None: all.
      top_k: keeps only the best examples of each query, and never holds Q × N scores.
      batch_size: (query, draw) pairs at a time over all devices.
      devices: local devices; all of them where None.

    Returns:
      Scores [Q, N] of the examples in the order of the store; or their Ranking, where top_k is
      given, with rows of the store as positions.

    Raises:
      ValueError: the arguments don't fit together or the store is damaged.
    """
    checked_damping(damping)
    measured = measurement_named(measurement)
    query = examples_of(queries, query_ids, query_conditioning, "query", measured)
    self.rows.refresh()
    names = matching_layers(self.packing.shapes, layers)
    design = DrawDesign(**self.settings["design"]).without_flips()
    if query_groups is None:
      query_groups = default_groups(draws, most=2)
    checked_draws(draws, query_groups, "draws", "query_groups")
    groups = DrawGroups(seed, draws // query_groups, design)
    vectors = query_vectors(
      self.curvature,
      gradient_batches(
        self._gradients(query, measured, groups),
        gradient_operands(self.task.params, QUERY), query.rows(query_groups),
        batch_size=max(1, batch_size // groups.size), devices=devices,
      ),
      num_rows=len(query.ids) * query_groups, dampings=(damping,), layers=names,
    )  # fmt: skip
    search = Search(self.rows, self.packing, self.curvature, vectors, query_groups, devices)
    if top_k is not None:
      return search.best(top_k)
    settings = {**self.settings, "damping": damping, "layers": names,
                "measurement": measured.name or "custom", "query_draws": draws,
                "query_groups": query_groups, "query_seed": seed}  # fmt: skip
    return search.scores(query.ids, settings)

  def _gradients(
    self, examples: Examples, measurement: Measurement, groups: DrawGroups
  ) -> engine.Kernel:
    """The gradient kernel for such examples, made once, so that it compiles once."""
    image_shape = examples.image_shape
    expected = tuple(self.settings["image_shape"])
    if image_shape != expected:
      raise ValueError(f"The store is of images {expected}; got {image_shape}. Resize them.")
    given = jax.tree.map(lambda x: (x.shape[1:], str(x.dtype)), examples.conditioning)
    inputs = (image_shape, str(given))
    if inputs not in self._models:
      self._models[inputs] = registered(self.task, self.curvature, examples)
    kernel = (inputs, measurement, groups)
    if kernel not in self._models:
      self._models[kernel] = gradient_kernel(
        self._models[inputs], measurement, self.task.schedule, groups
      )
    return self._models[kernel]

  def _write_rows(
    self, begin: int, end: int, first: int, rows: engine.Rows, kernel: engine.Kernel,
    *, batch_size: int, reserve_bytes: int, devices: Sequence[jax.Device] | None,
  ) -> None:  # fmt: skip
    """Computes and writes the rows [begin, end) of the store, from where it was stopped.

    `rows` are the new ones, of which the first is row `first` of the store.
    """
    store, worker = self.rows, processes.suffix()
    done = store.progress(worker)
    done = done if begin <= done <= end else begin
    if done == end:
      return
    stream = engine.stream_batches(
      kernel, gradient_operands(self.task.params, TRAIN), rows, batch_size=batch_size,
      label="training gradients", unit="(image, group) rows", devices=devices,
      span=(done - first, end - first),
      then=engine.Blocks(pack_kernel(self.packing), [rotations(self.curvature)]),
    )  # fmt: skip
    waiting: list[list[np.ndarray]] = []
    computed = done
    for arrays in stream:
      waiting.append(arrays)
      computed += len(arrays[0])
      complete = computed if computed == end else computed - computed % store.ledger.chunk_rows
      if complete <= done:
        continue
      joined = [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
      start = done  # row of the first of `joined`
      for row, done in store.blocks(start, complete):
        store.write(row, [array[row - start : done - start] for array in joined], reserve_bytes)
        store.save_progress(worker, done)
      waiting = [[array[done - start :] for array in joined]]


def hashes_of(examples: Examples) -> np.ndarray:
  """[N] a hash of each example's image and conditioning."""
  leaves = [examples.images, *jax.tree.leaves(examples.conditioning)]
  kinds = str([(leaf.dtype, leaf.shape[1:]) for leaf in leaves]).encode()

  def of(n: int) -> str:
    parts = (np.ascontiguousarray(leaf[n]).tobytes() for leaf in leaves)
    return hashlib.blake2b(kinds + b"".join(parts), digest_size=8).hexdigest()

  return np.array([of(n) for n in range(len(examples.ids))])
