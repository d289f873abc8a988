"""Influence of training examples on queries (paper, Eq. 4 and Algorithm 1).

scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Query gradients are computed once, preconditioned and
quantised; the training gradients stream past them in blocks of examples, all queries at once, and
are never kept.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import parallel
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.curvature.fit import Curvature, checked_damping
from jaxinf.curvature.registration import Registration, register
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.task import Task, checked_ids, checked_images
from jaxinf.gradients.per_example import (
  checked_draws,
  default_groups,
  example_gradients,
  group_keys,
)
from jaxinf.gradients.quantise import COMPRESSIONS
from jaxinf.random import example_numbers, fold_in_each, stream
from jaxinf.types import Array, Batch, Matrices, PyTree, Scores


def influence(
  task: Task,
  curvature: Curvature,
  queries: Array,
  train_images: Array,
  *,
  damping: float,
  draws: int,
  seed: int,
  measurement: str = "loss",
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  draw_groups: int | None = None,
  compression: str | None = "int8",
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
) -> Scores:
  """Scores every training image for every query.

  Args:
    task: the model.
    curvature: fitted at the task's parameters.
    queries: [Q, H, W, C] images to explain, float32 in [-1, 1] or uint8.
    train_images: [N, H, W, C], likewise.
    damping: λ > 0, in the units of the curvature (squared gradient of the pixel-mean loss).
    draws: draws of (t, ε) for each image, for training losses and for queries.
    seed: of the draws.
    measurement: what is measured of a query; see jaxinf.diffusion.measurements.
    query_ids, train_ids: stable ids, which the random keys follow; row numbers where None.
    draw_groups: groups the training draws are split into, for standard errors; divides draws. None:
      the largest divisor of draws up to 5.
    compression: "int8" or None (float32), of the preconditioned query gradients.
    batch_size: (image, draw) pairs at a time over all devices; at least one group of draws on each
      goes through at once, so that more groups need less memory.
    devices: local devices; all of them where None.

  Returns:
    Scores with values [Q, N]; positive: the training image supports the query.
  """
  queries, train_images = checked_images(queries), checked_images(train_images)
  query_ids = checked_ids(query_ids, len(queries), "query_ids")
  train_ids = checked_ids(train_ids, len(train_images), "train_ids")
  measured = measurement_named(measurement)
  checked_damping(damping)
  if draw_groups is None:
    draw_groups = default_groups(draws)
  checked_draws(draws, draw_groups)
  if compression not in COMPRESSIONS:
    raise ValueError(f"Unknown compression {compression!r}; there are: {list(COMPRESSIONS)}.")
  if queries.shape[1:] != train_images.shape[1:]:
    raise ValueError(
      f"Queries of shape {queries.shape[1:]} do not match training images of shape "
      f"{train_images.shape[1:]}."
    )
  task.check_images(train_images.shape[1:])
  _check_curvature(task, curvature)
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
  compress, restore = COMPRESSIONS[compression]
  skip = curvature.settings["skip"]
  model = register(task.apply_fn, task.params, train_images.shape[1:], skip)
  groups = DrawGroups(seed=seed, num=draw_groups, size=draws // draw_groups)
  drive = functools.partial(
    parallel.map_batches, batch_size=max(1, batch_size // groups.size), devices=devices
  )
  preconditioned = drive(
    query_kernel(model, measured, task.schedule, groups, damping, compress),
    (task.params, curvature.bases), parallel.Rows(queries, example_numbers(query_ids)),
    label="query gradients", unit="queries",
  )  # fmt: skip
  products = drive(
    score_kernel(model, task.schedule, groups, restore), (task.params, preconditioned),
    parallel.Rows(train_images, example_numbers(train_ids), draw_groups),
    label="training gradients", unit=f"groups of {groups.size} draws",
  )  # fmt: skip
  if not np.isfinite(products).all():
    raise ValueError(
      "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
      "for these images at every timestep, or raise the damping."
    )
  settings = {f"curvature_{name}": value for name, value in curvature.settings.items()} | dict(
    measurement=measurement, damping=damping, draws=draws, draw_groups=draw_groups,
    compression=compression, seed=seed,
  )  # fmt: skip
  grouped = products.reshape(len(train_images), draw_groups, len(queries))
  return Scores(np.transpose(grouped, (1, 2, 0)), query_ids, train_ids, settings)


@dataclasses.dataclass(frozen=True)
class DrawGroups:
  """How the draws of each example are made: `num` groups of `size` draws from `seed`."""

  seed: int
  num: int
  size: int


def query_kernel(
  model: Registration,
  measurement: Measurement,
  schedule: Schedule,
  groups: DrawGroups,
  damping: float,
  compress: Callable,
) -> parallel.Kernel:
  """Kernel from queries to their compressed (H + λI)⁻¹ ∇m, averaged over all groups of draws."""

  def kernel(operands, batch: Batch) -> PyTree:
    params, bases = operands
    keys = fold_in_each(stream(groups.seed, "query_gradients"), batch.ids)

    def add_group(total, group):
      grads = example_gradients(
        model, measurement, schedule, params, images=batch.images,
        keys=group_keys(keys, jnp.full(keys.shape, group), groups.size),
      )  # fmt: skip
      return jax.tree.map(jnp.add, total, grads), None

    zeros = {layer.name: jnp.zeros((len(batch.ids), *layer.matrix_shape)) for layer in model.layers}
    total, _ = jax.lax.scan(add_group, zeros, jnp.arange(groups.num))
    with jax.default_matmul_precision("highest"):
      return {
        name: compress(flat(precondition(grad / groups.num, bases[name], damping)))
        for name, grad in total.items()
      }

  return kernel


def score_kernel(
  model: Registration, schedule: Schedule, groups: DrawGroups, restore: Callable
) -> parallel.Kernel:
  """Kernel from (training example, group of draws) rows to scores [B, Q] for all queries."""

  def kernel(operands, batch: Batch) -> jax.Array:
    params, preconditioned = operands
    keys = fold_in_each(stream(groups.seed, "train_gradients"), batch.ids)
    grads = example_gradients(
      model, LOSS, schedule, params, images=batch.images,
      keys=group_keys(keys, batch.draws, groups.size),
    )  # fmt: skip
    return inner_products(grads, {name: restore(q) for name, q in preconditioned.items()})

  return kernel


def inner_products(grads: Matrices, queries: dict[str, jax.Array]) -> jax.Array:
  """Σ over layers of inner products of grads [B, d_out, d_in] and queries [Q, P]: [B, Q]."""
  with jax.default_matmul_precision("highest"):
    products = [flat(grad) @ queries[name].T for name, grad in grads.items()]
  return jnp.sum(jnp.stack(products), axis=0)


def flat(matrices: jax.Array) -> jax.Array:
  """[B, d_out, d_in] → [B, P]."""
  return matrices.reshape(len(matrices), -1)


def _check_curvature(task: Task, curvature: Curvature) -> None:
  """Raises ValueError unless the curvature is one of this task."""
  for what in ("params", "schedule"):
    ours, theirs = getattr(task, what), getattr(curvature.task, what)
    pairs = itertools.zip_longest(*map(jax.tree.leaves_with_path, (ours, theirs)))
    if not all(a and b and a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs):
      raise ValueError(
        f"The curvature was fitted for other {what} than the task's: fit it for this task."
      )
