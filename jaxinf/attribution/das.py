"""The Diffusion Attribution Score: how far leaving an image out moves the model's predicted noise.

Linearise ε_θ at the query and at the training images, and take one Newton step of the squared error
without image n. The output at the query then moves by g_qᵀ (GᵀG)⁻¹ g_n r_n / (1 − h_n), with the
residual r_n and the leverage h_n = g_nᵀ (GᵀG)⁻¹ g_n, as in linear regression; the square of that is
the score, a KL divergence between the two predicted distributions but for a factor.

Reference: Lin et al., ICLR 2025 (arXiv:2410.18639).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.attribution.examples import check_alike, checked_dampings, examples_of
from jaxinf.attribution.features import (
  check_pass,
  features_of,
  finite,
  partial_of,
  register_everything,
  split_draws,
)
from jaxinf.attribution.fisher import fisher_of, group_scores
from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  DrawGroups,
  flat,
  gradient_operands,
  row_keys,
)
from jaxinf.compression.projection import Projection
from jaxinf.core.types import ApplyFn, Array, Batch, PyTree
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.objective import Noised, predict, squared_errors
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine.checkpoints import Resume
from jaxinf.layers.register import Registration
from jaxinf.scores.scores import Scores

_TINY = 1e-20  # the norm of a gradient that is zero


def das(
  task: Task,
  queries: Array,
  train_images: Array,
  *,
  damping: float | Sequence[float],
  draws: int,
  seed: int,
  projection_dim: int,
  projection: str = "rademacher",
  projection_seed: int | None = None,
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  query_conditioning: PyTree = None,
  train_conditioning: PyTree = None,
  draw_groups: int | None = None,
  query_draws: int | None = None,
  query_groups: int | None = None,
  design: DrawDesign = DrawDesign(),
  query_design: DrawDesign | None = None,
  batch_size: int = 128,
  block_mib: float = 1024,
  resume: Resume | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Scores | tuple[Scores, ...]:
  """Scores every training image for every query.

  With A = H + λ I, H = Σ_n φ_n φ_nᵀ / N and h_n = φ_nᵀ A⁻¹ φ_n / N,

    scores[q, n] = N · (φ_qᵀ A⁻¹ φ_n / N · r_n / (1 − h_n))².

  As its authors do it: φ is the projected mean over draws of gradients of the MEAN over pixels and
  channels of ε_θ(x_t, t), each divided by its norm; r_n is the mean over draws of root mean squared
  errors of ε, divided by their norm over the image's draws; gradients, residuals and products are
  averaged over draws before the square, where the theory has one score a timestep.

  What differs: the leverage, which their published scripts leave out of the final score or compute
  otherwise, is that of the paper; t and ε are drawn by `design`, where theirs are evenly spaced
  timesteps with noise that all images share, ten for gradients and 1000 for errors; damping is
  normalised by N. The factor N makes a sum of scores / N the predicted effect, as for all methods;
  scores are not negative, and their unit is none of a measurement's.

  Args:
    task: the model.
    queries: [Q, H, W, C] images to explain, float32 in [-1, 1] or uint8.
    train_images: [N, H, W, C], likewise.
    damping: λ > 0, relative to H, whose trace is of the order of one; or several of them.
    draws: of (t, ε) for each training image.
    batch_size: (image, draw) pairs at a time over all devices; the gradient of each is in memory.
    seed, projection_dim, projection, projection_seed, query_ids, train_ids, query_conditioning,
      train_conditioning, draw_groups, query_draws, query_groups, design, query_design, block_mib,
      resume, devices: as for `trak`.

  Returns:
    Scores, or a tuple of them as `trak` returns. Groups of draws say by how much the scores move
    with the features to first order; residuals and leverages stand still.

  Raises:
    ValueError: the arguments don't fit together, a parameter is in no layer, or features or scores
      are not finite.
  """
  dampings = checked_dampings(damping)
  query = examples_of(queries, query_ids, query_conditioning, "query")
  train = examples_of(train_images, train_ids, train_conditioning, "train")
  check_alike(query, train)
  query_draws = draws if query_draws is None else query_draws
  draw_groups, query_groups = split_draws(draws, draw_groups, query_draws, query_groups)
  query_design = design.without_flips() if query_design is None else query_design
  check_pass(query_design, (), resume, batch_size=batch_size, block_mib=block_mib)
  projected = Projection(
    projection_dim, seed if projection_seed is None else projection_seed, projection
  )
  settings = dict(
    method="das", draws=draws, draw_groups=draw_groups, query_draws=query_draws,
    query_groups=query_groups, seed=seed,
    projection=projection, projection_dim=projection_dim, projection_seed=projected.seed,
    design=dataclasses.asdict(design), query_design=dataclasses.asdict(query_design),
  )  # fmt: skip

  # 1. Features of outputs, and residuals of training images.
  model = register_everything(task, train.image_shape, train.conditioning)
  trained = DrawGroups(seed, draws // draw_groups, design)
  asked = DrawGroups(seed, query_draws // query_groups, query_design)
  features = {}
  for name, examples, num_groups, groups in (
    (TRAIN, train, draw_groups, trained),
    (QUERY, query, query_groups, asked),
  ):
    features[name] = features_of(
      _output_kernel(model, task.schedule, groups), task.params, examples, groups,
      num_groups=num_groups, stream_name=name, projection=projected, batch_size=batch_size,
      block_mib=block_mib, devices=devices,
      partial=partial_of(resume, name, settings, task, query, train),
    )  # fmt: skip
  errors = engine.map_batches(
    _error_kernel(task.apply_fn, task.schedule, trained), gradient_operands(task.params, TRAIN),
    train.rows(draw_groups), batch_size=max(1, batch_size // trained.size), label="residuals",
    devices=devices,
  )  # fmt: skip
  first, second = errors.reshape(-1, draw_groups, 2).mean(axis=1, dtype=np.float64).T
  residuals = first / np.sqrt(np.maximum(draws * second, _TINY))

  # 2. Leave-one-out changes of the outputs, squared.
  num = len(train.ids)
  fisher = fisher_of(features[TRAIN].mean(axis=1, dtype=np.float32))
  scores = []
  for value in dampings:
    weights = residuals / fisher.slack(value) / num
    of_groups, of_queries = group_scores(fisher, features[TRAIN], features[QUERY], value)
    change = of_queries.mean(axis=0) * weights
    # Squares to first order in what a group changes, so that they average to that of the mean.
    squares = [num * change * (2 * part * weights - change) for part in (of_groups, of_queries)]
    scores.append(
      Scores(
        finite(squares[0]), query.ids, train.ids, settings | {"damping": value},
        finite(squares[1]) if query_groups > 1 else None,
      )
    )  # fmt: skip
  return scores[0] if np.ndim(damping) == 0 else tuple(scores)


def _output_kernel(model: Registration, schedule: Schedule, groups: DrawGroups) -> engine.Kernel:
  """(operands, rows) → [B, P], means over draws of unit gradients of the mean output."""

  def kernel(operands: PyTree, batch: Batch) -> jax.Array:
    params, number = operands
    pairs = _pairs(schedule, groups, number, batch)
    cotangents = lambda out: jnp.full(out.shape, out.shape[0] / out.size)
    grads = model.gradients(params, pairs, cotangents, rows=len(pairs.t))
    rows = [flat(matrices) for matrices in grads.values()]
    norms = jnp.sqrt(sum(jnp.sum(jnp.square(part), axis=1) for part in rows))
    weights = (1 / jnp.maximum(norms, _TINY) / groups.size).reshape(-1, groups.size)
    means = [jnp.einsum("bs,bsp->bp", weights, part.reshape(*weights.shape, -1)) for part in rows]
    return jnp.concatenate(means, axis=1)

  return kernel


def _error_kernel(apply_fn: ApplyFn, schedule: Schedule, groups: DrawGroups) -> engine.Kernel:
  """(operands, rows) → [B, 2], means over draws of root mean squared errors and their squares."""

  def kernel(operands: PyTree, batch: Batch) -> jax.Array:
    params, number = operands
    pairs = _pairs(schedule, groups, number, batch)
    squares = squared_errors(predict(apply_fn, params, pairs), pairs).reshape(-1, groups.size)
    return jnp.stack([jnp.sqrt(squares).mean(axis=1), squares.mean(axis=1)], axis=1)

  return kernel


def _pairs(schedule: Schedule, groups: DrawGroups, number: Array, batch: Batch) -> Noised:
  """The pairs of one group of draws of each example, those of `gradient_kernel`."""
  keys = row_keys(groups, number, batch)
  return LOSS.pairs(schedule, batch.images, keys, batch.conditioning, groups.design)
