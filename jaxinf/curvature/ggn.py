"""The exact GGN, by products with vectors: the referee of all approximations.

Over M (example, draw) pairs the GGN is H = (1/M) Σ (2 w_t/D) JᵀJ, with D the number of the
network's outputs, w_t the weight of the loss, and J = ∂output/∂θ over the parameters of all covered
layers together. Nothing between layers is dropped. Only (t, ε) are sampled, and these draws are the
ones of `fit_curvature`.

A product H v is a forward-mode and a reverse-mode derivative of each batch; those with several
vectors share the linearised network. (H + λI) x = b is solved for all right-hand sides together, by
conjugate gradients or stochastic steps, preconditioned by a fitted curvature, a sketch or both. A
product costs a pass over all pairs for each right-hand side, and a solve takes dozens of them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from jaxinf.core.arrays import read_rows
from jaxinf.core.checks import checked_damping, checked_dampings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Eigenbasis, Matrices, Params
from jaxinf.curvature.metrics import Kronecker, Sketch
from jaxinf.curvature.products import AT_ONCE, ProductKernel
from jaxinf.curvature.solver import Residuals, Solver
from jaxinf.curvature.solves import Solves
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import Checkpointing, PartialState
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import numerics
from jaxinf.engine.progress import Progress
from jaxinf.engine.reductions import reduce_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.specs import Layer, from_matrices, to_matrices

_SKETCHED = 64  # vectors of a sketch whose products are made, and kept, together


class Preconditioner(Protocol):
  """An approximation of H, block-diagonal in eigenbases, as `Curvature` is."""

  @property
  def bases(self) -> Mapping[str, Eigenbasis]: ...


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
    self._model, self._layers = model, tuple(layers)
    self._dtype = np.dtype(self._solver.precision)
    self._train, self._rows = train, Rows.of(train, draws.num)
    self._draws, self._compute = draws, compute
    self._zeros = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(model.params)]
    self._ends = np.cumsum([math.prod(layer.matrix_shape) for layer in layers])
    self.size, self.num_pairs = int(self._ends[-1]), len(self._rows)
    self.batch_size = compute.batch_size
    marked = self._leaves(np.ones(self.size))
    self._covered = tuple(i for i, leaf in enumerate(marked) if np.any(leaf))
    self._kernel = ProductKernel(
      model.apply_fn,
      model.process,
      self._covered,
      augmentation=train.augmentation,
      x64=self._dtype == np.float64,
    )
    self._prepared: _Prepared | None = None

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
    params = self._model.params
    expected, got = (jax.tree.map(np.shape, tree) for tree in (params, grads))
    if expected != got:
      raise ValueError("grads must be a pytree with the structure and shapes of the parameters.")
    vector = self._vectors([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)])
    leaves = self._leaves(self._product(vector) + damping * vector)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)

  def solve(
    self,
    rhs: Matrices,
    damping: float,
    *,
    preconditioner: Preconditioner | None = None,
    solver: Solver | None = None,
    checkpoint: Checkpointing | None = None,
  ) -> tuple[Matrices, Residuals]:
    """(H + λI)⁻¹ b for Q right-hand sides, in float64 but for the products.

    Args:
      rhs: b, layer name → [Q, d_out, d_in], such as query gradients.
      damping: λ > 0, in the units of H (squared gradient of the pixel-mean loss).
      preconditioner: for solvers that take eigenbases; such as a fitted `Curvature`. None: none,
        where the solver names none.
      solver: how; the one given to the GGN where None, whose precision counts in any case.
      checkpoint: where unfinished solves are kept and gone on from.

    Returns:
      Solutions like `rhs`, float64, and their residuals. A solution that misses the tolerance is
      returned too, with a warning in the log.

    Raises:
      ValueError: the arguments are out of range, rhs does not fit the layers, the solver's
        preconditioner is missing, or stochastic steps diverge.
    """
    ((_, found, residuals),) = self.solutions(
      rhs, (damping,), preconditioner=preconditioner, solver=solver, checkpoint=checkpoint
    )
    return found, residuals

  def solutions(
    self,
    rhs: Matrices,
    dampings: Sequence[float],
    *,
    preconditioner: Preconditioner | None = None,
    solver: Solver | None = None,
    checkpoint: Checkpointing | None = None,
  ) -> Iterator[tuple[float, Matrices, Residuals]]:
    """Yields (λ, solutions, residuals) of `solve` for several dampings, from the largest down.

    Conjugate gradients start from the solutions of the damping before, where these are near.
    """
    for damping in dampings:
      checked_damping(damping)
    dampings = checked_dampings(dampings)
    solver = self._solver if solver is None else solver
    rows = self._checked_rows(rhs)
    bases = self._bases(solver, preconditioner)
    key = {} if checkpoint is None else self._key
    kronecker, sketch = None, None
    if solver.parts.sketched or bases is not None:
      if self._prepared is None or not self._prepared.serves(solver, bases):
        kronecker = Kronecker(self._layers, bases, self._solver.precision)
        if solver.parts.sketched:  # at the least damping, where it is needed most
          sketch = self._sketch(kronecker, solver.sketch_rank, min(dampings), checkpoint, key)
        self._prepared = _Prepared(bases, solver.sketch_rank, kronecker, sketch)
      kronecker, sketch = self._prepared.kronecker, self._prepared.sketch
    solves = Solves(self, solver, kronecker, sketch, checkpoint, key)
    for damping, x, residuals in solves.descending(rows, dampings):
      yield damping, self._matrices(x), residuals

  def largest_eigenvalue(self, iterations: int = 20) -> float:
    """The largest eigenvalue of H from below, by that many products of the Lanczos iteration.

    To choose dampings by; mostly right to a percent after 20.
    """
    if iterations < 1:
      raise ValueError(f"iterations must be at least 1; got {iterations}.")
    vector = np.random.default_rng(0).normal(size=self.size)
    vector /= np.linalg.norm(vector)
    previous, beta = np.zeros_like(vector), 0.0
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    # Without reorthogonalisation, which would need all vectors: it spoils only other eigenvalues.
    for _ in range(iterations):
      product = self._product(vector) - beta * previous
      diagonal.append(float(np.vdot(vector, product)))
      product -= diagonal[-1] * vector
      beta = float(np.linalg.norm(product))
      if beta <= 1e-6 * max(diagonal):  # nothing but rounding is left
        break
      off_diagonal.append(beta)
      previous, vector = vector, product / beta
    return float(eigvalsh_tridiagonal(diagonal, off_diagonal[: len(diagonal) - 1])[-1])

  def products(
    self, vectors: np.ndarray, pairs: Rows | None = None, room: int | None = None
  ) -> np.ndarray:
    """H v for rows v [R, P], float64.

    Args:
      vectors: v.
      pairs: that H is a mean over; its own where None.
      room: of how many rows the compiled program is: products of fewer need no other one.
    """
    pairs = self._rows if pairs is None else pairs
    num, size = len(vectors), max(len(vectors), room or 0)
    if size > AT_ONCE:
      size = math.ceil(size / AT_ONCE) * AT_ONCE
    padded = np.zeros((size, self.size), self._dtype)
    padded[:num] = vectors
    leaves = self._leaves(padded)
    operand = [leaves[i] for i in self._covered]
    with numerics(self._kernel.x64):
      sums = reduce_batches(
        self._kernel,
        (self._model.params, operand, np.int32(num), np.uint32(self._draws.seed)),
        pairs,
        batch_size=self._compute.batch_size,
        label=None,
        devices=self._compute.devices,
      )
    found: list[np.ndarray] = list(self._zeros)
    for i, leaf in zip(self._covered, sums, strict=True):
      found[i] = leaf[:num].astype(np.float64)
    return self._vectors(found) / len(pairs)

  def sample(self, number: int, num: int) -> Rows:
    """The number-th sample of `num` pairs, with draws of its own; all pairs where that is fewer.

    Examples are drawn without repeats. Where there are fewer of them than `num`, all have several
    draws, as many pairs in all as whole draws allow.
    """
    if num >= self.num_pairs:
      return self._rows
    each = math.ceil(num / len(self._train))
    rng = np.random.default_rng((self._draws.seed, number))
    chosen = np.sort(rng.choice(len(self._train), num // each, replace=False))
    return Rows(
      read_rows(self._train.data, chosen),
      self._train.numbers[chosen],
      each,
      jax.tree.map(lambda x: read_rows(x, chosen), self._train.conditioning),
      first_draw=self._draws.num + number * each,
    )

  @property
  def _key(self) -> dict[str, Any]:
    """What products depend on, as JSON."""
    return {
      "draws": self._draws.num,
      "seed": self._draws.seed,
      "layers": [layer.name for layer in self._layers],
      "precision": self._solver.precision,
      **content_of(self._model, train=self._train),
    }

  def _bases(
    self, solver: Solver, preconditioner: Preconditioner | None
  ) -> Mapping[str, Eigenbasis] | None:
    """The eigenbases that the solver takes, or None."""
    if not solver.parts.kronecker or (preconditioner is None and solver.preconditioner is None):
      return None
    if preconditioner is None:
      raise ValueError(
        f"The preconditioner {solver.preconditioner!r} takes a fitted curvature: give one, or take "
        "the preconditioner none or nystrom."
      )
    return preconditioner.bases

  def _sketch(
    self,
    kronecker: Kronecker,
    rank: int,
    damping: float,
    checkpoint: Checkpointing | None,
    key: Mapping[str, Any],
  ) -> Sketch:
    """Of what K misses, by `rank` products, each group of which is kept when it is made."""
    rank, done = min(rank, self.size), 0
    group = min(rank, _SKETCHED)
    label = processes.label("sketch of the GGN")
    with Progress(label, rank, "products") as progress:

      def products(rows: np.ndarray) -> np.ndarray:
        nonlocal done
        kept, saved = None, None
        if checkpoint is not None:
          path = checkpoint.path(f"sketch-{done:06d}.npz")
          kept = PartialState(path, {**key, "rank": rank, "damping": damping}, checkpoint.every)
          saved = kept.load()
        found = self.products(rows, room=group) if saved is None else saved["products"]
        if kept is not None and saved is None:
          kept.save({"products": found})
        done += len(rows)
        progress.advance(len(rows))
        return found

      return Sketch.of(
        products, kronecker, size=self.size, rank=rank, damping=damping, rows_at_once=group
      )

  def _product(self, vector: np.ndarray) -> np.ndarray:
    """H v for v [P], float64."""
    return self.products(vector[None])[0]

  def _vectors(self, leaves: list[np.ndarray]) -> np.ndarray:
    """[…, P] from leaves like the parameters', with axes … in front."""
    matrices = to_matrices(self._layers, leaves)
    lead = lambda layer: matrices[layer.name].ndim - len(layer.matrix_shape)
    flat = [matrices[x.name].reshape(*matrices[x.name].shape[: lead(x)], -1) for x in self._layers]
    return np.concatenate(flat, axis=-1)

  def _leaves(self, vectors: np.ndarray) -> list[np.ndarray]:
    """Leaves like the parameters' from […, P], zeros outside the layers."""
    return from_matrices(self._layers, self._matrices(vectors), self._zeros)

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


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A preconditioner's parts, made once for all solves that take the same."""

  bases: Mapping[str, Eigenbasis] | None
  rank: int
  kronecker: Kronecker
  sketch: Sketch | None

  def serves(self, solver: Solver, bases: Mapping[str, Eigenbasis] | None) -> bool:
    """Whether they are what such a solver takes."""
    if self.bases is not bases or solver.parts.sketched != (self.sketch is not None):
      return False
    return self.sketch is None or self.rank == solver.sketch_rank
