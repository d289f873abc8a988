"""The exact GGN, by products with vectors: the referee of all approximations.

Over M (example, draw) pairs the GGN is H = (1/M) Σ (2 w_t/D) JᵀJ, with D the number of the
network's outputs, w_t the weight of the loss, and J = ∂output/∂θ over the parameters of all covered
layers together. Nothing between layers is dropped. Only (t, ε) are sampled, and these draws are the
ones of `fit_curvature`.

A product H v is a forward-mode and a reverse-mode derivative of each batch. (H + λI) x = b is
solved by conjugate gradients, preconditioned by a fitted curvature. A product costs a pass over all
pairs, and a solve takes dozens of products for each query. So this is for small sets: a referee to
measure the other kinds of curvature against.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse.linalg import LinearOperator, cg

from jaxinf.core.checks import checked_damping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Matrices, Params
from jaxinf.curvature.nystrom import Nystrom, nystrom
from jaxinf.curvature.products import ProductKernel
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import numerics
from jaxinf.engine.progress import Progress
from jaxinf.engine.reductions import reduce_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.specs import Layer, from_matrices, to_matrices

_LOG = logging.getLogger("jaxinf")

PRECISIONS = ("float32", "float64")


class Preconditioner(Protocol):
  """An approximation of (H + λI)⁻¹, symmetric and positive definite, as `Curvature` is."""

  def precondition(self, grads: Params, damping: float) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Residuals:
  """How well Q systems (H + λI) x = b were solved.

  Attributes:
    relative: [Q] ‖(H + λI) x − b‖ / ‖b‖ from a fresh product with each solution; 0 where b is 0.
    iterations: [Q] int, of conjugate gradients.
    converged: [Q] bool, whether `relative` is within the tolerance.
  """

  relative: np.ndarray
  iterations: np.ndarray
  converged: np.ndarray


@dataclasses.dataclass(frozen=True)
class Solver:
  """How (H + λI) x = b is solved.

  Attributes:
    tolerance: relative residual to reach, in (0, 1).
    max_iterations: for each right-hand side; each is one product.
    precision: of the products, "float32" or "float64". A float32 product is right to some 1e-6 of
      the largest eigenvalue of H, so that a damping far below that is lost in its rounding and
      solves stall: "float64" computes the network in float64 on the same float32 draws.
    sketch_rank: r > 0 takes r products once for a Nyström preconditioner, r vectors in memory. It
      pays where H has more than a few hundred eigenvalues above the damping: then take as many. 0:
      preconditioned by whatever `solve` is given.
  """

  tolerance: float = 1e-4
  max_iterations: int = 200
  precision: str = "float32"
  sketch_rank: int = 0

  def __post_init__(self):
    if self.precision not in PRECISIONS:
      raise ValueError(f"Unknown precision {self.precision!r}; there are: {', '.join(PRECISIONS)}.")
    if not 0 < self.tolerance < 1:
      raise ValueError(f"tolerance must lie between 0 and 1; got {self.tolerance}.")
    if self.max_iterations < 1:
      raise ValueError(f"max_iterations must be at least 1; got {self.max_iterations}.")
    if self.sketch_rank < 0:
      raise ValueError(f"sketch_rank must not be negative; got {self.sketch_rank}.")


class GGN:
  """H over (example, draw) rows, restricted to the parameters of `layers`.

  Args:
    model: the model; forward-mode derivatives must pass through its network (no jax.custom_vjp).
    layers: the covered layers, as in `Curvature.layers`; other parameters are constants.
    train: the training examples.
    draws: of (t, ε), num for each example from its seed, as of a fitted curvature.
    solver: how systems are solved, and the precision of products.
    compute: batch_size and devices.
  """

  def __init__(
    self,
    model: DiffusionModel,
    layers: Sequence[Layer],
    train: Examples,
    *,
    draws: Draws,
    solver: Solver | None = None,
    compute: Compute = Compute(),
  ):
    if not layers:
      raise ValueError("layers is empty: there are no parameters to take the GGN of.")
    self._solver = Solver() if solver is None else solver
    self._params, self._layers = model.params, tuple(layers)
    self._dtype = np.dtype(self._solver.precision)
    self._train, self._rows = train, Rows.of(train, draws.num)
    self._seed, self._compute = np.uint32(draws.seed), compute
    self._zeros = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(model.params)]
    self._ends = np.cumsum([math.prod(layer.matrix_shape) for layer in layers])
    marked = self._leaves(np.ones(self._ends[-1]))
    self._covered = tuple(i for i, leaf in enumerate(marked) if np.any(leaf))
    self._kernel = ProductKernel(
      model.apply_fn,
      model.process,
      self._covered,
      augmentation=train.augmentation,
      x64=self._dtype == np.float64,
    )

  @property
  def content(self) -> dict[str, Any]:
    """The examples that it is a mean over."""
    return self._train.arrays("train")

  def multiply(self, grads: Params, damping: float) -> Params:
    """(H + λI) · grads for a pytree shaped like the parameters, as `Curvature.multiply`.

    Returns float64 NumPy arrays, zeros outside the layers.

    Raises:
      ValueError: λ is not positive, or grads has another structure.
    """
    checked_damping(damping)
    expected, got = (jax.tree.map(np.shape, tree) for tree in (self._params, grads))
    if expected != got:
      raise ValueError("grads must be a pytree with the structure and shapes of the parameters.")
    vector = self._vector([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)])
    leaves = self._leaves(self._product(vector) + damping * vector)
    return jax.tree.unflatten(jax.tree.structure(self._params), leaves)

  def solve(
    self,
    rhs: Matrices,
    damping: float,
    *,
    preconditioner: Preconditioner | None = None,
    solver: Solver | None = None,
  ) -> tuple[Matrices, Residuals]:
    """(H + λI)⁻¹ b for Q right-hand sides, by conjugate gradients in float64 on the host.

    Args:
      rhs: b, layer name → [Q, d_out, d_in], such as query gradients.
      damping: λ > 0, in the units of H (squared gradient of the pixel-mean loss).
      preconditioner: gives the first guess and the metric, where there is no sketch; such as a
        fitted `Curvature`.
      solver: tolerance and iterations; those given to the GGN where None.

    Returns:
      Solutions like `rhs`, float64, and their residuals. A solution that misses the tolerance is
      returned too, with a warning in the log.

    Raises:
      ValueError: the arguments are out of range, or rhs does not fit the layers.
    """
    checked_damping(damping)
    solver = self._solver if solver is None else solver
    solutions, relative, iterations = [], [], []
    columns = self._checked_rows(rhs)
    with Progress("exact solves", len(columns), "queries") as progress:
      for b in columns:
        x, count = self._solve_one(b, damping, preconditioner, solver)
        residual = np.linalg.norm(self._product(x) + damping * x - b)
        relative.append(residual / (np.linalg.norm(b) or 1.0))
        solutions.append(x)
        iterations.append(count)
        progress.advance(1, f"residual {relative[-1]:.1e} after {count} iterations")
    converged = np.array(relative) <= solver.tolerance
    if not converged.all():
      _LOG.warning(
        "exact GGN: %d of %d solves missed the tolerance %.1e, with relative residuals up to %.1e "
        "after at most %d iterations. Allow more iterations (max_iterations), raise the damping "
        "(%.1e), or use precision='float64' if it is float32.",
        np.sum(~converged),
        len(converged),
        solver.tolerance,
        np.max(relative),
        max(iterations),
        damping,
      )
    residuals = Residuals(np.array(relative), np.array(iterations), converged)
    return self._matrices(np.stack(solutions)), residuals

  def largest_eigenvalue(self, iterations: int = 20) -> float:
    """The largest eigenvalue of H from below, by that many products of the Lanczos iteration.

    To choose dampings by; mostly right to a percent after 20.
    """
    if iterations < 1:
      raise ValueError(f"iterations must be at least 1; got {iterations}.")
    vector = np.random.default_rng(0).normal(size=self._ends[-1])
    vector /= np.linalg.norm(vector)
    previous, beta = np.zeros_like(vector), 0.0
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    # Without reorthogonalisation, which would need all vectors: it spoils only other eigenvalues.
    for _ in range(iterations):
      product = self._product(vector) - beta * previous
      diagonal.append(vector @ product)
      product -= diagonal[-1] * vector
      beta = float(np.linalg.norm(product))
      if beta <= 1e-6 * max(diagonal):  # nothing but rounding is left
        break
      off_diagonal.append(beta)
      previous, vector = vector, product / beta
    return float(eigvalsh_tridiagonal(diagonal, off_diagonal[: len(diagonal) - 1])[-1])

  @functools.cached_property
  def _sketch(self) -> Nystrom | None:
    rank = min(self._solver.sketch_rank, int(self._ends[-1]))
    if not rank:
      return None
    with Progress("sketch of the GGN", rank, "products") as progress:

      def product(vector):
        result = self._product(vector)
        progress.advance(1)
        return result

      return nystrom(product, int(self._ends[-1]), rank)

  def _solve_one(self, b, damping, preconditioner, solver):
    """(x [P], number of iterations) for b [P]."""
    operator = lambda matvec: LinearOperator((len(b), len(b)), matvec=matvec, dtype=np.float64)
    count = itertools.count()

    def precondition(vector):
      tree = jax.tree.unflatten(jax.tree.structure(self._params), self._leaves(vector))
      return self._vector(jax.tree.leaves(preconditioner.precondition(tree, damping)))

    guess = metric = None
    if self._sketch is not None:
      metric = operator(lambda v: self._sketch.precondition(v, damping))
    elif preconditioner is not None:
      guess, metric = precondition(b), operator(precondition)
    x, _ = cg(
      operator(lambda v: self._product(v) + damping * v),
      b,
      x0=guess,
      M=metric,
      rtol=solver.tolerance / 2,  # of a running residual; rounding parts the true one from it
      maxiter=solver.max_iterations,
      callback=lambda _: next(count),
    )
    return x, next(count)

  def _product(self, vector: np.ndarray) -> np.ndarray:
    """H v for v [P], float64."""
    leaves = self._leaves(vector)
    operand = [np.asarray(leaves[i], self._dtype) for i in self._covered]
    with numerics(self._kernel.x64):
      sums = reduce_batches(
        self._kernel,
        (self._params, operand, self._seed),
        self._rows,
        batch_size=self._compute.batch_size,
        label=None,
        devices=self._compute.devices,
      )
    product = list(self._zeros)
    for i, leaf in zip(self._covered, sums, strict=True):
      product[i] = leaf.astype(np.float64)
    return self._vector(product) / len(self._rows)

  def _vector(self, leaves: list[np.ndarray]) -> np.ndarray:
    """[P] from leaves like the parameters'."""
    matrices = to_matrices(self._layers, leaves)
    return np.concatenate([np.ravel(matrices[layer.name]) for layer in self._layers])

  def _leaves(self, vector: np.ndarray) -> list[np.ndarray]:
    """Leaves like the parameters' from [P], zeros outside the layers."""
    return from_matrices(self._layers, self._matrices(vector), self._zeros)

  def _matrices(self, vectors: np.ndarray) -> Matrices:
    """Layer name → [..., d_out, d_in] from [..., P]."""
    parts = np.split(vectors, self._ends[:-1], axis=-1)
    return {
      layer.name: part.reshape(*vectors.shape[:-1], *layer.matrix_shape)
      for layer, part in zip(self._layers, parts, strict=True)
    }

  def _checked_rows(self, rhs: Matrices) -> np.ndarray:
    """[Q, P] float64."""
    shapes = {name: np.shape(matrices) for name, matrices in rhs.items()}
    num = next(iter(shapes.values()))[:1] if shapes else ()
    expected = {layer.name: (*num, *layer.matrix_shape) for layer in self._layers}
    if shapes != expected or num in ((), (0,)):
      raise ValueError(
        "rhs must hold a matrix [Q, d_out, d_in] for each layer, with one Q > 0: "
        f"{ {layer.name: ('Q', *layer.matrix_shape) for layer in self._layers} }; got {shapes}."
      )
    rows = [np.reshape(rhs[layer.name], (*num, -1)) for layer in self._layers]
    joined = np.concatenate(rows, axis=1).astype(np.float64)
    if not np.isfinite(joined).all():
      raise ValueError("rhs is not finite: check the gradients it is made of.")
    return joined
