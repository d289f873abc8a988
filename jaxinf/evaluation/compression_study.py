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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  DrawGroups,
  gradient_kernel,
  gradient_operands,
  inner_products,
)
from jaxinf.attribution.queries import eigenvalues_of, gradient_batches, query_rows
from jaxinf.compression.compression import Compression, Uncompressed
from jaxinf.core.random import example_numbers
from jaxinf.core.types import Array, Eigenbasis, Matrices
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import checked_damping, from_eigenbasis, to_eigenbasis
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.model import Task, checked_ids, checked_images
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine import Blocks, Rows, map_batches
from jaxinf.layers.register import register

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
  task: Task,
  curvature: Curvature,
  train_images: Array,
  queries: Array,
  *,
  damping: float,
  draws: int,
  seed: int,
  variants: Mapping[str, Compression],
  train_ids: np.ndarray | None = None,
  query_ids: np.ndarray | None = None,
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
) -> CompressionStudy:
  """Compares compressions of query gradients by the scores they give.

  The host keeps the restored rows of all variants, V · Q times the parameters in float32; the
  devices one variant's at a time, and V + 1 batches of training gradients.

  Args:
    task: the model.
    curvature: fitted for it, in eigenbases.
    train_images: [N, H, W, C] that are scored; a few hundred.
    queries: [Q, H, W, C]; a few.
    damping: λ > 0.
    draws: of (t, ε) for each query and each training image.
    seed: of the draws.
    variants: name → compression.
    train_ids, query_ids: stable ids; row numbers where None.
    batch_size: (image, draw) pairs at a time over all devices.
    devices: local devices; all of them where None.

  Raises:
    ValueError: the arguments don't fit together, or scores are not finite.
  """
  checked_damping(damping)
  train_images, queries = checked_images(train_images), checked_images(queries)
  train = Rows(
    train_images, example_numbers(checked_ids(train_ids, len(train_images), "train_ids")), draws=1
  )
  asked = Rows(queries, example_numbers(checked_ids(query_ids, len(queries), "query_ids")), draws=1)
  _check(task, curvature, train, asked, draws=draws, variants=variants)
  model = register(task.apply_fn, task.params, train_images.shape[1:], curvature.selection)
  kernel = gradient_kernel(model, LOSS, task.schedule, DrawGroups(seed, draws, DrawDesign()))
  images_at_once = max(1, batch_size // draws)

  # 1. The rows of queries as they are, and as every variant gives them back.
  with jax.default_device(devices[0] if devices else None):
    exact = query_rows(
      curvature,
      gradient_batches(
        kernel, gradient_operands(task.params, QUERY), asked,
        batch_size=images_at_once, devices=devices,
      ),
      num_rows=len(queries), dampings=[damping], compression=Uncompressed(),
    ).compressed  # fmt: skip
    restored = []
    for name, compression in variants.items():
      _LOG.info("compression study: %s", name)
      restored.append(_round_trip(compression, exact, curvature))

  # 2. Training gradients, past all of them.
  products = map_batches(
    kernel, gradient_operands(task.params, TRAIN), train, label="training gradients",
    batch_size=images_at_once, devices=devices,
    then=Blocks(lambda rows, grads: inner_products(grads, rows), [exact, *restored]),
  )  # fmt: skip
  if not np.isfinite(products).all():
    raise ValueError(
      "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
      "for these images at every timestep, or raise the damping."
    )
  reference, *others = products.T.astype(np.float64).reshape(-1, len(queries), len(train_images))
  pearson = np.stack([_pearson(reference, scores) for scores in others])
  ranks = lambda scores: rankdata(scores, axis=-1)
  spearman = np.stack([_pearson(ranks(reference), ranks(scores)) for scores in others])
  shapes = [rows.shape[1:] for rows in exact.values()]
  num_bytes = lambda compression: sum(map(compression.num_bytes, shapes))
  return CompressionStudy(
    names=tuple(variants),
    sizes=np.array([num_bytes(c) / num_bytes(Uncompressed()) for c in variants.values()]),
    errors=np.stack([_relative_errors(rows, exact) for rows in restored]),
    pearson=pearson,
    spearman=spearman,
    settings=dict(
      num_images=len(train_images), num_queries=len(queries), damping=damping, draws=draws,
      seed=seed, num_parameters=sum(map(math.prod, shapes)),
      curvature=curvature.settings["method"],
    ),
  )  # fmt: skip


def _check(
  task: Task,
  curvature: Curvature,
  train: Rows,
  asked: Rows,
  *,
  draws: int,
  variants: Mapping[str, Compression],
) -> None:
  """Raises ValueError unless the arguments of a study fit together."""
  if curvature.exact is not None:
    raise ValueError(
      "The study needs a curvature in eigenbases, not the exact one (method 'cg'): pass its "
      ".approximation, or fit one with the method ekfac or kfac."
    )
  if curvature.task is not task:
    raise ValueError("The curvature was fitted for another task: fit it for this one.")
  if not variants or draws < 1 or len(train) < 2 or len(asked) < 1:
    raise ValueError(
      "The study needs at least one variant, one draw, one query and two training images; got "
      f"{len(variants)}, {draws}, {len(asked)} and {len(train)}."
    )
  assert train.images is not None and asked.images is not None
  shapes = train.images.shape[1:], asked.images.shape[1:]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"Queries of shape {shapes[1]} do not match training images of shape {shapes[0]}."
    )
  task.check_images(shapes[0])


def _round_trip(compression: Compression, rows: Matrices, curvature: Curvature) -> Matrices:
  """Layer name → rows [Q, …, d_out, d_in] compressed and restored, on the host."""
  # Two programs: in one, XLA may leave out what rounds, such as float32 → bfloat16 → float32.
  compress, restore = jax.jit(compression.compress), jax.jit(compression.restore)
  found = {}
  for name, matrices in rows.items():
    eigenvalues, basis = eigenvalues_of(curvature, name), curvature.bases[name]
    if compression.in_eigenbasis:
      matrices = _to_eigenbasis(matrices, basis)
    matrices = restore(compress(matrices, eigenvalues), eigenvalues)
    if compression.in_eigenbasis:
      matrices = _from_eigenbasis(matrices, basis)
    found[name] = np.asarray(matrices)
  return found


@jax.jit
def _to_eigenbasis(rows: Array, basis: Eigenbasis) -> Array:
  with jax.default_matmul_precision("highest"):
    return to_eigenbasis(rows, basis)


@jax.jit
def _from_eigenbasis(rows: Array, basis: Eigenbasis) -> Array:
  with jax.default_matmul_precision("highest"):
    return from_eigenbasis(rows, basis)


def _relative_errors(rows: Matrices, exact: Matrices) -> np.ndarray:
  """[Q] ‖v̂ − v‖ / ‖v‖ over all layers."""
  squares = lambda x: np.square(x, dtype=np.float64).reshape(len(x), -1).sum(axis=1)
  wrong = sum(squares(rows[name] - exact[name]) for name in exact)
  return np.sqrt(wrong / sum(squares(x) for x in exact.values()))


def _pearson(exact: np.ndarray, others: np.ndarray) -> np.ndarray:
  """[Q] correlations of numbers [Q, N] with others [Q, N], row by row."""
  centred = [x - x.mean(axis=-1, keepdims=True) for x in (exact, others)]
  norms = np.prod([np.linalg.norm(x, axis=-1) for x in centred], axis=0)
  with np.errstate(invalid="ignore"):
    return np.prod(centred, axis=0).sum(axis=-1) / norms


def _cell(text: str) -> str:
  return f"{text:>16}"
