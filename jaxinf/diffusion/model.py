"""The object that is attributed: a trained diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import ApplyFn, Array, Params, PyTree
from jaxinf.diffusion.objective import Noised, predict
from jaxinf.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True, repr=False)
class Task:
  """A diffusion model whose samples are to be explained.

  Attributes:
    apply_fn: apply_fn(params, x_t [B, H, W, C], t [B] int32) → ε [B, H, W, C]: any JAX function,
      with dropout off, in float32 and not under `jit` (curvature is registered from its trace). A
      conditional model is apply_fn(params, x_t, t, conditioning), with a pytree of arrays [B, …].
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

  def check_images(self, image_shape: tuple[int, ...], conditioning: PyTree = None) -> None:
    """Raises ValueError unless the model maps images [B, H, W, C] of this shape to their like.

    Args:
      image_shape: (H, W, C).
      conditioning: pytree of arrays [N, …] whose rows the model is given; None for none.
    """
    two_rows = lambda shape, dtype: jax.ShapeDtypeStruct((2, *shape), dtype)
    x_t, t = two_rows(image_shape, jnp.float32), two_rows((), jnp.int32)
    given = jax.tree.map(lambda x: two_rows(x.shape[1:], x.dtype), conditioning)
    network = lambda params, x_t, t, c: predict(self.apply_fn, params, Noised(x_t, t, x_t, c))
    try:
      eps = jax.eval_shape(network, self.params, x_t, t, given)
    except Exception as error:
      call, what = "apply_fn(params, x_t, t)", ""
      if conditioning is not None:
        call, what = "apply_fn(params, x_t, t, conditioning)", f" and conditioning {given}"
      raise ValueError(
        f"{call} fails for x_t {x_t.shape} float32, t {t.shape} int32{what}: {error}"
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


def checked_conditioning(conditioning: PyTree, num: int, name: str) -> PyTree:
  """Conditioning as NumPy arrays [num, …], integers as JAX keeps them (int32); None stays None.

  Raises:
    ValueError: calls it `name`; a leaf has another leading axis than `num`, is not of numbers, is
      float64 or not finite, or has integers beyond 32 bits; or there are no leaves.
  """
  if conditioning is not None and not jax.tree.leaves(conditioning):
    raise ValueError(f"{name} holds no arrays: pass None for a model without conditioning.")
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _checked_leaf(leaf, num, name + jax.tree_util.keystr(path)), conditioning
  )


def _checked_leaf(leaf: Array, num: int, name: str) -> np.ndarray:
  leaf = np.asarray(leaf)
  if leaf.shape[:1] != (num,):
    raise ValueError(
      f"{name} must be an array with one row for each of the {num} images; got shape {leaf.shape}."
    )
  if leaf.dtype == np.float64:
    raise ValueError(f"{name} is float64: cast it with .astype('float32').")
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    if not np.isfinite(leaf).all():
      raise ValueError(f"{name} is not finite.")
    return leaf
  if leaf.dtype.kind not in "biu":
    raise ValueError(f"{name} must hold numbers or booleans; got {leaf.dtype}.")
  kept = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
  if not np.array_equal(kept, leaf):
    raise ValueError(f"{name} has integers that do not fit {kept.dtype}.")
  return kept
