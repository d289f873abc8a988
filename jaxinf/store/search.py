"""Scores of a store's rows for query vectors, all of them or the best alone; or for themselves.

Rows are read a chunk at a time, each device taking the next one; what was read stays in memory up
to a limit, so that later queries need not read it again.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.types import Array, Matrices, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.engine import local_devices, processes
from jaxinf.engine.kernels import Kernel, on_one_device
from jaxinf.engine.progress import Progress
from jaxinf.scores.layer_scores import LayerScores
from jaxinf.scores.scores import Ranking, Scores
from jaxinf.store.eigenrows import ProductKernel, SelfProductKernel, product_operands
from jaxinf.store.flat import bits_of
from jaxinf.store.packing import Packing
from jaxinf.store.rows import RowStore

_ROWS_AT_ONCE = 256  # multiplied together


def matching_layers(names: Iterable[str], patterns: Sequence[str] | None) -> tuple[str, ...]:
  """The layers that any of the regular expressions matches, all where None; ValueError for none."""
  names = tuple(names)
  if patterns is None:
    return names
  if isinstance(patterns, str):
    raise ValueError(
      f"layers must be a sequence of regular expressions; write layers=({patterns!r},)."
    )
  found = tuple(n for n in names if any(re.search(p, n) for p in patterns))
  if not found:
    raise ValueError(f"No layer matches {list(patterns)}. There are: {', '.join(names)}.")
  return found


@dataclasses.dataclass(frozen=True)
class Search:
  """Query vectors, and the store they are compared with.

  Attributes:
    rows: the store.
    packing: of its rows.
    curvature: whose Λ they were made with.
    vectors: layer name → [Q · A, …] of the layers that count, query-major.
    query_replicates: A.
    devices: local devices; all of them where None.
    centred: whether a query's scores are to have the mean 0, as `influence` centres them.
  """

  rows: RowStore
  packing: Packing
  curvature: Curvature
  vectors: Matrices
  query_replicates: int
  devices: Sequence[jax.Device] | None
  centred: bool = False

  def scores(self, query_ids: np.ndarray, settings: Mapping[str, Any]) -> Scores:
    """The scores of all examples that are not deleted."""
    ledger, kept = self.rows.ledger, self.rows.ledger.kept
    begin, end = processes.share(len(kept))
    parts = [products for _, products in self._products(begin, end)]
    empty = np.zeros((0, ledger.groups, len(query_ids), self.query_replicates), np.float32)
    products = processes.gathered(np.concatenate([empty, *parts]), len(kept))[kept]
    if self.centred:
      products = products - products.mean(axis=0, dtype=np.float64).astype(np.float32)
    return self._scored(products, query_ids, ledger.ids[: len(kept)][kept], settings)

  def layer_scores(self, query_ids: np.ndarray, settings: Mapping[str, Any]) -> LayerScores:
    """The scores of all examples through each layer, whose columns are read once."""
    each = [
      dataclasses.replace(self, vectors={name: vectors}).scores(query_ids, settings)
      for name, vectors in self.vectors.items()
    ]
    of_queries = [
      scores.query_replicate_values for scores in each if scores.query_replicate_values is not None
    ]
    return LayerScores(
      np.stack([scores.replicate_values for scores in each]),
      tuple(self.vectors),
      query_ids,
      each[0].train_ids,
      settings,
      np.stack(of_queries) if of_queries else None,
    )

  def best(self, k: int) -> Ranking:
    """The k highest scores of each query; memory for Q × G × A × (k + a chunk)."""
    ids, kept = self.rows.ledger.ids, self.rows.ledger.kept
    if checked_count(k, "k") > kept.sum():
      raise ValueError(f"k must lie in 1…{kept.sum()}, the examples of the store; got {k}.")
    num_queries = len(next(iter(self.vectors.values()))) // self.query_replicates
    shape = num_queries, self.rows.ledger.groups, self.query_replicates
    found, total = Best.none(shape), np.zeros(shape)
    begin, end = processes.share(len(kept))
    for first, products in self._products(begin, end):
      there = np.flatnonzero(kept[first : first + len(products)])
      some = np.moveaxis(products[there], 2, 0)  # [Q, n, G, A]
      total += some.sum(axis=1, dtype=np.float64)
      found = found.merged(Best(some, np.tile(first + there, (num_queries, 1))), k)
    found = found.of_all_processes(k)
    (total,) = processes.summed([total])
    products = found.products
    if self.centred:
      products = products - (total / kept.sum()).astype(np.float32)[:, None]
    scores = [
      self._scored(one[:, :, None], np.arange(1), places, {})
      for one, places in zip(products, found.positions, strict=True)
    ]
    values = np.concatenate([one.values for one in scores])
    return Ranking(
      ids=ids[found.positions],
      values=values,
      std_errors=np.concatenate([one.std_errors for one in scores]),
      model_std_errors=np.full_like(values, np.nan),
      positions=found.positions,
    )

  def _scored(
    self, products: np.ndarray, query_ids: np.ndarray, ids: np.ndarray, settings: Mapping[str, Any]
  ) -> Scores:
    """The scores that products [N, G, Q, A] are."""
    by_query = np.transpose(products.mean(axis=1), (2, 1, 0)) if self.query_replicates > 1 else None
    by_group = np.transpose(products.mean(axis=3), (1, 2, 0))
    return Scores(by_group, query_ids, ids, settings, by_query)

  def _products(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (example, products [n, G, Q, A]) of the examples begin … end − 1, block by block."""
    groups, names = self.rows.ledger.groups, tuple(self.vectors)
    eigenvalues = {name: self.curvature.eigenvalues(name) for name in names}
    operands = product_operands(self.packing, self.vectors, eigenvalues)
    kernel, columns = ProductKernel(self.packing, names), self.packing.columns(names)
    span = begin * groups, end * groups
    for row, products in _outputs(self.rows, kernel, operands, columns, span, self.devices):
      if not np.isfinite(products).all():
        bad = row + int(np.argmin(np.isfinite(products).all(axis=1)))
        raise ValueError(
          "Some scores are not finite, first those of the training example "
          f"{self.rows.ledger.ids[bad // groups].item()!r}: its gradients overflow, or those of a "
          "query. Check that the model's outputs are finite for these examples, or raise the "
          "damping."
        )
      yield (
        row // groups,
        products.reshape(
          -1, groups, products.shape[1] // self.query_replicates, self.query_replicates
        ),
      )


def self_products(
  rows: RowStore,
  packing: Packing,
  curvature: Curvature,
  names: tuple[str, ...],
  damping: float,
  devices: Sequence[jax.Device] | None,
) -> np.ndarray:
  """[N, 2, G] `replicate_products` of each example's G rows, deleted ones among them.

  Args:
    rows: the store.
    packing, curvature: of its rows.
    names: of the layers that count.
    damping: λ.
    devices: local devices; all of them where None.
  """
  groups, num = rows.ledger.groups, len(rows.ledger.kept)
  operands = {name: curvature.eigenvalues(name) for name in names}, np.float32(damping)
  kernel, columns = SelfProductKernel(packing, names, groups), packing.columns(names)
  begin, end = processes.share(num)
  span = begin * groups, end * groups
  parts = [part for _, part in _outputs(rows, kernel, operands, columns, span, devices)]
  return processes.gathered(np.concatenate([np.zeros((0, 2, groups), np.float32), *parts]), num)


def _outputs(
  rows: RowStore,
  kernel: Kernel,
  operands: PyTree,
  columns: Sequence[tuple[int, int]],
  span: tuple[int, int],
  devices: Sequence[jax.Device] | None,
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first row, the kernel's outputs) of each block of the rows of `span`, in order."""
  devices, program = local_devices(devices), on_one_device(kernel)
  placed = [jax.device_put(operands, device) for device in devices]
  pending: collections.deque = collections.deque()
  at_once = max(1, _ROWS_AT_ONCE // rows.ledger.groups) * rows.ledger.groups  # whole examples

  def finish(progress: Progress) -> tuple[int, np.ndarray]:
    row, last, parts = pending.popleft()
    progress.advance(last - row)
    return row, np.concatenate([np.asarray(part) for part in parts])

  with Progress(processes.label("store"), span[1] - span[0], "rows") as progress:
    for number, (first, last) in enumerate(rows.blocks(*span)):
      device = number % len(devices)
      arrays: list[Array] = [bits_of(array) for array in rows.read(first, last, columns)]
      parts = [
        program(devices[device], placed[device], [a[i : i + at_once] for a in arrays])
        for i in range(0, last - first, at_once)
      ]
      pending.append((first, last, parts))
      if len(pending) > 2 * len(devices):
        yield finish(progress)
    while pending:
      yield finish(progress)


@dataclasses.dataclass(frozen=True)
class Best:
  """The best examples so far of each query, in no order.

  Attributes:
    products: [Q, n, G, A] float32 of replicates of draws; a score is their mean.
    positions: [Q, n] of the examples in the store.
  """

  products: np.ndarray
  positions: np.ndarray

  @classmethod
  def none(cls, shape: tuple[int, int, int]) -> "Best":
    """Of (Q, G, A)."""
    num_queries, groups, query_replicates = shape
    products = np.zeros((num_queries, 0, groups, query_replicates), np.float32)
    return cls(products, np.zeros((num_queries, 0), int))

  def merged(self, other: "Best", k: int) -> "Best":
    """The k best of both, best first, ties by position."""
    joined = [
      np.concatenate(pair, axis=1) for pair in zip(self._arrays, other._arrays, strict=True)
    ]
    products, positions = joined
    order = np.lexsort((positions, -products.mean(axis=(2, 3))))[:, :k]
    rows = np.arange(len(order))[:, None]
    return Best(products[rows, order], positions[rows, order])

  def of_all_processes(self, k: int) -> "Best":
    """The k best of what every process has found."""
    if processes.count() == 1:
      return self
    missing = k - self.positions.shape[1]
    fill = lambda array, value: np.pad(
      array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)), constant_values=value
    )
    padded = Best(fill(self.products, -np.inf), fill(self.positions, 0))
    num = len(padded.positions)
    everyones = [processes.gathered(array, num * processes.count()) for array in padded._arrays]
    parts = zip(*(np.split(array, processes.count()) for array in everyones), strict=True)
    return functools.reduce(lambda a, b: a.merged(b, k), (Best(*part) for part in parts))

  @property
  def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
    return self.products, self.positions
