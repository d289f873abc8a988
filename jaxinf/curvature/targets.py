"""The pairs, and gradients at the network's outputs, that curvature is estimated from.

(Paper, Section 3.1.)

The GGN of the pixel-mean loss is (2/D) E[JᵀJ] over examples and draws of (t, ε), with D = H·W·C
and J = ∂ε_θ/∂θ. Back-propagating cotangents with second moment (2/D) I gives it:

  mc:        √(2/D) ξ, ξ ~ N(0, I): the gradient at targets sampled from the model's own Gaussian,
             the GGN in expectation;
  exact:     √2 e_c for every output c, whose mean over the D outputs has that moment;
  empirical: the loss's own gradient at the true ε, the empirical Fisher, which is not the GGN. Of
             each draw by itself: only TRAK averages draws before the outer product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.core.types import Batch, PyTree
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.objective import (
  Noised,
  flipped,
  float_images,
  noised,
  predict,
  squared_errors,
)
from jaxinf.diffusion.schedule import Schedule

MOST_EXACT_FLOPS = 1e14  # about ten minutes on a few CPU cores

# (network outputs [B, H, W, C]) → K cotangents a pair [K, B, H, W, C]
Cotangents = Callable[[jax.Array], jax.Array]


def monte_carlo(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """√(2/D) ξ for `num` model-sampled targets a pair; keys [B] are those of the pairs."""
  shape = pairs.noise.shape[1:]

  def normal(target: int) -> jax.Array:
    numbers = jnp.full(keys.shape, target, jnp.uint32)
    streams = fold_in_each(substreams(keys, "targets"), numbers)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(streams)

  scale = np.sqrt(2 / np.prod(shape)).astype(np.float32)
  return lambda out: scale * jnp.stack([normal(target) for target in range(num)])


def empirical(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """The gradient of each pair's loss at its true noise: one target."""
  del keys, num
  return lambda out: jax.grad(lambda y: jnp.sum(squared_errors(y, pairs)))(out)[None]


def exact(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """√2 times each unit vector: D targets."""
  del keys, num
  shape = pairs.noise.shape[1:]
  size = int(np.prod(shape))
  units = np.sqrt(2).astype(np.float32) * jnp.eye(size).reshape(size, 1, *shape)
  return lambda out: jnp.broadcast_to(units, (size, len(out), *shape))


def curvature_pairs(
  schedule: Schedule, seed: int, batch: Batch, random_flip: bool = False
) -> tuple[Noised, jax.Array]:
  """The (t, ε) pairs of (example, draw) rows, and their keys [B]: the same in every method.

  With random_flip each pair's image is mirrored with probability ½: augmentation is part of the
  expectation over data (paper, Appendix J.8).

  In float32 whatever JAX's mode: under x64 the same keys would give other numbers.
  """
  with jax.enable_x64(False):
    keys = fold_in_each(fold_in_each(stream(seed, "curvature"), batch.ids), batch.draws)
    images = float_images(batch.images)
    pairs = noised(schedule, flipped(images, keys) if random_flip else images, keys)
  return pairs._replace(conditioning=batch.conditioning), keys


ESTIMATORS: dict[str, Callable[[jax.Array, Noised, int], Cotangents]] = {
  "mc": monte_carlo,
  "empirical": empirical,
  "exact": exact,
}


def checked_targets(
  task: Task,
  image_shape: tuple[int, ...],
  conditioning: PyTree,
  num_pairs: int,
  estimator: str,
  targets: int,
) -> int:
  """Backward passes for each of `num_pairs` pairs; ValueError where "exact" would take too long."""
  if estimator != "exact":
    if estimator != "mc" and targets != 1:
      raise ValueError(f"targets counts model-sampled ones: {estimator!r} has one; got {targets}.")
    return targets
  outputs = int(np.prod(image_shape))
  flops = 2 * _forward_flops(task, image_shape, conditioning) * num_pairs * outputs
  if flops > MOST_EXACT_FLOPS:
    raise ValueError(
      f"estimator='exact' back-propagates each of {outputs:,} outputs of {num_pairs:,} pairs: "
      f"about {flops:.1e} operations, of which at most {MOST_EXACT_FLOPS:.0e} are allowed. Take "
      "estimator='mc' with more targets, fewer draws or images, or a smaller network."
    )
  return outputs


def _forward_flops(task: Task, image_shape: tuple[int, ...], conditioning: PyTree) -> float:
  """Operations of the network for one pair, by XLA's count."""
  struct: Any = jax.ShapeDtypeStruct
  like = lambda x: struct((1, *np.shape(x)[1:]), np.asarray(x).dtype)
  images = struct((1, *image_shape), jnp.float32)
  pairs = Noised(images, struct((1,), jnp.int32), images, jax.tree.map(like, conditioning))
  forward = jax.jit(lambda params, pairs: predict(task.apply_fn, params, pairs))
  cost = forward.lower(task.params, pairs).cost_analysis() or {}
  return float(cost.get("flops", 0.0))
