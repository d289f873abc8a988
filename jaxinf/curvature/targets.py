"""The pairs, and gradients at the network's outputs, that curvature is estimated from.

(Paper, Section 3.1.) The loss of a pair is w_t times the mean over D output elements of squared
errors. Its GGN is (2/D) E[w_t JᵀJ] over examples and draws of (t, ε), with J = ∂output/∂θ. It is
the second moment of gradients back-propagated from cotangents, K a pair [K, B, …], that have the
second moment (2 w_t/D) I:

  mc:        √(2 w_t/D) ξ, ξ ~ N(0, I): the gradient at targets sampled from the model's own
             Gaussian, the GGN in expectation;
  exact:     √(2 w_t) e_c for every output c, whose mean over the D outputs has that moment;
  empirical: the loss's own gradient at the true target, the empirical Fisher, which is not the GGN.
             Of each draw by itself: only TRAK averages draws before the outer product.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.core.types import Batch
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised, losses, noised, predict
from jaxinf.diffusion.process import Process
from jaxinf.engine.kernels import numerics
from jaxinf.layers.register import Cotangents, Registration

MOST_EXACT_FLOPS = 1e14  # about ten minutes on a few CPU cores
MOST_EXACT_BYTES = 2**33  # on a device at a time: what a laptop and a small GPU still have


def monte_carlo(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """√(2 w/D) ξ for `num` model-sampled targets a pair; keys [B] are those of the pairs."""
  shape = pairs.target.shape[1:]

  def normal(target: jax.Array) -> jax.Array:
    numbers = jnp.full(keys.shape, target, jnp.uint32)
    streams = fold_in_each(substreams(keys, "targets"), numbers)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(streams)

  scale = np.sqrt(2 / np.prod(shape)).astype(np.float32) * _root_weights(pairs)
  return lambda out: scale * jax.vmap(normal)(jnp.arange(num, dtype=jnp.uint32))


def empirical(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """The gradient of each pair's loss at its true target: one target."""
  del keys, num
  return lambda out: jax.grad(lambda y: jnp.sum(losses(y, pairs)))(out)[None]


def exact(keys: jax.Array, pairs: Noised, num: int) -> Cotangents:
  """√(2 w) times each unit vector: D targets."""
  del keys, num
  shape = pairs.target.shape[1:]
  size = int(np.prod(shape))
  units = np.sqrt(2).astype(np.float32) * jnp.eye(size, dtype=jnp.float32).reshape(size, 1, *shape)
  return lambda out: units * jnp.broadcast_to(_root_weights(pairs), out.shape)


def _root_weights(pairs: Noised) -> jax.Array:
  """√w [B, 1, …]."""
  return jnp.sqrt(pairs.weights).reshape(-1, *(1,) * (pairs.target.ndim - 1))


def curvature_pairs(
  process: Process, seed: int | jax.Array, batch: Batch, augmentation: Augmentation = PLAIN
) -> tuple[Noised, jax.Array]:
  """The pairs of (example, draw) rows, and their keys [B]: the same for every kind of curvature.

  Augmentation is part of the expectation over data (paper, Appendix J.8): each pair has its own.

  In float32 whatever JAX's mode: under x64 the same keys would give other numbers.
  """
  with jax.enable_x64(False):
    keys = fold_in_each(fold_in_each(stream(seed, "curvature"), batch.ids), batch.draws)
    pairs = noised(process, batch.data, keys, augmentation)
    conditioning = augmentation.conditioning(batch.conditioning, keys)
  return pairs._replace(conditioning=conditioning), keys


FISHERS: dict[str, Callable[[jax.Array, Noised, int], Cotangents]] = {
  "mc": monte_carlo,
  "empirical": empirical,
  "exact": exact,
}


def check_exact(
  model: DiffusionModel,
  layers: Registration,
  row: Batch,
  *,
  num_pairs: int,
  batch_size: int,
  augmentation: Augmentation = PLAIN,
) -> None:
  """Raises ValueError where back-propagating every output takes too long or too much memory.

  Args:
    model: the model.
    layers: its registered layers, whose output gradients are in memory for all outputs at once.
    row: a batch of one example, of which shapes count.
    num_pairs: pairs in all.
    batch_size: pairs on a device at a time.
    augmentation: of the examples.
  """
  num_outputs = math.prod(augmentation.shape(row.data.shape[1:]))
  flops = 2 * _forward_flops(model, row, augmentation) * num_pairs * num_outputs
  make = lambda batch: curvature_pairs(model.process, 0, batch, augmentation)[0]
  pairs = jax.eval_shape(make, row)
  positions = layers.positions(model.params, pairs)
  numbers = num_outputs + sum(positions[x.name] * x.matrix_rows for x in layers.layers)
  each = 4 * num_outputs * numbers
  what = f'fisher="exact" back-propagates each of {num_outputs:,} outputs of'
  if flops > MOST_EXACT_FLOPS:
    raise ValueError(
      f"{what} {num_pairs:,} pairs: about {flops:.1e} operations, of which at most "
      f'{MOST_EXACT_FLOPS:.0e} are allowed. Take fisher="mc" with more samples, or fewer draws or '
      "examples, or a smaller network."
    )
  if each * batch_size > MOST_EXACT_BYTES:
    fits = MOST_EXACT_BYTES // each
    way_out = f"a batch of at most {fits} pairs on a device" if fits else "a smaller network"
    raise ValueError(
      f"{what} {batch_size:,} pairs on a device at once. Gradients at the outputs of all layers "
      f"take about {each * batch_size / 2**30:,.1f} GiB, of which at most "
      f'{MOST_EXACT_BYTES / 2**30:.0f} GiB are allowed. Take fisher="mc" with more samples, or '
      f"{way_out}."
    )


def _forward_flops(model: DiffusionModel, row: Batch, augmentation: Augmentation) -> float:
  """Operations of the network for one pair, by XLA's count."""

  def forward(params, batch):
    pairs, _ = curvature_pairs(model.process, 0, batch, augmentation)
    return predict(model.apply_fn, params, pairs)

  with numerics():
    cost = jax.jit(forward).lower(model.params, row).cost_analysis() or {}
  return float(cost.get("flops", 0.0))
