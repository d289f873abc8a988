"""The Diffusion Attribution Score: how far leaving an example out moves the network's output.

Linearise the output at the query and at the training examples, and take one Newton step of the
squared error without example n. The output at the query then moves by
g_qᵀ (GᵀG)⁻¹ g_n r_n / (1 − h_n), with the residual r_n and the leverage h_n = g_nᵀ (GᵀG)⁻¹ g_n, as
in linear regression. The square of that is the score; for a network that predicts ε it is, but for
a factor, a KL divergence between the two predicted distributions.

Reference: Lin et al., ICLR 2025 (arXiv:2410.18639).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.features import (
  all_layers,
  features_of,
  partial_of,
  projection_of,
  settings_of_projected,
  split_draws,
)
from jaxinf.attribution.fisher import fisher_of, group_scores
from jaxinf.attribution.kernels import QUERY, TRAIN, Replicate, flat, row_operands
from jaxinf.attribution.trak import projected_sweep
from jaxinf.compression.projection import Projection
from jaxinf.core.checks import checked_dampings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.types import ApplyFn, Batch, PyTree
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised, predict, squared_errors
from jaxinf.diffusion.process import Process
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.register import Registration
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

_TINY = 1e-20  # the norm of a gradient that is zero


def das(
  model: DiffusionModel,
  *,
  queries: Examples,
  train: Examples,
  damping: float,
  projection: Projection | int,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  compute: Compute = Compute(),
) -> Scores:
  """Scores every training example for every query.

  With A = H + λ I, H = Σ_n φ_n φ_nᵀ / N and h_n = φ_nᵀ A⁻¹ φ_n / N,

    scores[q, n] = N · (φ_qᵀ A⁻¹ φ_n / N · r_n / (1 − h_n))².

  As its authors do it: φ is the projected mean over draws of gradients of the MEAN over elements of
  the network's output, each divided by its norm; r_n is the mean over draws of root mean squared
  errors of the output, divided by their norm over the example's draws; gradients, residuals and
  products are averaged over draws before the square, where the theory has one score a timestep.
  Weights of the loss do not enter.

  What differs: the leverage, which their published scripts leave out of the final score or compute
  otherwise, is that of the paper; t and ε are drawn by the design of `draws`, where theirs are
  evenly spaced timesteps with noise that all examples share, ten for gradients and 1000 for errors;
  damping is normalised by N. The factor N makes a sum of scores / N the predicted effect, as for
  all methods; scores are not negative, and their unit is none of a measurement's.

  Args:
    model: the model.
    queries: what is to be explained.
    train: the training examples.
    damping: λ > 0, relative to H, whose trace is of the order of one.
    projection, draws, query_draws: as for `trak`.
    compute: how; the gradient of each pair of a batch is in memory.

  Returns:
    Scores. Replicates of draws say by how much the scores move with the features to first order;
    residuals and leverages stand still.

  Raises:
    ValueError: the arguments don't fit together, a parameter is in no layer, or features or scores
      are not finite.
  """
  method = DAS(model, projection, (damping,), query_draws)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class DAS:
  """The Diffusion Attribution Score as a method: see `das` for the fields."""

  model: DiffusionModel
  projection: Projection | int
  dampings: tuple[float, ...] = (1e-9,)
  query_draws: Draws | None = None

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping."""
    dampings, model = checked_dampings(self.dampings), self.model
    check_alike(queries, train)
    draws, asked = split_draws(draws, self.query_draws)
    for each in (draws, asked):
      each.check_plain("DAS")
    projection = projection_of(self.projection, draws)
    settings = settings_of_projected(model, draws, asked, projection, train) | {"method": "das"}

    # 1. Features of outputs, and residuals of training examples.
    features = {}
    for name, examples, of in ((TRAIN, train, draws), (QUERY, queries, asked)):
      layers = all_layers(model, examples)
      kernel = OutputKernel(layers, model.process, Replicate.of(of, examples.augmentation))
      features[name] = features_of(
        kernel,
        model,
        examples,
        of,
        name,
        projection=projection,
        compute=compute,
        partial=partial_of(compute, name, settings, model, queries=queries, train=train),
      )
    residuals = _residuals(model, train, draws, compute)

    # 2. Leave-one-out changes of the outputs, squared.
    num = len(train)
    fisher = fisher_of(features[TRAIN].mean(axis=1, dtype=np.float32))
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for value in dampings:
      weights = residuals / fisher.slack(value) / num
      both = group_scores(fisher, features[TRAIN], features[QUERY], value)
      change = both[1].mean(axis=0) * weights
      # Squares to first order in what a replicate changes: they average to that of the mean.
      for squares, part in zip(found, both, strict=True):
        squares.append(num * change * (2 * part * weights - change))
    of_draws, of_queries = map(np.stack, found)
    return projected_sweep(
      of_draws, of_queries, dampings=dampings, queries=queries, train=train, settings=settings
    )


def _residuals(
  model: DiffusionModel, train: Examples, draws: Draws, compute: Compute
) -> np.ndarray:
  """[N] mean over draws of root mean squared errors, divided by their norm over the draws."""
  errors = map_batches(
    ErrorKernel(model.apply_fn, model.process, Replicate.of(draws, train.augmentation)),
    row_operands(model.params, draws, TRAIN),
    Rows.of(train, draws.replicates),
    batch_size=compute.rows(draws),
    label="residuals",
    devices=compute.devices,
  )
  first, second = errors.reshape(-1, draws.replicates, 2).mean(axis=1, dtype=np.float64).T
  return first / np.sqrt(np.maximum(draws.num * second, _TINY))


@dataclasses.dataclass(frozen=True)
class OutputKernel:
  """(operands, rows) → [B, P], means over draws of unit gradients of the mean output."""

  layers: Registration
  process: Process
  replicate: Replicate

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    params, origin = operands
    pairs = _pairs(self.process, self.replicate, origin, batch)
    cotangents = lambda out: jnp.full(out.shape, out.shape[0] / out.size)
    grads = self.layers.gradients(params, pairs, cotangents, rows=len(pairs.time))
    rows = [flat(matrices) for matrices in grads.values()]
    norms = jnp.sqrt(sum(jnp.sum(jnp.square(part), axis=1) for part in rows))
    size = self.replicate.draws.num
    chex.assert_shape(norms, (len(batch.ids) * size,))
    weights = (1 / jnp.maximum(norms, _TINY) / size).reshape(-1, size)
    means = [jnp.einsum("bs,bsp->bp", weights, part.reshape(*weights.shape, -1)) for part in rows]
    return jnp.concatenate(means, axis=1)


@dataclasses.dataclass(frozen=True)
class ErrorKernel:
  """(operands, rows) → [B, 2], means over draws of root mean squared errors and their squares."""

  apply_fn: ApplyFn
  process: Process
  replicate: Replicate

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    params, origin = operands
    pairs = _pairs(self.process, self.replicate, origin, batch)
    squares = squared_errors(predict(self.apply_fn, params, pairs), pairs)
    chex.assert_shape(squares, (len(batch.ids) * self.replicate.draws.num,))
    squares = squares.reshape(-1, self.replicate.draws.num)
    return jnp.stack([jnp.sqrt(squares).mean(axis=1), squares.mean(axis=1)], axis=1)


def _pairs(process: Process, replicate: Replicate, origin: PyTree, batch: Batch) -> Noised:
  """The pairs of one replicate of draws of each example, those of `GradientKernel`."""
  keys = replicate.keys(origin, batch)
  return LOSS.pairs(
    process, batch.data, keys, batch.conditioning, replicate.draws, replicate.augmentation
  )
