"""Journey-TRAK: which training images steer the way to a sample, at chosen timesteps of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.attribution.examples import checked_states
from jaxinf.attribution.trak import trak
from jaxinf.core.types import ApplyFn, Array, Batch, Params, PyTree
from jaxinf.diffusion.measurements import journey_loss
from jaxinf.diffusion.model import Task, checked_conditioning
from jaxinf.diffusion.objective import Noised, predict
from jaxinf.diffusion.schedule import Schedule
from jaxinf.scores.scores import Scores


def journey_trak(
  task: Task, trajectories: Array, train_images: Array, *, timesteps: Sequence[int], **settings: Any
) -> Scores | tuple[Scores, ...]:
  """Journey-TRAK: `trak` of the loss at chosen steps of the way to each query.

  What is measured at a timestep t of the way is the loss there, at that t, of the clean image x̂_0
  that the model predicted; several timesteps are averaged.

  Reference: Georgiev et al. 2023, "The journey, not the destination" (arXiv:2312.06205).

  Args:
    task: the model.
    trajectories: [Q, T + 1, H, W, C] float32 states from x_T to the image, one a timestep of the
      schedule. (The sampler's have the steps first: np.moveaxis(trajectory, 0, 1).)
    train_images: as for `trak`.
    timesteps: K of them in [0, T).
    settings: the other arguments of `trak` but `measurement`.
  """
  shared = {name: settings[name] for name in ("batch_size", "devices") if name in settings}
  images = predicted_images(
    task, trajectories, timesteps, conditioning=settings.get("query_conditioning"), **shared
  )
  return trak(task, images, train_images, measurement=journey_loss(timesteps), **settings)


def predicted_images(
  task: Task,
  trajectories: Array,
  timesteps: Sequence[int],
  *,
  conditioning: PyTree = None,
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
  """The clean images x̂_0 that the model predicts at timesteps of trajectories.

  x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t, clipped to [-1, 1] as sampling does.

  Args:
    task: the model.
    trajectories: [Q, T + 1, H, W, C] float32, from x_T to the image.
    timesteps: K of them in [0, T).
    conditioning: pytree of arrays [Q, …], or None.
    batch_size: states at a time over all devices.
    devices: local devices; all of them where None.

  Returns:
    [Q, K, H, W, C] float32.
  """
  trajectories = checked_states(trajectories)
  num, num_steps = len(trajectories), task.schedule.num_steps
  if trajectories.shape[1] != num_steps + 1:
    raise ValueError(
      f"A trajectory has a state for each of the {num_steps} timesteps and its image, "
      f"{num_steps + 1} in all; got {trajectories.shape[1]}. Sample with ddpm, or with ddim in "
      f"{num_steps} steps."
    )
  if not len(timesteps) or not all(0 <= t < num_steps for t in timesteps):
    raise ValueError(f"Timesteps must lie in [0, {num_steps}); got {list(timesteps)}.")
  conditioning = checked_conditioning(conditioning, num, "query_conditioning")

  # State i is the network's input at timestep T − 1 − i.
  states = trajectories[:, num_steps - 1 - np.asarray(timesteps)]
  each = lambda x: np.repeat(x, len(timesteps), axis=0)
  rows = engine.Rows(
    states.reshape(-1, *states.shape[2:]),
    np.tile(timesteps, num).astype(np.uint32),
    conditioning=jax.tree.map(each, conditioning),
  )
  images = engine.map_batches(
    _image_kernel(task.apply_fn, task.schedule), task.params, rows, batch_size=batch_size,
    label="predicted images", unit="states", devices=devices,
  )  # fmt: skip
  return images.reshape(states.shape)


def _image_kernel(apply_fn: ApplyFn, schedule: Schedule) -> engine.Kernel:
  """(params, states whose ids are timesteps) → x̂_0 [B, H, W, C]."""

  def kernel(params: Params, batch: Batch) -> jax.Array:
    t = batch.ids.astype(jnp.int32)
    noise = predict(apply_fn, params, Noised(batch.images, t, batch.images, batch.conditioning))
    level = lambda table: table[t][:, None, None, None]
    image = (batch.images - level(schedule.noise) * noise) / level(schedule.signal)
    return jnp.clip(image, -1, 1)

  return kernel
