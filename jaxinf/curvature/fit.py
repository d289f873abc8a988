"""Fits K-FAC curvature of a diffusion model (paper, Section 3.1).

The GGN of the pixel-mean loss is (2/D) E[JᵀJ] over examples and draws of (t, ε), with D = H·W·C
and J = ∂ε_θ/∂θ. A target drawn from the model's own Gaussian has the output gradient √(2/D) ξ,
ξ ~ N(0, I), whose covariance is (2/D) I: back-propagating it gives the Monte-Carlo Fisher, which
is the GGN in expectation.
"""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import parallel
from jaxinf.curvature.coverage import Coverage
from jaxinf.curvature.eigenbasis import eigenbasis, multiply, precondition
from jaxinf.curvature.layers import Layer, from_matrices, to_matrices
from jaxinf.curvature.registration import Registration, register
from jaxinf.diffusion.objective import Noised, float_images, noised
from jaxinf.diffusion.task import Task, checked_ids, checked_images
from jaxinf.random import example_numbers, fold_in_each, stream, substreams
from jaxinf.types import Array, Batch, Eigenbasis, KroneckerFactors, Params

_LOG = logging.getLogger("jaxinf")

SKIP_NORMALISATION = (r"(?i)norm[^/]*/(scale|bias)$",)


@dataclasses.dataclass(frozen=True, repr=False)
class Curvature:
  """The fitted curvature H ≈ GGN: block-diagonal over layers, G ⊗ A in each.

  Attributes:
    layers: the covered layers.
    bases: layer name → its eigenbasis.
    coverage: what became of every parameter.
    task: what it was fitted for.
    settings: how it was fitted.
  """

  layers: tuple[Layer, ...]
  bases: dict[str, Eigenbasis]
  coverage: Coverage
  task: Task
  settings: dict

  def __repr__(self) -> str:
    return f"Curvature({len(self.layers)} layers: {self.coverage.summary()}; {self.settings})"

  def multiply(self, grads: Params, damping: float) -> Params:
    """(H + λI) · grads for a pytree shaped like the parameters; zeros outside the curvature.

    In float64 on the host, and so returned: at a damping far below the largest eigenvalue, float32
    could not tell the small eigendirections from the rounding of the large ones.
    """
    return self._apply(multiply, grads, damping)

  def precondition(self, grads: Params, damping: float) -> Params:
    """(H + λI)⁻¹ · grads; otherwise as `multiply`, whose inverse it is inside the curvature."""
    return self._apply(precondition, grads, damping)

  def _apply(self, function, grads: Params, damping: float) -> Params:
    checked_damping(damping)
    expected, got = (jax.tree.map(np.shape, tree) for tree in (self.task.params, grads))
    if expected != got:
      raise ValueError("grads must be a pytree with the structure and shapes of the parameters.")
    grads = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
    matrices = to_matrices(self.layers, grads)
    applied = {
      name: function(matrix, self.bases[name], damping) for name, matrix in matrices.items()
    }
    return from_matrices(self.layers, applied, grads)


def fit_curvature(
  task: Task,
  images: Array,
  *,
  draws: int,
  seed: int,
  ids: np.ndarray | None = None,
  method: str = "kfac",
  estimator: str = "mc",
  skip: Sequence[str] = SKIP_NORMALISATION,
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
) -> Curvature:
  """Fits the curvature of a model's loss over training images.

  Args:
    task: the model.
    images: [N, H, W, C] float32 in [-1, 1] or uint8.
    draws: draws of (t, ε) for each image, each with one model-sampled target.
    seed: of the draws and targets.
    ids: [N] stable ids of the images, which their random keys follow; 0 … N − 1 where None.
    method: "kfac".
    estimator: "mc", model-sampled targets.
    skip: regular expressions on parameter paths to leave out; normalisation layers by default.
    batch_size: (image, draw) pairs at a time over all devices.
    devices: local devices; all of them where None.

  Raises:
    ValueError: a parameter is neither covered nor skipped, a factor is not finite, or the
      arguments don't fit together.
  """
  for value, valid, what in ((method, METHODS, "method"), (estimator, ESTIMATORS, "estimator")):
    if value not in valid:
      raise ValueError(f"Unknown {what} {value!r}; there are: {', '.join(valid)}.")
  if draws < 1:
    raise ValueError(f"draws must be at least 1; got {draws}.")
  if isinstance(skip, str):
    raise ValueError(f"skip must be a sequence of regular expressions; write skip=({skip!r},).")
  images = checked_images(images)
  numbers = example_numbers(checked_ids(ids, len(images), "ids"))
  task.check_images(images.shape[1:])
  model = register(task.apply_fn, task.params, images.shape[1:], skip)
  _LOG.info("curvature: %s", model.coverage.summary())
  _LOG.info("curvature: skipped %s", ", ".join(model.coverage.skipped) or "nothing")
  rows = parallel.Rows(images, numbers, draws)
  factors = fit_factors(task, model, rows, seed, batch_size, devices)
  bases = {name: eigenbasis(factor, name) for name, factor in factors.items()}
  settings = dict(method=method, estimator=estimator, draws=draws, seed=seed, skip=list(skip))
  return Curvature(model.layers, bases, model.coverage, task, settings)


def fit_factors(
  task: Task,
  model: Registration,
  rows: parallel.Rows,
  seed: int,
  batch_size: int,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, KroneckerFactors]:
  """Layer name → mean factors over all (example, draw) rows, with Monte-Carlo targets."""
  schedule = task.schedule

  def kernel(params: Params, batch: Batch):
    keys = fold_in_each(fold_in_each(stream(seed, "curvature"), batch.ids), batch.draws)
    pairs = noised(schedule, float_images(batch.images), keys)
    cotangents = monte_carlo_cotangents(substreams(keys, "targets"), pairs)
    return model.factor_sums(params, pairs, cotangents, batch.mask)

  sums = parallel.reduce_batches(
    kernel, task.params, rows, batch_size=batch_size, label="curvature", unit="pairs",
    devices=devices,
  )  # fmt: skip
  return jax.tree.map(lambda x: x / len(rows), sums)


def monte_carlo_cotangents(keys: jax.Array, pairs: Noised) -> jax.Array:
  """√(2/D) ξ [B, H, W, C]: loss gradients at targets sampled from the model's Gaussian."""
  shape = pairs.noise.shape[1:]
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
  return jnp.sqrt(2 / np.prod(shape)) * noise


def checked_damping(damping: float) -> None:
  if not damping > 0:
    raise ValueError(f"damping must be positive (the curvature is singular); got {damping}.")


METHODS = ("kfac",)
ESTIMATORS = ("mc",)
