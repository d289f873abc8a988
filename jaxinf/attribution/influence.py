"""Influence of training examples on queries (paper, Eq. 4 and Algorithm 1).

scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Query gradients are computed once, preconditioned once a
damping and quantised; the training gradients stream past them in blocks of examples, all queries
and dampings at once, and are never kept.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import overload

import jax
import numpy as np

from jaxinf import parallel
from jaxinf.attribution.kernels import DrawGroups, gradient_kernel, score_kernel
from jaxinf.attribution.queries import compressed_queries
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import checked_damping
from jaxinf.curvature.registration import register
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.task import Task, checked_conditioning, checked_ids, checked_images
from jaxinf.gradients.per_example import checked_draws, default_groups
from jaxinf.gradients.quantise import COMPRESSIONS
from jaxinf.random import example_numbers
from jaxinf.types import Array, PyTree, Scores


# fmt: off
@overload
def influence(
  task: Task, curvature: Curvature, queries: Array, train_images: Array, *,
  damping: float, draws: int, seed: int, measurement: str = ...,
  query_ids: np.ndarray | None = ..., train_ids: np.ndarray | None = ...,
  query_conditioning: PyTree = ..., train_conditioning: PyTree = ...,
  draw_groups: int | None = ..., compression: str | None = ..., batch_size: int = ...,
  devices: Sequence[jax.Device] | None = ...,
) -> Scores: ...
@overload
def influence(
  task: Task, curvature: Curvature, queries: Array, train_images: Array, *,
  damping: Sequence[float], draws: int, seed: int, measurement: str = ...,
  query_ids: np.ndarray | None = ..., train_ids: np.ndarray | None = ...,
  query_conditioning: PyTree = ..., train_conditioning: PyTree = ...,
  draw_groups: int | None = ..., compression: str | None = ..., batch_size: int = ...,
  devices: Sequence[jax.Device] | None = ...,
) -> tuple[Scores, ...]: ...
# fmt: on
def influence(
  task: Task,
  curvature: Curvature,
  queries: Array,
  train_images: Array,
  *,
  damping: float | Sequence[float],
  draws: int,
  seed: int,
  measurement: str = "loss",
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  query_conditioning: PyTree = None,
  train_conditioning: PyTree = None,
  draw_groups: int | None = None,
  compression: str | None = "int8",
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
) -> Scores | tuple[Scores, ...]:
  """Scores every training image for every query.

  Args:
    task: the model.
    curvature: fitted at the task's parameters.
    queries: [Q, H, W, C] images to explain, float32 in [-1, 1] or uint8.
    train_images: [N, H, W, C], likewise.
    damping: λ > 0, in the units of the curvature (squared gradient of the pixel-mean loss); or
      several of them, all scored in one pass over the training gradients. Each takes as much
      memory for the preconditioned query gradients as one.
    draws: draws of (t, ε) for each image, for training losses and for queries.
    seed: of the draws.
    measurement: what is measured of a query; see jaxinf.diffusion.measurements.
    query_ids, train_ids: stable ids, which the random keys follow; row numbers where None.
    query_conditioning, train_conditioning: what a conditional model is given with each image, such
      as labels: pytrees of arrays [Q, …] and [N, …] of one form; None where it has no such inputs.
    draw_groups: groups the training draws are split into, for standard errors; divides draws. None:
      the largest divisor of draws up to 5.
    compression: "int8" or None (float32), of the preconditioned query gradients.
    batch_size: (image, draw) pairs at a time over all devices; at least one group of draws on each
      goes through at once, so that more groups need less memory.
    devices: local devices; all of them where None.

  Returns:
    Scores with values [Q, N]; positive: the training image supports the query. A tuple of them, in
    the order of the dampings, where these are a sequence.

  Raises:
    ValueError: the arguments don't fit together, or scores are not finite.
  """
  dampings = _checked_dampings(damping)
  query = _examples(queries, query_ids, query_conditioning, "query")
  train = _examples(train_images, train_ids, train_conditioning, "train")
  measured = measurement_named(measurement)
  if draw_groups is None:
    draw_groups = default_groups(draws)
  checked_draws(draws, draw_groups)
  if compression not in COMPRESSIONS:
    raise ValueError(f"Unknown compression {compression!r}; there are: {list(COMPRESSIONS)}.")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
  _check_alike(query, train)
  image_shape = train.images.shape[1:]
  task.check_images(image_shape, train.conditioning)
  _check_curvature(task, curvature, train)
  compress, restore = COMPRESSIONS[compression]
  model = register(
    task.apply_fn,
    task.params,
    image_shape,
    curvature.selection,
    conditioning=train.conditioning,
  )
  if model.layers != curvature.layers:
    raise ValueError("The curvature has other layers than the task's model: fit it for this task.")
  groups = DrawGroups(seed=seed, num=draw_groups, size=draws // draw_groups)
  num_rows = max(1, batch_size // groups.size)
  drive = functools.partial(parallel.map_batches, batch_size=num_rows, devices=devices)
  grads = drive(
    gradient_kernel(model, measured, task.schedule, groups), task.params, query.rows(),
    label="query gradients", unit="queries",
  )  # fmt: skip
  with jax.default_device(devices[0] if devices else None):
    preconditioned = compressed_queries(
      curvature, grads, dampings=dampings, compress=compress, num_rows=num_rows
    )
  del grads  # as large as the preconditioned ones or larger
  products = drive(
    score_kernel(model, task.schedule, groups, restore), (task.params, preconditioned),
    train.rows(draw_groups), label="training gradients", unit=f"groups of {groups.size} draws",
  )  # fmt: skip
  if not np.isfinite(products).all():
    raise ValueError(
      "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
      "for these images at every timestep, or raise the damping."
    )
  settings = {f"curvature_{name}": value for name, value in curvature.settings.items()} | dict(
    measurement=measurement, draws=draws, draw_groups=draw_groups, compression=compression,
    seed=seed,
  )  # fmt: skip
  split = products.reshape(len(train.ids), draw_groups, len(dampings), len(query.ids))
  scores = tuple(
    Scores(np.transpose(part, (1, 2, 0)), query.ids, train.ids, settings | {"damping": value})
    for value, part in zip(dampings, np.moveaxis(split, 2, 0), strict=True)
  )
  return scores[0] if np.ndim(damping) == 0 else scores


@dataclasses.dataclass(frozen=True)
class _Examples:
  """Queries or training examples: images [n, H, W, C], ids [n], conditioning [n, …] or None."""

  images: np.ndarray
  ids: np.ndarray
  conditioning: PyTree

  def rows(self, draws: int | None = None) -> parallel.Rows:
    return parallel.Rows(self.images, example_numbers(self.ids), draws, self.conditioning)


def _examples(images: Array, ids: np.ndarray | None, conditioning: PyTree, name: str) -> _Examples:
  images = checked_images(images)
  ids = checked_ids(ids, len(images), f"{name}_ids")
  conditioning = checked_conditioning(conditioning, len(images), f"{name}_conditioning")
  return _Examples(images, ids, conditioning)


def _checked_dampings(damping: float | Sequence[float]) -> tuple[float, ...]:
  """The dampings as floats; ValueError unless there are any, all positive and different."""
  if np.ndim(damping) > 1 or not np.size(damping):
    raise ValueError(f"damping must be a number or a non-empty sequence of them; got {damping}.")
  dampings = tuple(map(float, np.atleast_1d(damping)))
  for value in dampings:
    checked_damping(value)
  if len(set(dampings)) < len(dampings):
    raise ValueError(f"Each damping must be given once; got {list(dampings)}.")
  return dampings


def _check_alike(query: _Examples, train: _Examples) -> None:
  """Raises ValueError unless queries and training examples are inputs of the same network."""
  if query.images.shape[1:] != train.images.shape[1:]:
    raise ValueError(
      f"Queries of shape {query.images.shape[1:]} do not match training images of shape "
      f"{train.images.shape[1:]}."
    )
  ours, theirs = (
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples.conditioning)
    for examples in (query, train)
  )
  if ours != theirs:
    raise ValueError(
      "query_conditioning and train_conditioning must be None or pytrees of one form, the same in "
      f"shape and type of every row; got rows {ours} and {theirs}."
    )


def _check_curvature(task: Task, curvature: Curvature, train: _Examples) -> None:
  """Raises ValueError unless the curvature is one of this task and such training examples."""
  for what in ("params", "schedule"):
    ours, theirs = getattr(task, what), getattr(curvature.task, what)
    pairs = itertools.zip_longest(*map(jax.tree.leaves_with_path, (ours, theirs)))
    if not all(a and b and a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs):
      raise ValueError(
        f"The curvature was fitted for other {what} than the task's: fit it for this task."
      )
  if curvature.settings["conditional"] != (train.conditioning is not None):
    raise ValueError(
      "The curvature was fitted with conditioning, or the training images have it: one of both."
    )
  if curvature.task.apply_fn is not task.apply_fn:
    try:
      curvature.task.check_images(train.images.shape[1:], train.conditioning)
    except ValueError as error:
      raise ValueError(
        f"The curvature was fitted for a model with other inputs than the task's: {error}"
      ) from error
