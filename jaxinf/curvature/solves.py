"""Solves with the exact GGN, of all right-hand sides at once, one damping after another."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxinf.curvature.iterations import (
  Iterate,
  Linear,
  begin,
  conjugate_gradients,
  dots,
  first_guess,
  largest_ratio,
  norms,
  stochastic_steps,
)
from jaxinf.curvature.metrics import Kronecker, Metric, Sketch
from jaxinf.curvature.products import AT_ONCE
from jaxinf.curvature.solver import Residuals, Solver
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import Checkpointing, PartialState
from jaxinf.engine.progress import Progress
from jaxinf.engine.worklist import Rows

_LOG = logging.getLogger("jaxinf")

# Of the right-hand sides that are solved together, on the devices. In float64 on the host they and
# what an iteration keeps of them are some ten times as much. At least AT_ONCE are solved together.
_BLOCK_BYTES = 2**28
_CHECKED = 16  # steps' pairs in each of the two samples that tell a stochastic solve's residual
_FRESH = 100_000  # number of the first of these samples, which no step has


class Products(Protocol):
  """H by its products, as `GGN` is."""

  size: int  # P
  num_pairs: int
  batch_size: int

  def products(
    self, vectors: np.ndarray, pairs: Rows | None = None, room: int | None = None
  ) -> np.ndarray:
    """H v for rows v [R, P], over some pairs or all, by a program for `room` of them."""

  def sample(self, number: int, num: int) -> Rows:
    """The number-th sample of so many pairs."""


@dataclasses.dataclass(frozen=True)
class Solves:
  """Solves of one kind.

  Attributes:
    ggn: H.
    solver: how.
    kronecker: K of the preconditioner.
    sketch: of what K misses, or None.
    checkpoint: where unfinished solves are kept, or None.
    key: what they depend on, besides the solver, damping and right-hand sides.
  """

  ggn: Products
  solver: Solver
  kronecker: Kronecker | None
  sketch: Sketch | None
  checkpoint: Checkpointing | None
  key: Mapping[str, Any]

  def descending(
    self, b: np.ndarray, dampings: Sequence[float]
  ) -> Iterator[tuple[float, np.ndarray, Residuals]]:
    """Yields (λ, x [Q, P], how well they solve) for b [Q, P], from the largest λ down.

    Conjugate gradients start at the solution of the damping before, where that is near.
    """
    size = max(AT_ONCE, _BLOCK_BYTES // (4 * self.ggn.size))
    blocks = [slice(i, i + size) for i in range(0, len(b), size)]
    before: list[_Solved | None] = [None] * len(blocks)
    for damping in sorted(dampings, reverse=True):
      metric: Linear = np.array  # a copy
      if self.kronecker is not None:
        metric = Metric(self.kronecker, damping, self.sketch)
      for number, rows in enumerate(blocks):
        kept = self._kept(damping, number)
        system = _System(self.ggn, self.solver, b[rows], damping, metric, kept)
        before[number] = system.solved(before[number])
      done = [solved for solved in before if solved is not None]
      relative = np.concatenate([solved.relative for solved in done])
      iterations = np.concatenate([solved.iterations for solved in done])
      residuals = Residuals(relative, iterations, relative <= self.solver.tolerance)
      self._warn(damping, residuals)
      yield damping, np.concatenate([solved.x for solved in done]), residuals

  def _kept(self, damping: float, block: int) -> PartialState | None:
    """Where the solve of a block is kept; it goes on under another tolerance or more iterations."""
    if self.checkpoint is None:
      return None
    pace = ("tolerance", "max_iterations")
    solver = {name: value for name, value in self.solver.settings.items() if name not in pace}
    key = {**self.key, "solver": solver, "damping": damping, "block": block}
    path = self.checkpoint.path(f"solves-{damping:e}-{block:03d}.npz")
    return PartialState(path, key, self.checkpoint.every)

  def _warn(self, damping: float, residuals: Residuals) -> None:
    """Says which solves missed the tolerance, and what to do."""
    if residuals.converged.all():
      return
    way_out = "raise the damping (%.1e), or use precision='float64' if it is float32"
    if self.solver.method == "stochastic":
      way_out = "take more pairs in a step (step_pairs), or raise the damping (%.1e)"
    _LOG.warning(
      "exact GGN: %d of %d solves missed the tolerance %.1e, with relative residuals up to %.1e "
      f"after at most %d iterations. Allow more iterations (max_iterations), {way_out}.",
      np.sum(~residuals.converged),
      len(residuals.converged),
      self.solver.tolerance,
      np.max(residuals.relative),
      max(residuals.iterations),
      damping,
    )


class _Solved(NamedTuple):
  """Solutions x [R, P] at a damping, their residuals b − A x, and ‖b − A x‖ / ‖b‖ [R]."""

  damping: float
  x: np.ndarray
  residual: np.ndarray
  relative: np.ndarray
  iterations: np.ndarray

  def at(self, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """x, and what its residual is at another damping."""
    return self.x, self.residual + (self.damping - damping) * self.x


@dataclasses.dataclass(frozen=True)
class _System:
  """(H + λI) x = b for a block of right-hand sides [R, P]."""

  ggn: Products
  solver: Solver
  b: np.ndarray
  damping: float
  metric: Linear
  kept: PartialState | None

  def solved(self, before: _Solved | None) -> _Solved:
    """The solutions; conjugate gradients start from those of the damping before, where near."""
    stochastic = self.solver.method == "stochastic"
    at = self._saved()
    if at is None and stochastic:
      at = first_guess(self.metric, self.b)
    elif at is None:
      warm = None if before is None else before.at(self.damping)
      at = begin(self.metric, self.b, warm)
    rounds = self._steps(at) if stochastic else self._conjugate_gradients(at)
    self._run(rounds, at)
    if stochastic and 2 * _CHECKED * self.solver.step_pairs < self.ggn.num_pairs:
      one, other = (self._residual(at.x, self._sample(_FRESH + i, _CHECKED)) for i in range(2))
      residual, squares = one, np.maximum(dots(one, other), 0)  # without the bias of one sample
    else:
      residual = self._residual(at.x)
      squares = dots(residual, residual)
    scale = norms(self.b)
    relative = np.sqrt(squares) / np.where(scale > 0, scale, 1)
    return _Solved(self.damping, at.x, residual, relative, at.iterations)

  def _conjugate_gradients(self, at: Iterate) -> Iterator[None]:
    return conjugate_gradients(
      self._product,
      self.metric,
      self.b,
      at,
      tolerance=self.solver.tolerance,
      max_iterations=self.solver.max_iterations,
    )

  def _steps(self, at: Iterate) -> Iterator[None]:
    """Stochastic steps, of a length at which no product with the first sample can diverge.

    (1 − μ) / L, with L the largest eigenvalue of M⁻¹A there, is half of what would be stable with
    one A and no momentum: as much is left to samples whose L is larger.
    """
    rng = np.random.default_rng(0)
    start = rng.normal(size=(min(AT_ONCE, len(self.b)), self.ggn.size))
    largest = largest_ratio(lambda v: self._product(v, self._sample(0)), self.metric, start)
    safe = (1 - self.solver.momentum) / largest
    asked = self.solver.learning_rate
    if asked is not None and asked > safe:
      _LOG.info("exact GGN: steps of %.1e could diverge; taken are %.1e", asked, safe)
    return stochastic_steps(
      lambda number, v: self._product(v, self._sample(number)),
      self.metric,
      self.b,
      at,
      learning_rate=safe if asked is None else min(asked, safe),
      momentum=self.solver.momentum,
      decay=self.solver.decay,
      num_steps=self.solver.max_iterations,
    )

  def _run(self, rounds: Iterator[None], at: Iterate) -> None:
    """Goes through the rounds, shows and keeps how far they are."""
    most, scale = self.solver.max_iterations, norms(self.b)
    scale = np.where(scale > 0, scale, 1)
    pairs = self.ggn.num_pairs
    if self.solver.method == "stochastic":
      pairs = min(pairs, self.solver.step_pairs)
    batches = math.ceil(pairs / self.ggn.batch_size)
    label = processes.label(f"solves of {len(self.b)} at λ = {self.damping:.1e}")
    with Progress(label, most, "iterations", start=int(at.iterations.max())) as progress:
      for _ in rounds:
        if self.kept is not None:
          self.kept.passed(batches, {"rhs": self.b, **at.arrays})
        relative = norms(at.residual) / scale
        note = f"residuals {np.median(relative):.1e}, largest {relative.max():.1e}"
        progress.advance_to(int(at.iterations.max()), note)
    if self.kept is not None:
      self.kept.save({"rhs": self.b, **at.arrays})

  def _saved(self) -> Iterate | None:
    """Where a solve that was stopped stood."""
    arrays = None if self.kept is None else self.kept.load()
    if arrays is None:
      return None
    b = arrays.pop("rhs")
    # Gradients made anew on other devices differ by float32 rounding.
    if b.shape != self.b.shape or (norms(b - self.b) > 1e-3 * norms(self.b)).any():
      raise ValueError(
        "The unfinished solves that were kept are of other right-hand sides: delete their folder, "
        "or take another, to begin again."
      )
    return Iterate(**arrays)

  def _residual(self, x: np.ndarray, pairs: Rows | None = None) -> np.ndarray:
    """b − A x [R, P], over some pairs or all."""
    return self.b - self._product(x, pairs)

  def _product(self, v: np.ndarray, pairs: Rows | None = None) -> np.ndarray:
    """A v for rows v, over some pairs or all."""
    return self.ggn.products(v, pairs, room=len(self.b)) + self.damping * v

  def _sample(self, number: int, times: int = 1) -> Rows:
    """Pairs of a step, or of so many."""
    return self.ggn.sample(number, times * self.solver.step_pairs)
