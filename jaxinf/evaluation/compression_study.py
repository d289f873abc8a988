"""What compressing the query gradients costs (paper, Appendix F, Figure 6).

The preconditioned gradients v = (H + λI)⁻¹ ∇m of a few queries are compressed and restored by every
variant, v̂, and the training gradients stream past all of them once. Four numbers a variant follow:
its size, bytes of v̂ as kept ÷ bytes of v in float32; and for each query the relative error
‖v̂ − v‖ / ‖v‖, and Pearson's and the rank correlation over training examples of the scores ⟨v̂, ∇ℓ_n⟩
with ⟨v, ∇ℓ_n⟩.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  GradientKernel,
  PlainProducts,
  Replicate,
  row_operands,
)
from jaxinf.attribution.queries import gradient_batches, query_rows
from jaxinf.compression.compression import Compression, Uncompressed
from jaxinf.core.checks import checked_damping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.types import Array, Eigenbasis, Matrices
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import from_eigenbasis, to_eigenbasis
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import numerics
from jaxinf.engine.maps import Blocks, map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.register import layers_of
from jaxinf.scores.statistics import pearson, spearman

_LOG = logging.getLogger("jaxinf")


@dataclasses.dataclass(frozen=True)
class CompressionStudy:
  """What the study found for V variants and Q queries.

  Attributes:
    names: [V] of the variants.
    sizes: [V] bytes of a compressed row ÷ its bytes in float32.
    errors: [V, Q] relative errors of v̂ over all layers.
    pearson: [V, Q] correlations of scores over training examples.
    spearman: [V, Q] rank correlations, likewise; NaN, as Pearson's, where all scores are equal.
    settings: how it was made.
  """

  names: tuple[str, ...]
  sizes: np.ndarray
  errors: np.ndarray
  pearson: np.ndarray
  spearman: np.ndarray
  settings: Mapping[str, Any]

  def table(self) -> str:
    """Aligned text: size, mean error, and mean and least correlations over queries."""
    head = ("size", "‖v̂ − v‖ / ‖v‖", "Pearson", "least", "rank", "least")
    lines = [f"{'':20}" + "".join(map(_cell, head))]
    for name, size, error, *correlations in zip(
      self.names, self.sizes, self.errors, self.pearson, self.spearman, strict=True
    ):
      cells = [f"{100 * size:.3g} %", f"{error.mean():.2g}"]
      cells += [f"{number:.4f}" for c in correlations for number in (c.mean(), c.min())]
      lines.append(f"{name:20}" + "".join(map(_cell, cells)))
    return "\n".join(lines)


def compression_study(
  curvature: Curvature,
  *,
  queries: Examples,
  train: Examples,
  damping: float,
  draws: Draws,
  variants: Mapping[str, Compression],
  compute: Compute = Compute(),
) -> CompressionStudy:
  """Compares compressions of query gradients by the scores they give.

  The host keeps the restored rows of all variants, V · Q times the parameters in float32; the
  devices one variant's at a time, and V + 1 batches of training gradients.

  Args:
    curvature: in eigenbases.
    queries: a few.
    train: those that are scored; a few hundred.
    damping: λ > 0.
    draws: of (t, ε) for each query and each training example, in one replicate.
    variants: name → compression.
    compute: how.

  Raises:
    ValueError: the arguments don't fit together, or scores are not finite.
  """
  checked_damping(damping)
  check_alike(queries, train)
  _check(curvature, train, variants)
  draws = dataclasses.replace(draws, replicates=1)
  exact = _exact_rows(curvature, queries, damping, draws, compute)
  restored = []
  for name, compression in variants.items():
    _LOG.info("compression study: %s", name)
    restored.append(_round_trip(compression, exact, curvature))
  products = _products(curvature, train, [exact, *restored], draws, compute)
  reference, *others = products.T.astype(np.float64).reshape(-1, len(queries), len(train))
  shapes = [rows.shape[1:] for rows in exact.values()]
  num_bytes = lambda compression: sum(map(compression.num_bytes, shapes))
  return CompressionStudy(
    names=tuple(variants),
    sizes=np.array([num_bytes(c) / num_bytes(Uncompressed()) for c in variants.values()]),
    errors=np.stack([_relative_errors(rows, exact) for rows in restored]),
    pearson=np.stack([pearson(reference, scores) for scores in others]),
    spearman=np.stack([spearman(reference, scores) for scores in others]),
    settings={
      "num_images": len(train),
      "num_queries": len(queries),
      "damping": damping,
      "draws": draws.num,
      "seed": draws.seed,
      "num_parameters": sum(map(math.prod, shapes)),
      "curvature": curvature.kind.name,
    },
  )


def _check(curvature: Curvature, train: Examples, variants: Mapping[str, Compression]) -> None:
  """Raises ValueError unless the arguments of a study fit together."""
  if not curvature.has_eigenbasis:
    raise ValueError(
      "The study needs a curvature in eigenbases, not the exact one: pass its .approximation, or "
      "fit EKFAC or KFAC."
    )
  if not variants or len(train) < 2:
    raise ValueError(
      "The study needs at least one variant and two training examples; got "
      f"{len(variants)} and {len(train)}."
    )


def _exact_rows(
  curvature: Curvature, queries: Examples, damping: float, draws: Draws, compute: Compute
) -> Matrices:
  """Layer name → v [Q, …, d_out, d_in]."""
  return query_rows(
    curvature,
    gradient_batches(
      _gradients(curvature, queries, draws),
      row_operands(curvature.model.params, draws, QUERY),
      queries,
      draws,
      compute,
    ),
    num_rows=len(queries),
    dampings=[damping],
    compression=Uncompressed(),
  ).compressed


def _products(
  curvature: Curvature, train: Examples, blocks: list[Matrices], draws: Draws, compute: Compute
) -> np.ndarray:
  """[N, R] inner products of training gradients with the rows of all blocks."""
  products = map_batches(
    _gradients(curvature, train, draws),
    row_operands(curvature.model.params, draws, TRAIN),
    Rows.of(train, 1),
    label="training gradients",
    batch_size=compute.rows(draws),
    devices=compute.devices,
    then=Blocks(PlainProducts(), blocks),
  )
  if not np.isfinite(products).all():
    raise ValueError(
      "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
      "for these examples at every time, or raise the damping."
    )
  return products


def _gradients(curvature: Curvature, examples: Examples, draws: Draws) -> GradientKernel:
  """The kernel of such examples' gradients."""
  model = curvature.model
  layers = layers_of(model, examples, curvature.selection)
  return GradientKernel(layers, LOSS, model.process, Replicate.of(draws, examples.augmentation))


def _round_trip(compression: Compression, rows: Matrices, curvature: Curvature) -> Matrices:
  """Layer name → rows [Q, …, d_out, d_in] compressed and restored, on the host."""
  # Two programs: in one, XLA may leave out what rounds, such as float32 → bfloat16 → float32.
  compress, restore = (
    numerics()(jax.jit(function)) for function in (compression.compress, compression.restore)
  )
  found = {}
  for name, matrices in rows.items():
    eigenvalues, basis = curvature.eigenvalues(name), curvature.bases[name]
    if compression.in_eigenbasis:
      matrices = _to_eigenbasis(matrices, basis)
    matrices = restore(compress(matrices, eigenvalues), eigenvalues)
    if compression.in_eigenbasis:
      matrices = _from_eigenbasis(matrices, basis)
    found[name] = np.asarray(matrices)
  return found


@numerics()
@jax.jit
def _to_eigenbasis(rows: Array, basis: Eigenbasis) -> Array:
  with jax.default_matmul_precision("highest"):
    return to_eigenbasis(rows, basis)


@numerics()
@jax.jit
def _from_eigenbasis(rows: Array, basis: Eigenbasis) -> Array:
  with jax.default_matmul_precision("highest"):
    return from_eigenbasis(rows, basis)


def _relative_errors(rows: Matrices, exact: Matrices) -> np.ndarray:
  """[Q] ‖v̂ − v‖ / ‖v‖ over all layers."""
  squares = lambda x: np.square(x, dtype=np.float64).reshape(len(x), -1).sum(axis=1)
  wrong = sum(squares(rows[name] - exact[name]) for name in exact)
  return np.sqrt(wrong / sum(squares(x) for x in exact.values()))


def _cell(text: str) -> str:
  return f"{text:>16}"
