"""Queries and training examples as they come from a user: checked, and fitting together."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from jaxinf import engine
from jaxinf.core.random import example_numbers
from jaxinf.core.types import Array, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import checked_damping
from jaxinf.diffusion.measurements import LOSS, Measurement
from jaxinf.diffusion.model import Task, checked_conditioning, checked_ids, checked_images
from jaxinf.engine.artifacts import fingerprint
from jaxinf.layers.register import Registration, register


@dataclasses.dataclass(frozen=True)
class Examples:
  """Queries or training examples: images [n, H, W, C], ids [n], conditioning [n, …] or None.

  Queries of a measurement of trajectories or predictions are [n, K, H, W, C].
  """

  images: np.ndarray
  ids: np.ndarray
  conditioning: PyTree

  @property
  def image_shape(self) -> tuple[int, ...]:
    """(H, W, C)."""
    return self.images.shape[-3:]

  def rows(self, draws: int | None = None) -> engine.Rows:
    """Rows of them, `draws` for each."""
    return engine.Rows(self.images, example_numbers(self.ids), draws, self.conditioning)


def examples_of(
  images: Array,
  ids: np.ndarray | None,
  conditioning: PyTree,
  name: str,
  measurement: Measurement = LOSS,
) -> Examples:
  """Examples of a measurement whose arguments are called `name`_ids and so on in errors."""
  images = (
    checked_images(images) if measurement.of == "images" else checked_states(images, measurement.of)
  )
  ids = checked_ids(ids, len(images), f"{name}_ids")
  conditioning = checked_conditioning(conditioning, len(images), f"{name}_conditioning")
  return Examples(images, ids, conditioning)


def checked_states(states: Array, of: str = "trajectories") -> np.ndarray:
  """Several states an example as an array [N, K, H, W, C], finite float32; ValueError otherwise.

  They may leave [-1, 1], as noise does. Errors call them by `of`, what a measurement is of.
  """
  states = np.asarray(states)
  if states.ndim != 5 or not states.size or states.dtype != np.float32:
    raise ValueError(
      f"The measurement is of {of}: give a non-empty float32 array [N, K, H, W, C]; got "
      f"{states.dtype} of shape {states.shape}. {_MADE_BY[of]}"
    )
  if not np.isfinite(states).all():
    raise ValueError(f"{of.capitalize()} must be finite.")
  return states


_MADE_BY = {
  "trajectories": "(A sampler's, [K, N, H, W, C], needs np.moveaxis(trajectory, 0, 1).)",
  "predictions": "(journey.predicted_images makes them of trajectories.)",
}


def check_alike(query: Examples, train: Examples) -> None:
  """Raises ValueError unless queries and training examples are inputs of the same network."""
  if query.image_shape != train.image_shape:
    raise ValueError(
      f"Queries of shape {query.image_shape} do not match training images of shape "
      f"{train.image_shape}."
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


def check_curvature(task: Task, curvature: Curvature, train: Examples) -> None:
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
      curvature.task.check_images(train.image_shape, train.conditioning)
    except ValueError as error:
      raise ValueError(
        f"The curvature was fitted for a model with other inputs than the task's: {error}"
      ) from error


def checked_dampings(damping: float | Sequence[float]) -> tuple[float, ...]:
  """The dampings as floats; ValueError unless there are any, all positive and different."""
  if np.ndim(damping) > 1 or not np.size(damping):
    raise ValueError(f"damping must be a number or a non-empty sequence of them; got {damping}.")
  dampings = tuple(map(float, np.atleast_1d(damping)))
  for value in dampings:
    checked_damping(value)
  if len(set(dampings)) < len(dampings):
    raise ValueError(f"Each damping must be given once; got {list(dampings)}.")
  return dampings


def registered(task: Task, curvature: Curvature, examples: Examples) -> Registration:
  """The task's layers for such examples, after checking that all three belong together."""
  task.check_images(examples.image_shape, examples.conditioning)
  check_curvature(task, curvature, examples)
  model = register(
    task.apply_fn, task.params, examples.image_shape, curvature.selection,
    conditioning=examples.conditioning,
  )  # fmt: skip
  if model.layers != curvature.layers:
    raise ValueError("The curvature has other layers than the task's model: fit it for this task.")
  return model


def curvature_content(curvature: Curvature) -> str:
  """Hash of the eigenbases, and of what an exact curvature is a mean over."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(curvature.bases)]
  if curvature.exact is not None:
    leaves += [np.asarray(leaf) for leaf in curvature.exact.content]
  return fingerprint({str(i): leaf for i, leaf in enumerate(leaves)})


def content_of(task: Task, *examples: Examples) -> str:
  """Hash of everything the scores come from but curvature and the network's code."""
  trees = (task.params, task.schedule, *(part.conditioning for part in examples))
  arrays = {f"tree_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
  for i, part in enumerate(examples):
    arrays |= {f"images_{i}": part.images, f"ids_{i}": part.ids}
  return fingerprint(arrays)
