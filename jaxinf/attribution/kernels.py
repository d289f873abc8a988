"""The two kernels of influence: gradients of queries, and scores of training examples.

Each measurement is an average over draws of (t, ε), made in groups of draws: groups of training
draws are rows of their own, for standard errors; those of a query are averaged.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinf import parallel
from jaxinf.curvature.registration import Registration
from jaxinf.diffusion.measurements import LOSS, Measurement
from jaxinf.diffusion.schedule import Schedule
from jaxinf.gradients.per_example import example_gradients, group_keys
from jaxinf.random import fold_in_each, stream
from jaxinf.types import Batch, Matrices


@dataclasses.dataclass(frozen=True)
class DrawGroups:
  """How the draws of each example are made: `num` groups of `size` draws from `seed`."""

  seed: int
  num: int
  size: int


def gradient_kernel(
  model: Registration, measurement: Measurement, schedule: Schedule, groups: DrawGroups
) -> parallel.Kernel:
  """Kernel from queries to ∇m, layer name → [B, …, d_out, d_in], averaged over all groups of draws.

  Its operands are the parameters.
  """

  def kernel(params, batch: Batch) -> Matrices:
    keys = fold_in_each(stream(groups.seed, "query_gradients"), batch.ids)

    def add_group(total, group):
      grads = example_gradients(
        model, measurement, schedule, params, images=batch.images,
        keys=group_keys(keys, jnp.full(keys.shape, group), groups.size),
        conditioning=batch.conditioning,
      )  # fmt: skip
      return jax.tree.map(jnp.add, total, grads), None

    zeros = {layer.name: jnp.zeros((len(batch.ids), *layer.matrix_shape)) for layer in model.layers}
    total, _ = jax.lax.scan(add_group, zeros, jnp.arange(groups.num))
    return jax.tree.map(lambda grad: grad / groups.num, total)

  return kernel


def score_kernel(
  model: Registration, schedule: Schedule, groups: DrawGroups, restore: Callable
) -> parallel.Kernel:
  """Kernel from (training example, group of draws) rows to scores [B, R] for all R query rows.

  Its operands are the parameters and, layer name → R rows that `restore` turns into [R, P], the
  preconditioned query gradients.
  """

  def kernel(operands, batch: Batch) -> jax.Array:
    params, preconditioned = operands
    keys = fold_in_each(stream(groups.seed, "train_gradients"), batch.ids)
    grads = example_gradients(
      model, LOSS, schedule, params, images=batch.images,
      keys=group_keys(keys, batch.draws, groups.size), conditioning=batch.conditioning,
    )  # fmt: skip
    return inner_products(grads, {name: restore(q) for name, q in preconditioned.items()})

  return kernel


def inner_products(grads: Matrices, queries: dict[str, jax.Array]) -> jax.Array:
  """Σ over layers of inner products of grads [B, …, d_out, d_in] and queries [R, P]: [B, R]."""
  with jax.default_matmul_precision("highest"):
    products = [flat(grad) @ queries[name].T for name, grad in grads.items()]
  return jnp.sum(jnp.stack(products), axis=0)


def flat(matrices: jax.Array) -> jax.Array:
  """[B, …, d_out, d_in] → [B, P]."""
  return matrices.reshape(len(matrices), -1)
