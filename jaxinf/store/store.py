"""Kept training gradients that answer new queries.

`Store` holds a row for each (training example, replicate of draws); see eigenrows.py. Examples are
added and deleted, and new samples scored at any damping, without a backward pass over the others.
"""

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.kernels import QUERY, TRAIN, GradientKernel, row_operands
from jaxinf.attribution.queries import gradient_batches, gradient_kernel
from jaxinf.attribution.self_influence import checked_finite
from jaxinf.core.arrays import blocks
from jaxinf.core.checks import checked_damping
from jaxinf.core.damping import Damping, damping_settings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_queries
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.engine import processes
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import Blocks, stream_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.layer_scores import LayerScores
from jaxinf.scores.scores import Ranking, Scores
from jaxinf.scores.self_influence import SelfInfluence
from jaxinf.store.eigenrows import PackKernel, query_vectors
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore
from jaxinf.store.search import Search, matching_layers, self_products

_LOG = logging.getLogger("jaxinf")

RESERVE_BYTES = 2**30  # left free on the disk


@dataclasses.dataclass(frozen=True)
class Store:
  """A store with the curvature that its rows belong to.

  Attributes:
    rows: on disk.
    curvature: whose eigenbasis they are in, and which knows the model.
    packing: how the layers lie in a row.
  """

  rows: RowStore
  curvature: Curvature
  packing: Packing

  @property
  def settings(self) -> Mapping[str, Any]:
    """How the gradients were made: draws, replicates, design, seed, compression."""
    return self.rows.ledger.key["settings"]

  @property
  def draws(self) -> Draws:
    """Those of every training example."""
    found = self.settings
    power = found.get("loss_power", 1.0)
    fields = {"seed": found["seed"], "loss_power": power, **found["design"]}
    return Draws(found["draws"], found["replicates"], **fields)

  @property
  def num_bytes(self) -> int:
    """Bytes of all rows on disk, which come in whole chunks."""
    return self.rows.num_bytes

  def __len__(self) -> int:
    """Examples that are there."""
    return int(self.rows.ledger.kept.sum())

  def append(
    self,
    train: Examples,
    *,
    reserve_bytes: int = RESERVE_BYTES,
    compute: Compute = Compute(),
  ) -> None:
    """Adds training examples; one that was stopped goes on where it was, given the same again.

    Args:
      train: the examples, none of whose ids may be in the store.
      reserve_bytes: of the disk that are left free.
      compute: how.

    Raises:
      ValueError: ids are taken, or the rows do not fit on the disk: what is written stays.
    """
    ours = train.augmentation.settings
    names = ("random_flip", "latents", "conditioning_dropout", "null_conditioning")
    for name in names:
      if ours.get(name) != self.settings.get(name):
        raise ValueError(
          f"The store was made with {name}={self.settings.get(name)}, these examples have "
          f"{ours.get(name)}: give them the same."
        )
    store, draws = self.rows, self.draws
    # What cannot be computed is refused before the store waits for it.
    kernel = self._gradients(train, LOSS, draws)
    if processes.is_primary():
      needed = store.plan(train.ids, hashes_of(train), reserve_bytes)
      _LOG.info("%s: %.1f MiB more on disk, in whole chunks", store.folder, needed / 2**20)
    processes.wait_for_all("store planned")
    store.reload()
    rows = Rows.of(train, draws.replicates)
    first = len(store.ledger.ids) * store.ledger.groups - len(rows)  # row of the first of them
    chunks = list(store.blocks(first, first + len(rows)))
    begin, end = processes.share(len(chunks))
    if mine := chunks[begin:end]:
      self._write_rows(
        mine[0][0], mine[-1][1], self._packed(kernel, rows, first, compute, mine), reserve_bytes
      )
    processes.wait_for_all("store written")
    if processes.is_primary():
      store.finish()
    processes.wait_for_all("store finished")
    store.reload()

  def delete(self, ids: Sequence) -> None:
    """Deletes examples by id: they are in no later answer, and their rows become zeros.

    Their ids may be appended again.
    """
    if processes.is_primary():
      self.rows.delete(ids)
    processes.wait_for_all("store deleted")
    self.rows.reload()

  def verify(self) -> int:
    """Reads all rows and compares their checksums; bytes read. ValueError names what is damaged."""
    return self.rows.verify()

  def query(
    self,
    queries: Examples,
    *,
    damping: Damping,
    draws: Draws = Draws(),
    measurement: str | Measurement = "loss",
    layers: Sequence[str] | None = None,
    compute: Compute = Compute(),
  ) -> Scores:
    """Scores the examples of the store for new queries, without a backward pass over them.

    Equal to `influence` over the same examples and draws but for compression. The query vectors are
    held in float32, Q · replicates rows of the parameters: ask many queries of a large model in
    several calls, which need not read the store again.

    Args:
      queries: what is to be explained; trajectories as for `influence`.
      damping: λ > 0, in the units of the curvature, or RelativeDamping; any, at no cost.
      draws: of (t, ε) for each query.
      measurement: what is measured of a query, by name or as an object.
      layers: regular expressions on layer names, of which only the matching count; None: all.
      compute: how.

    Returns:
      Scores [Q, N] of the examples in the order of the store.

    Raises:
      ValueError: the arguments don't fit together or the store is damaged.
    """
    search, settings = self._search(queries, damping, draws, measurement, layers, compute)
    return search.scores(queries.ids, settings)

  def layer_scores(
    self,
    queries: Examples,
    *,
    damping: Damping,
    draws: Draws = Draws(),
    measurement: str | Measurement = "loss",
    layers: Sequence[str] | None = None,
    compute: Compute = Compute(),
  ) -> LayerScores:
    """Scores through each layer, otherwise as `query`, whose scores are their sum."""
    search, settings = self._search(queries, damping, draws, measurement, layers, compute)
    return search.layer_scores(queries.ids, settings)

  def top(
    self,
    queries: Examples,
    k: int,
    *,
    damping: Damping,
    draws: Draws = Draws(),
    measurement: str | Measurement = "loss",
    layers: Sequence[str] | None = None,
    compute: Compute = Compute(),
  ) -> Ranking:
    """The k best examples of each query, otherwise as `query`; never holds Q × N scores.

    The positions in the ranking are rows of the store.
    """
    search, _ = self._search(queries, damping, draws, measurement, layers, compute)
    return search.best(k)

  def self_influence(
    self,
    damping: float,
    *,
    layers: Sequence[str] | None = None,
    compute: Compute = Compute(),
  ) -> SelfInfluence:
    """How much each example of the store is learned from itself alone, from its rows.

    Equal to `jaxinf.self_influence` of the same examples and draws, their loss_power included, but
    for compression. Rows in 2 replicates give it without bias, and in 3 or more with standard
    errors. Rows in one replicate give squares of noisy gradients, which are too large by the noise:
    with a warning.

    Args:
      damping: λ > 0, in the units of the curvature; any, at no cost.
      layers: regular expressions on layer names, of which only the matching count; None: all.
      compute: of it, the devices.

    Raises:
      ValueError: no layer matches, or the store is damaged.
    """
    checked_damping(damping)
    self.rows.refresh()
    names, ledger = matching_layers(self.packing.shapes, layers), self.rows.ledger
    if ledger.groups == 1:
      warnings.warn(
        f"{self.rows.folder} keeps one replicate of draws, so that self-influence is the square of "
        "one noisy gradient, which is too large by its noise. Build it with Draws(num, 2).",
        stacklevel=2,
      )
    products = self_products(
      self.rows, self.packing, self.curvature, names, damping, compute.devices
    )[ledger.kept]
    ids = ledger.ids[: len(ledger.kept)][ledger.kept]
    checked_finite(products, ids)
    settings = {**self.settings, "damping": float(damping), "layers": names}
    return SelfInfluence.of_products(products, ids, settings)

  def _search(
    self,
    queries: Examples,
    damping: Damping,
    draws: Draws,
    measurement: str | Measurement,
    layers: Sequence[str] | None,
    compute: Compute,
  ) -> tuple[Search, dict[str, Any]]:
    """The query vectors, to be compared with the rows, and what an answer is computed with."""
    draws, measured = draws.of_queries(draws), measurement_named(measurement)
    self.curvature.check_damping(damping)
    check_queries(queries)
    self.rows.refresh()
    names = matching_layers(self.packing.shapes, layers)
    grads = gradient_batches(
      self._gradients(queries, measured, draws),
      row_operands(self.curvature.model.params, draws, QUERY),
      queries,
      draws,
      compute,
    )
    replicates = draws.replicates or 1
    vectors = query_vectors(
      self.curvature,
      grads,
      num_rows=len(queries) * replicates,
      dampings=(damping,),
      layers=names,
    )
    centred = self.draws.power != 1
    search = Search(
      self.rows, self.packing, self.curvature, vectors, replicates, compute.devices, centred
    )
    return search, {
      **self.settings,
      **damping_settings(damping),
      "layers": tuple(vectors),
      "measurement": measured.name or "custom",
      "query_draws": draws.num,
      "query_replicates": draws.replicates,
      "query_seed": draws.seed,
    }

  def _gradients(
    self, examples: Examples, measurement: Measurement, draws: Draws
  ) -> GradientKernel:
    """The gradient kernel for such examples."""
    shape, expected = examples.shape[measurement.axes :], tuple(self.settings["shape"])
    if shape != expected:
      raise ValueError(f"The store is of examples {expected}; got {shape}. Resize them.")
    return gradient_kernel(self.curvature, examples, measurement, draws)

  def _packed(
    self,
    kernel: GradientKernel,
    rows: Rows,
    first: int,
    compute: Compute,
    chunks: Sequence[tuple[int, int]],
  ) -> Iterator[list[np.ndarray]]:
    """The rows of these chunks as the store keeps them, from where it was stopped.

    `rows` are the new ones, of which the first is row `first` of the store.
    """
    begin, end = self._left(chunks[0][0], chunks[-1][1])
    return stream_batches(
      kernel,
      row_operands(self.curvature.model.params, self.draws, TRAIN),
      rows,
      batch_size=compute.rows(self.draws),
      label="training gradients",
      unit="(example, replicate) rows",
      devices=compute.devices,
      span=(begin - first, end - first),
      then=Blocks(PackKernel(self.packing), [self.curvature.rotations()]),
    )

  def _left(self, begin: int, end: int) -> tuple[int, int]:
    """The rows of this process's share [begin, end) that are still to be written."""
    done = self.rows.progress(processes.suffix())
    return (done if begin <= done <= end else begin), end

  def _write_rows(
    self, begin: int, end: int, stream: Iterator[list[np.ndarray]], reserve_bytes: int
  ) -> None:
    """Writes the rows [begin, end) of the store as they come, whole chunks at a time."""
    store, worker = self.rows, processes.suffix()
    done, end = self._left(begin, end)
    if done == end:
      return
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
  """[N] a hash of each example's data and conditioning."""
  leaves = [examples.data, *jax.tree.leaves(examples.conditioning)]
  kinds = str([(np.dtype(leaf.dtype), tuple(leaf.shape[1:])) for leaf in leaves]).encode()
  digests = [hashlib.blake2b(kinds, digest_size=8) for _ in range(len(examples))]
  for leaf in leaves:
    row = 0
    for block in blocks(leaf):
      for part in block:
        digests[row].update(np.ascontiguousarray(part).tobytes())
        row += 1
  return np.array([digest.hexdigest() for digest in digests])
