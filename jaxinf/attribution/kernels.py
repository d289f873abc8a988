"""The kernels of attribution: gradients of (image, group of draws) rows, and inner products.

Each gradient is that of a measurement averaged over the draws of one group. Groups are rows of
their own, from whose spread the noise of the draws is known. Where the design has flips, they are
draws as well: those of training images, never of queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxinf import engine
from jaxinf.compression.compression import Compression
from jaxinf.core.random import fold_in_each, stream_number, stream_of
from jaxinf.core.types import Array, Batch, Matrices, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.schedule import Schedule
from jaxinf.layers.per_example import example_gradients, group_keys
from jaxinf.layers.register import Registration

# Names of the streams of draws: those of queries and of training examples are independent.
QUERY, TRAIN = "query_gradients", "train_gradients"


@dataclasses.dataclass(frozen=True)
class DrawGroups:
  """Groups of `size` draws from `seed`, made by `design`."""

  seed: int
  size: int
  design: DrawDesign


def gradient_kernel(
  model: Registration, measurement: Measurement, schedule: Schedule, groups: DrawGroups
) -> engine.Kernel:
  """Kernel from (image, group) rows to gradients, layer name → [B, …, d_out, d_in].

  Its operands are those of `gradient_operands`.
  """

  def kernel(operands: PyTree, batch: Batch) -> Matrices:
    params, number = operands
    return example_gradients(
      model, measurement, schedule, params, images=batch.images,
      keys=row_keys(groups, number, batch), conditioning=batch.conditioning, design=groups.design,
    )  # fmt: skip

  return kernel


def row_keys(groups: DrawGroups, number: Array, batch: Batch) -> jax.Array:
  """Keys [B, S] of the draws of (image, group) rows, from the stream of that number."""
  keys = fold_in_each(stream_of(groups.seed, number), groups.design.numbers(batch.ids))
  return group_keys(keys, batch.draws, groups.size)


def gradient_operands(params: Params, stream_name: str) -> PyTree:
  """Operands of a gradient kernel; the stream is one, so that both streams share a program."""
  return params, jnp.uint32(stream_number(stream_name))


@functools.lru_cache(maxsize=8)  # so that it compiles once, however many rounds there are
def score_kernel(compression: Compression) -> engine.Kernel:
  """Kernel from gradients to their inner products [B, R] with R compressed rows of each layer.

  Its operands are, for each layer, (compressed rows, Λ).
  """

  def kernel(rows: dict[str, tuple[PyTree, Array]], grads: Matrices) -> jax.Array:
    return inner_products(grads, {name: compression.restore(*rows[name]) for name in grads})

  return kernel


def inner_products(grads: Matrices, rows: Matrices) -> jax.Array:
  """Σ over layers of inner products of grads [B, …, d_out, d_in] and rows [R, …, d_out, d_in]."""
  with jax.default_matmul_precision("highest"):
    products = [flat(grad) @ flat(rows[name]).T for name, grad in grads.items()]
  return jnp.sum(jnp.stack(products), axis=0)


def flat(matrices: jax.Array) -> jax.Array:
  """[B, …, d_out, d_in] → [B, P]."""
  return matrices.reshape(len(matrices), -1)
