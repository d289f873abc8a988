"""The object that is attributed: a trained diffusion model."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxinf.diffusion.schedule import Schedule
from jaxinf.types import ApplyFn, Params


@dataclasses.dataclass(frozen=True)
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
