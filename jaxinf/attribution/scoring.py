"""The score pass: training gradients stream past the rows of queries, and are never kept.

Scores of (training example, group of draws) rows for R query rows, [N · G, R]; and what they say
when nothing is compressed or rounded, on a sample of the training examples.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxinf import engine
from jaxinf.attribution.kernels import TRAIN, gradient_operands, inner_products, score_kernel
from jaxinf.attribution.queries import QueryRows, eigenvalues_of
from jaxinf.compression.compression import Compression
from jaxinf.core.types import Array, Matrices, Params, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.engine import processes

_SAMPLE = 32  # training examples whose scores are computed both ways, or a batch of rows


@dataclasses.dataclass(frozen=True)
class ScorePass:
  """What streams, and how.

  Attributes:
    gradients: the kernel of training gradients.
    exactly: the same in the network's own precision, for the check.
    params: their parameters.
    rows: (training example, group of draws) rows.
    batch_size: rows at a time over all local devices.
    devices: local devices; all of them where None.
    query_blocks: parts of the query rows, of which one is on the devices at a time.
  """

  gradients: engine.Kernel
  exactly: engine.Kernel
  params: Params
  rows: engine.Rows
  batch_size: int
  devices: Sequence[jax.Device] | None
  query_blocks: int = 1

  def scores(
    self,
    queries: QueryRows,
    curvature: Curvature,
    compression: Compression,
    *,
    first_group: int = 0,
    partial: engine.PartialRows | None = None,
  ) -> np.ndarray:
    """[N · G, R] scores of all rows, whose groups of draws are numbered from `first_group`."""
    operands = [
      {
        layer.name: (block[layer.name], eigenvalues_of(curvature, layer.name))
        for layer in curvature.layers
      }
      for block in split_rows(queries.compressed, self.query_blocks)
    ]
    return engine.map_batches(
      self.gradients, gradient_operands(self.params, TRAIN),
      dataclasses.replace(self.rows, first_draw=first_group), batch_size=self.batch_size,
      label="training gradients", unit="(image, group) rows", devices=self.devices,
      then=engine.Blocks(score_kernel(compression), operands), partial=partial,
    )  # fmt: skip

  def check(
    self,
    queries: QueryRows,
    curvature: Curvature,
    compression: Compression,
    *,
    num_dampings: int,
    query_groups: int,
    seed: int,
  ) -> Sequence[dict[str, Any] | None]:
    """How scores correlate with uncompressed and exact ones, on a sample, for each damping.

    Returns num_examples, num_queries, and over these queries the mean and the least of Pearson's
    and Spearman's correlations over the sampled training examples; None for each damping where
    there is nothing to compare: in processes that are not the primary, or with too few queries.
    """
    if not processes.is_primary() or not len(queries.checked):
      return [None] * num_dampings
    rows = self._sample(seed)
    restored = {
      layer.name: compression.restore(
        jax.tree.map(lambda x: x[queries.checked], queries.compressed[layer.name]),
        eigenvalues_of(curvature, layer.name),
      )
      for layer in curvature.layers
    }
    both = jax.tree.map(lambda *x: np.concatenate(x), queries.exact, jax.device_get(restored))

    def scores(gradients: engine.Kernel) -> list[np.ndarray]:
      """[L · C, n] for the exact rows, and for the compressed ones; means over groups of draws."""
      found = engine.stream_batches(
        gradients, gradient_operands(self.params, TRAIN), rows, batch_size=self.batch_size,
        label=None, devices=self.devices, span=(0, len(rows)),
        then=engine.Blocks(_plain_products, [both]),
      )  # fmt: skip
      products = np.concatenate(list(found))
      split = products.reshape(
        len(rows.ids), -1, 2, len(queries.checked) // query_groups, query_groups
      )
      exact, compressed = np.transpose(split.mean(axis=(1, 4)), (1, 2, 0))
      return [exact, compressed]

    exact, ours = scores(self.gradients)
    if self.exactly is not self.gradients:
      exact, _ = scores(self.exactly)
    split = (np.split(found, num_dampings) for found in (exact, ours))
    return [
      correlations(*pair) | {"num_examples": len(rows.ids)} for pair in zip(*split, strict=True)
    ]

  def _sample(self, seed: int) -> engine.Rows:
    """Random training examples, at least a batch of rows, so that nothing compiles anew."""
    num = min(len(self.rows.ids), max(_SAMPLE, -(-self.batch_size // (self.rows.draws or 1))))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(self.rows.ids))[:num])
    take = lambda x: x[chosen]
    return dataclasses.replace(
      self.rows, images=take(self.rows.images), ids=take(self.rows.ids),
      conditioning=jax.tree.map(take, self.rows.conditioning),
    )  # fmt: skip


def correlations(exact: np.ndarray, others: np.ndarray) -> dict[str, Any]:
  """How scores [C, n] correlate with exact ones, row by row: means and least over the C rows."""
  pairs = [pair for pair in zip(exact, others, strict=True) if np.ptp(pair[0]) and np.ptp(pair[1])]
  found = {
    "pearson": [float(np.corrcoef(*pair)[0, 1]) for pair in pairs],
    "spearman": [float(stats.spearmanr(*pair).statistic) for pair in pairs],
  }
  summary: dict[str, Any] = {"num_queries": len(exact)}
  for name, values in found.items():
    summary[name] = float(np.mean(values)) if values else None
    summary[f"least_{name}"] = min(values, default=None)
  return summary


def split_rows(tree: Mapping[str, PyTree], num: int) -> list[Mapping[str, PyTree]]:
  """Rows [R, …] of a pytree in `num` consecutive parts of about equal size, none of them empty."""
  total = len(jax.tree.leaves(tree)[0])
  num = min(num, total)
  ends = [round(i * total / num) for i in range(num + 1)]
  cut = lambda begin, end: jax.tree.map(lambda x: x[begin:end], tree)
  return [cut(begin, end) for begin, end in itertools.pairwise(ends)]


def _plain_products(rows: Matrices, grads: Matrices) -> Array:
  return inner_products(grads, jax.tree.map(jnp.asarray, rows))
