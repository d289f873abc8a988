"""The kernels of attribution: gradients of (example, replicate) rows, and inner products.

Each gradient is that of a measurement averaged over the draws of one replicate. Replicates are rows
of their own, from whose spread the noise of the draws is known.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.compression.compression import Compression
from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.draws import Draws
from jaxinf.core.random import draw_keys, fold_in_each, stream_number, stream_of
from jaxinf.core.types import Array, Batch, Matrices, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.process import Process
from jaxinf.layers.per_example import example_gradients
from jaxinf.layers.register import Registration

# Names of the streams of draws: those of queries and of training examples are independent.
QUERY, TRAIN = "query_gradients", "train_gradients"


@dataclasses.dataclass(frozen=True)
class Replicate:
  """One replicate of draws as a kernel makes it, whatever its seed: that is an operand.

  Attributes:
    draws: of which size, design and loss_power count.
    augmentation: what each draw does to its example.
  """

  draws: Draws
  augmentation: Augmentation = PLAIN

  @classmethod
  def of(cls, draws: Draws, augmentation: Augmentation = PLAIN) -> "Replicate":
    """One of the replicates of `draws`."""
    return cls(Draws(draws.size, 1, **draws.design, loss_power=draws.power), augmentation)

  def keys(self, origin: PyTree, batch: Batch) -> jax.Array:
    """Keys [B, S] of (example, replicate) rows; `origin` is that of `row_operands`."""
    chex.assert_equal_shape([batch.ids, batch.draws])
    seed, number = origin
    keys = fold_in_each(stream_of(seed, number), self.draws.numbers(batch.ids))
    size = self.draws.num
    return jax.vmap(lambda key, n: draw_keys(key, size, first=n * size))(keys, batch.draws)


def row_operands(params: Params, draws: Draws, stream_name: str) -> PyTree:
  """Operands of a kernel of rows: parameters, and (seed, stream) where draws come from.

  They are arrays, so that all seeds and both streams share a program.
  """
  return params, (np.uint32(draws.seed), np.uint32(stream_number(stream_name)))


@dataclasses.dataclass(frozen=True)
class GradientKernel:
  """Kernel from (example, replicate) rows to gradients, layer name → [B, …, d_out, d_in].

  Its operands are those of `row_operands`.
  """

  layers: Registration
  measurement: Measurement
  process: Process
  replicate: Replicate

  def __call__(self, operands: PyTree, batch: Batch) -> Matrices:
    params, origin = operands
    return example_gradients(
      self.layers,
      self.measurement,
      self.process,
      params,
      data=batch.data,
      keys=self.replicate.keys(origin, batch),
      conditioning=batch.conditioning,
      draws=self.replicate.draws,
      augmentation=self.replicate.augmentation,
    )


@dataclasses.dataclass(frozen=True)
class ScoreKernel:
  """Kernel from gradients to their inner products [B, R] with R compressed rows of each layer.

  Its operands are, for each layer, (compressed rows, Λ).
  """

  compression: Compression

  def __call__(self, rows: dict[str, tuple[PyTree, Array]], grads: Matrices) -> jax.Array:
    return inner_products(grads, {n: self.compression.restore(*rows[n]) for n in grads})


@dataclasses.dataclass(frozen=True)
class LayerScoreKernel:
  """As `ScoreKernel`, without the sum over layers: [B, L, R].

  Attributes:
    compression: of the rows.
    layers: names of the L layers, in order.
  """

  compression: Compression
  layers: tuple[str, ...]

  def __call__(self, rows: dict[str, tuple[PyTree, Array]], grads: Matrices) -> jax.Array:
    restored = {name: self.compression.restore(*rows[name]) for name in grads}
    products = layer_products(grads, restored)
    return jnp.stack([products[name] for name in self.layers], axis=1)


@dataclasses.dataclass(frozen=True)
class PlainProducts:
  """Kernel from gradients to their inner products [B, R] with R rows as they are."""

  def __call__(self, rows: Matrices, grads: Matrices) -> jax.Array:
    return inner_products(grads, jax.tree.map(jnp.asarray, rows))


def inner_products(grads: Matrices, rows: Matrices) -> jax.Array:
  """Σ over layers of inner products of grads [B, …, d_out, d_in] and rows [R, …, d_out, d_in]."""
  return jnp.sum(jnp.stack(list(layer_products(grads, rows).values())), axis=0)


def layer_products(grads: Matrices, rows: Matrices) -> Matrices:
  """Layer name → inner products [B, R] of its grads [B, …, d_out, d_in] and rows [R, …]."""
  for name, grad in grads.items():
    chex.assert_equal_shape_suffix([grad, rows[name]], grad.ndim - 1)
  with jax.default_matmul_precision("highest"):
    return {name: flat(grad) @ flat(rows[name]).T for name, grad in grads.items()}


def replicate_products(rows: Matrices, weights: Matrices) -> jax.Array:
  """Products of an example's gradients in A replicates of draws with each other, [B, 2, A].

  With Z_ab = Σ over layers and entries of rows_a · weights · rows_b, they are Σ over b ≠ a of Z_ab,
  and Z_aa.

  Args:
    rows: layer name → [B, A, …, d_out, d_in].
    weights: layer name → [(groups,) d_out, d_in].
  """

  def products(name: str) -> jax.Array:
    chex.assert_shape(rows[name], (None, None, *weights[name].shape))
    weighted, plain = (
      x.reshape(*x.shape[:2], -1) for x in (rows[name] * weights[name], rows[name])
    )
    return jnp.einsum("bap,bcp->bac", weighted, plain)

  with jax.default_matmul_precision("highest"):
    every = jnp.sum(jnp.stack([products(name) for name in rows]), axis=0)
  apart = 1 - jnp.eye(every.shape[1], dtype=every.dtype)
  own = jnp.diagonal(every, axis1=1, axis2=2)
  return jnp.stack([jnp.sum(every * apart, axis=2), own], axis=1)


def flat(matrices: jax.Array) -> jax.Array:
  """[B, …, d_out, d_in] → [B, P]."""
  return matrices.reshape(len(matrices), -1)
