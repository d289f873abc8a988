"""Self-influence ⟨g_n, (H + λI)⁻¹ g_n⟩ of all N training examples, in one pass and O(N) memory.

A score of an example for itself, without N query gradients in memory and without N × N scores. An
example's gradients in its A replicates of draws are there at once, and leave 2 A numbers: products
of different replicates, which estimate without bias, and squares, which do not (see
scores/self_influence.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import TRAIN, GradientKernel, replicate_products, row_operands
from jaxinf.attribution.queries import gradient_kernel
from jaxinf.core.checks import checked_damping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Batch, Matrices, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import to_eigenbasis
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine.checkpoints import PartialOutputs
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.self_influence import SelfInfluence


def self_influence(
  curvature: Curvature,
  *,
  train: Examples,
  damping: float,
  draws: Draws = Draws(),
  compute: Compute = Compute(),
) -> SelfInfluence:
  """How much each training example is learned from itself alone: outliers and memorised ones first.

  The diagonal of `influence(queries=train, train=train)` with independent draws on both sides, in
  expectation.

  Args:
    curvature: of the model, with an eigenbasis: any kind but the exact one.
    train: the training examples, with random_flip where training mirrored images.
    damping: λ > 0, in the units of the curvature.
    draws: of (t, ε) for each example, in 2 replicates or more; 3 or more give standard errors.
    compute: how. The gradients of an example in all its replicates are in memory at once; with a
      checkpoint, a killed pass goes on where it was.

  Raises:
    ValueError: the arguments don't fit together, or gradients are not finite.
  """
  checked_damping(damping)
  draws = _checked_draws(draws)
  if not curvature.has_eigenbasis:
    raise ValueError(
      "Self-influence by the exact curvature is a solve for every training example. Fit KFAC, "
      "EKFAC or Diagonal; or take the diagonal of influence(queries=few, train=few) of a few."
    )
  kernel = SelfProducts(gradient_kernel(curvature, train, LOSS, draws), draws.replicates or 1)
  settings = _settings(curvature, train, damping, draws)
  partial, checkpoint = None, compute.checkpoint
  if checkpoint is not None:
    key = settings | content_of(curvature.model, train=train)
    key |= {"curvature_content": curvature.content()}
    partial = PartialOutputs(checkpoint.path("self-influence"), key, checkpoint.every)
  products = map_batches(
    kernel,
    (
      row_operands(curvature.model.params, draws, TRAIN),
      curvature.rotations(),
      np.float32(damping),
    ),
    Rows.of(train),
    batch_size=compute.rows(draws),
    label="self-influence",
    devices=compute.devices,
    partial=partial,
  )
  checked_finite(products, train.ids)
  return SelfInfluence.of_products(products, train.ids, settings)


@dataclasses.dataclass(frozen=True)
class SelfProducts:
  """Kernel from examples to `replicate_products` of their gradients under (H + λI)⁻¹, [B, 2, A].

  Its operands are (those of `row_operands`, eigenbasis of each layer, λ).

  Attributes:
    gradients: of (example, replicate) rows.
    replicates: A. They go one after another, so that only one of them has activations.
  """

  gradients: GradientKernel
  replicates: int

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    of_rows, bases, damping = operands

    def rotated(number: jax.Array) -> Matrices:
      rows = dataclasses.replace(batch, draws=jnp.full(batch.ids.shape, number))
      with jax.default_matmul_precision("highest"):
        grads = self.gradients(of_rows, rows).items()
        return {name: to_eigenbasis(grad, bases[name]) for name, grad in grads}

    found = jax.lax.map(rotated, jnp.arange(self.replicates, dtype=jnp.int32))
    of_examples = {name: jnp.swapaxes(rows, 0, 1) for name, rows in found.items()}
    weights = {name: 1 / (basis.eigenvalues + damping) for name, basis in bases.items()}
    return replicate_products(of_examples, weights)


def checked_finite(products: np.ndarray, ids: np.ndarray) -> None:
  """Raises ValueError, which names the first example, where products [N, …] are not finite."""
  finite = np.isfinite(products).reshape(len(products), -1).all(axis=1)
  if not finite.all():
    raise ValueError(
      f"The self-influence of the training example {ids[np.argmin(finite)].item()!r} is not "
      "finite: its gradients overflow. Check that the model's outputs are finite for it at every "
      "time, or raise the damping."
    )


def _checked_draws(draws: Draws) -> Draws:
  """The draws with their replicates; ValueError unless there are two or more."""
  if draws.stop is not None:
    raise ValueError("Self-influence takes a fixed number of draws: Draws(num).")
  draws = draws.split()
  if (draws.replicates or 1) < 2:
    raise ValueError(
      f"Self-influence needs draws in 2 replicates or more; got {draws.num} draws in one. The "
      "square of one noisy gradient is too large by its noise: give more, Draws(num, replicates)."
    )
  return draws


def _settings(
  curvature: Curvature, train: Examples, damping: float, draws: Draws
) -> dict[str, Any]:
  """What they are computed with, as JSON."""
  return {
    "curvature": dict(curvature.settings),
    "process": curvature.model.process.settings,
    "damping": float(damping),
    "draws": draws.num,
    "replicates": draws.replicates,
    "seed": draws.seed,
    "design": draws.design,
    **train.augmentation.settings,
  }
