"""The score pass: training gradients stream past the rows of queries, and are never kept.

Scores of (training example, replicate of draws) rows for R query rows, [N · G, R]; and what they
say when nothing is compressed or rounded, on a sample of the training examples.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.kernels import PlainProducts
from jaxinf.attribution.queries import QueryRows
from jaxinf.compression.compression import Compression
from jaxinf.core.arrays import read_rows
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Matrices, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.engine import processes
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import Kernel
from jaxinf.engine.maps import Blocks, PartialRows, map_batches, stream_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.statistics import pearson, spearman

_CHECKED = (
  "num_examples", "num_queries", "pearson", "least_pearson", "spearman", "least_spearman",
)  # fmt: skip
_SAMPLE = 32  # training examples whose scores are computed both ways, or a batch of rows


@dataclasses.dataclass(frozen=True)
class ScorePass:
  """What streams, and how.

  Attributes:
    gradients: the kernel of training gradients.
    exactly: the same in the network's own precision, for the check.
    operands: of both.
    train: the training examples.
    draws: their draws.
    curvature: of the query rows.
    compute: how.
    num_queries: Q.
  """

  gradients: Kernel
  exactly: Kernel
  operands: PyTree
  train: Examples
  draws: Draws
  curvature: Curvature
  compute: Compute
  num_queries: int

  def scores(
    self,
    queries: QueryRows,
    kernel: Kernel,
    *,
    first_replicate: int = 0,
    partial: PartialRows | None = None,
  ) -> np.ndarray:
    """[N · G, R] scores of all rows, or [N · G, L, R] by layer.

    Args:
      queries: the R rows.
      kernel: a `ScoreKernel`, or a `LayerScoreKernel`, of their compression.
      first_replicate: from which the replicates of draws are numbered.
      partial: where products are kept and, where it has some, gone on from.
    """
    names = [layer.name for layer in self.curvature.layers]
    operands = [
      {name: (block[name], self.curvature.eigenvalues(name)) for name in names}
      for block in split_rows(queries.compressed, self.compute.query_blocks(self.num_queries))
    ]
    rows = Rows.of(self.train, self.draws.replicates)
    return map_batches(
      self.gradients,
      self.operands,
      dataclasses.replace(rows, first_draw=first_replicate),
      batch_size=self.compute.rows(self.draws),
      label="training gradients",
      unit="(example, replicate) rows",
      devices=self.compute.devices,
      then=Blocks(kernel, operands),
      partial=partial,
    )

  def check(
    self, queries: QueryRows, compression: Compression, *, num_dampings: int, replicates: int
  ) -> Sequence[dict[str, Any]]:
    """How scores correlate with uncompressed and exact ones, on a sample, for each damping.

    Args:
      queries: with some rows kept uncompressed.
      compression: of the rows.
      num_dampings, replicates: L, and A of the query draws.

    Returns:
      num_examples, num_queries, and over these queries the mean and the least of Pearson's and
      Spearman's correlations over the sampled training examples; the same in all processes, from
      the primary's queries. None for each number where the primary has no query to compare.
    """
    found = np.full((num_dampings, len(_CHECKED)), np.nan)
    if processes.is_primary() and len(queries.checked):
      exact, ours, num_examples = self._both_scores(queries, compression, replicates)
      pairs = zip(*(np.split(x, num_dampings) for x in (exact, ours)), strict=True)
      for row, pair in zip(found, pairs, strict=True):
        each = correlations(*pair) | {"num_examples": num_examples}
        row[:] = [np.nan if each[name] is None else each[name] for name in _CHECKED]
    plain = lambda name, x: None if np.isnan(x) else int(x) if "num" in name else float(x)
    return [
      {name: plain(name, x) for name, x in zip(_CHECKED, row, strict=True)}
      for row in processes.of_primary(found)
    ]

  def _both_scores(
    self, queries: QueryRows, compression: Compression, replicates: int
  ) -> tuple[np.ndarray, np.ndarray, int]:
    """[L · C, n] exact and our scores of this process's checked queries, and n."""
    restored = {
      layer.name: compression.restore(
        jax.tree.map(lambda x: x[queries.checked], queries.compressed[layer.name]),
        self.curvature.eigenvalues(layer.name),
      )
      for layer in self.curvature.layers
    }
    both = jax.tree.map(lambda *x: np.concatenate(x), queries.exact, jax.device_get(restored))
    sample = self._sample()
    exact, ours = self._sampled(self.gradients, sample, both, replicates)
    if self.exactly != self.gradients:
      exact, _ = self._sampled(self.exactly, sample, both, replicates)
    return exact, ours, len(sample.ids)

  def _sampled(
    self, gradients: Kernel, sample: Rows, both: Matrices, replicates: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """[L · C, n] for the exact rows, and for the compressed ones; means over replicates."""
    found = stream_batches(
      gradients,
      self.operands,
      sample,
      batch_size=self.compute.rows(self.draws),
      label=None,
      devices=self.compute.devices,
      span=(0, len(sample)),
      then=Blocks(PlainProducts(), [both]),
    )
    products, both_rows = np.concatenate(list(found)), next(iter(both.values()))
    split = products.reshape(len(sample.ids), -1, 2, len(both_rows) // 2 // replicates, replicates)
    exact, compressed = np.transpose(split.mean(axis=(1, 4)), (1, 2, 0))
    return exact, compressed

  def _sample(self) -> Rows:
    """Random training examples, at least a batch of rows, so that nothing compiles anew."""
    replicates = self.draws.replicates or 1
    a_batch = -(-self.compute.rows(self.draws) // replicates)
    num = min(len(self.train), max(_SAMPLE, a_batch))
    order = np.random.default_rng(self.draws.seed).permutation(len(self.train))
    chosen = np.sort(order[:num])
    return Rows(
      read_rows(self.train.data, chosen),
      self.train.numbers[chosen],
      replicates,
      jax.tree.map(lambda x: read_rows(x, chosen), self.train.conditioning),
    )


def correlations(exact: np.ndarray, others: np.ndarray) -> dict[str, Any]:
  """How scores [C, n] correlate with exact ones, row by row: means and least over the C rows."""
  kept = [i for i, scores in enumerate(exact) if np.ptp(scores)]  # others say nothing of order
  summary: dict[str, Any] = {"num_queries": len(exact)}
  for name, correlation in (("pearson", pearson), ("spearman", spearman)):
    values = correlation(exact[kept], others[kept]) if kept else np.array([])
    summary[name] = float(values.mean()) if kept else None
    summary[f"least_{name}"] = float(values.min()) if kept else None
  return summary


def split_rows(tree: Mapping[str, PyTree], num: int) -> list[Mapping[str, PyTree]]:
  """Rows [R, …] of a pytree in `num` consecutive parts of about equal size, none of them empty."""
  total = len(jax.tree.leaves(tree)[0])
  num = min(num, total)
  ends = [round(i * total / num) for i in range(num + 1)]
  cut = lambda begin, end: jax.tree.map(lambda x: x[begin:end], tree)
  return [cut(begin, end) for begin, end in itertools.pairwise(ends)]
