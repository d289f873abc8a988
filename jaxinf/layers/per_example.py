"""Per-example gradients of a measurement, as layer matrices."""

import jax
import jax.numpy as jnp

from jaxinf.core.random import draw_keys
from jaxinf.core.types import Matrices, Params, PyTree
from jaxinf.diffusion.measurements import Measurement
from jaxinf.diffusion.noise import UNIFORM, DrawDesign
from jaxinf.diffusion.schedule import Schedule
from jaxinf.layers.register import Registration

_MOST_APART = 2  # images that are batches of their own, one after another, if of many pairs
_MANY_DRAWS = 16


def example_gradients(
  model: Registration,
  measurement: Measurement,
  schedule: Schedule,
  params: Params,
  *,
  images: jax.Array,
  keys: jax.Array,
  conditioning: PyTree = None,
  design: DrawDesign = UNIFORM,
) -> Matrices:
  """Gradients of each image's measurement over its draws.

  Args:
    model: the registered layers.
    measurement: what is differentiated.
    schedule: the diffusion process.
    params: the parameters.
    images: [B, H, W, C], float32 in [-1, 1] or uint8; or what the measurement is of.
    keys: [B, S], one a draw.
    conditioning: pytree of arrays [B, …], or None.
    design: how the S draws of an image depend on each other.

  Returns:
    Layer name → [B, d_out, d_in].
  """
  if 1 < len(images) <= _MOST_APART and keys.shape[1] >= _MANY_DRAWS:
    alone = lambda row: example_gradients(
      model, measurement, schedule, params, images=images[row][None], keys=keys[row][None],
      conditioning=jax.tree.map(lambda x: x[row][None], conditioning), design=design,
    )  # fmt: skip
    return jax.tree.map(lambda *x: jnp.concatenate(x), *map(alone, range(len(images))))
  pairs = measurement.pairs(schedule, images, keys, conditioning, design)
  cotangents = measurement.cotangents(schedule, pairs, draws=keys.shape[1])
  return model.gradients(params, pairs, cotangents, rows=len(images))


def group_keys(keys: jax.Array, groups: jax.Array, draws: int) -> jax.Array:
  """[B, draws] keys of the draws group · draws … (group + 1) · draws − 1 of each example.

  Args:
    keys: [B], one an example.
    groups: [B], which group of draws.
    draws: in a group.
  """
  return jax.vmap(lambda key, group: draw_keys(key, draws, first=group * draws))(keys, groups)


def default_groups(draws: int, most: int = 5) -> int:
  """The largest number of equal groups, up to `most`, of an even number of draws where it can be.

  Even groups hold whole antithetic pairs.
  """
  even = lambda groups: draws // groups % 2 == 0
  splits = [groups for groups in range(1, most + 1) if draws % groups == 0]
  return max(splits, key=lambda groups: (groups > 1, even(groups), groups), default=1)


def checked_draws(draws: int, groups: int, what: str = "draws", into: str = "draw_groups") -> None:
  """Raises ValueError unless draws split evenly into groups; `what` and `into` are their names."""
  if groups < 1 or draws < 1 or draws % groups:
    divisors = [g for g in range(1, max(draws, 1) + 1) if draws % g == 0][:8]
    raise ValueError(
      f"{draws} {what} do not split into {groups} equal groups; {into} must divide {what} "
      f"(as {', '.join(map(str, divisors))} do)."
    )
