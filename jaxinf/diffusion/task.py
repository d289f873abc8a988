"""The object that is attributed: a trained diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.diffusion.schedule import Schedule
from jaxinf.types import ApplyFn, Array, Params


@dataclasses.dataclass(frozen=True, repr=False)
class Task:
  """A diffusion model whose samples are to be explained.

  Attributes:
    apply_fn: apply_fn(params, x_t [B, H, W, C], t [B] int32) → ε [B, H, W, C]: any JAX function,
      with dropout off, in float32 and not under `jit` (curvature is registered from its trace).
    params: pytree of float32 arrays; the EMA parameters where training kept them.
    schedule: the diffusion process the model was trained with.
  """

  apply_fn: ApplyFn
  params: Params
  schedule: Schedule

  def __post_init__(self):
    if not callable(self.apply_fn):
      raise ValueError(f"apply_fn must be a function (params, x_t, t) → ε; got {self.apply_fn!r}.")
    if not isinstance(self.schedule, Schedule):
      raise ValueError(
        "schedule must be a jaxinf.Schedule, such as Schedule.linear(1000, 1e-4, 0.02); "
        f"got {type(self.schedule).__name__}."
      )
    for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
      if getattr(leaf, "dtype", None) != jnp.float32:
        raise ValueError(
          f"Parameter {jax.tree_util.keystr(path)} is {getattr(leaf, 'dtype', type(leaf))}, "
          "not float32: cast with jax.tree.map(lambda x: x.astype('float32'), params)."
        )

  def __repr__(self) -> str:
    num = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return f"Task({num:,} parameters, {self.schedule.num_steps} timesteps)"

  def check_images(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the model maps images [B, H, W, C] of this shape to their like."""
    x_t = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
      eps = jax.eval_shape(self.apply_fn, self.params, x_t, t)
    except Exception as error:
      raise ValueError(
        f"apply_fn(params, x_t, t) fails for x_t {x_t.shape} float32 and t {t.shape} int32: {error}"
      ) from error
    if getattr(eps, "shape", None) != x_t.shape:
      raise ValueError(
        f"apply_fn must return the noise with the shape of x_t {x_t.shape}; it returns {eps}."
      )


def checked_images(images: Array) -> np.ndarray:
  """Images as an array [N, H, W, C], uint8 or finite float32 in [-1, 1]; ValueError otherwise."""
  images = np.asarray(images)
  if images.ndim != 4 or not images.size or images.dtype not in (np.float32, np.uint8):
    raise ValueError(
      "Images must be a non-empty array [N, H, W, C] of float32 in [-1, 1] or uint8; got "
      f"{images.dtype} of shape {images.shape}."
    )
  # A sampler's last step may leave the range by rounding.
  if images.dtype == np.float32 and not np.abs(images).max() <= 1 + 1e-3:
    raise ValueError(
      f"float32 images must be finite and lie in [-1, 1]; got {images.min()}…{images.max()}. "
      "Rescale them (2 * x - 1 for 0…1, x / 127.5 - 1 for 0…255) or pass uint8."
    )
  return images


def checked_ids(ids: np.ndarray | None, num: int, name: str) -> np.ndarray:
  """`num` different ids, 0 … num − 1 where None; ValueError that calls them `name` otherwise."""
  ids = np.arange(num) if ids is None else np.asarray(ids)
  if ids.shape != (num,) or len(np.unique(ids)) != num:
    raise ValueError(f"{name} must be {num} different ids, one an image; got shape {ids.shape}.")
  return ids
