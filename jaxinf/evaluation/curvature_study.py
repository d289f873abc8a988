"""How near each approximation of the curvature is to the exact GGN.

All curvatures are of the same (example, draw) pairs, so that what differs is the approximation. For
every damping λ, (H + λI) x = v is solved by conjugate gradients for the gradient v of each query;
an approximation Ĥ gives x̂ = (Ĥ + λI)⁻¹ v. Two numbers a query follow: the relative error
‖x̂ − x‖ / ‖x‖, and the rank correlation of the training examples' scores ⟨x̂, ∇ℓ_n⟩ with ⟨x, ∇ℓ_n⟩.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  GradientKernel,
  PlainProducts,
  Replicate,
  row_operands,
)
from jaxinf.core.checks import checked_dampings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.types import Matrices
from jaxinf.curvature.curvature import Curvature, ExactCurvature
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.curvature.kinds import EKFAC, KFAC, Diagonal, ExactGGN, Identity, Kind
from jaxinf.curvature.solver import Residuals, Solver
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import Blocks, map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.register import layers_of
from jaxinf.scores.statistics import spearman

_LOG = logging.getLogger("jaxinf")

APPROXIMATIONS: Mapping[str, Kind] = {
  "EK-FAC": EKFAC(),
  "EK-FAC, 8 targets": EKFAC(samples=8),
  "EK-FAC, reduce": EKFAC("reduce"),
  "K-FAC": KFAC(),
  "K-FAC, reduce": KFAC("reduce"),
  "K-FAC, empirical": KFAC(fisher="empirical"),
  "diagonal": Diagonal(),
  "identity": Identity(),
}

# Keeps arrays by name: (name, compute) → compute(), or what it gave before.
Keep = Callable[[str, Callable[[], Matrices]], Matrices]


@dataclasses.dataclass(frozen=True)
class CurvatureStudy:
  """What the study found for A approximations, L dampings and Q queries.

  Attributes:
    names: [A] of the approximations.
    dampings: [L] λ, in squared gradients of the pixel-mean loss.
    errors: [A, L, Q] relative errors of x̂.
    correlations: [A, L, Q] Spearman's rank correlations of scores.
    residuals: [L, Q] relative residuals of the conjugate gradients.
    iterations: [L, Q] that they took.
    largest_eigenvalue: of the exact GGN, from below.
    settings: how it was made.
  """

  names: tuple[str, ...]
  dampings: np.ndarray
  errors: np.ndarray
  correlations: np.ndarray
  residuals: np.ndarray
  iterations: np.ndarray
  largest_eigenvalue: float
  settings: Mapping[str, Any]

  def table(self) -> str:
    """Means over queries as aligned text: relative error, then rank correlation."""
    head = "".join(f"{f'λ = {damping:.0e}':>18}" for damping in self.dampings)
    lines = [f"{'‖x̂ − x‖ / ‖x‖, rank correlation':32}{head}"]
    for name, errors, correlations in zip(self.names, self.errors, self.correlations, strict=True):
      cells = zip(errors.mean(1), correlations.mean(1), strict=True)
      lines.append(f"{name:32}" + "".join(f"{f'{e:.3g}, {c:.3f}':>18}" for e, c in cells))
    solved = zip(self.residuals.max(1), self.iterations.max(1), strict=True)
    lines.append(
      f"{'exact: largest residual, iterations':32}"
      + "".join(f"{f'{r:.0e}, {i}':>18}" for r, i in solved)
    )
    return "\n".join(lines)


def curvature_study(
  fit: Callable[[Kind], Curvature],
  *,
  queries: Examples,
  train: Examples,
  dampings: Sequence[float],
  gradient_draws: Draws,
  kinds: Mapping[str, Kind] = APPROXIMATIONS,
  solver: Solver = Solver(),
  compute: Compute = Compute(),
  keep: Keep | None = None,
) -> CurvatureStudy:
  """Compares approximations with the exact GGN; a few hundred examples and a few queries.

  Args:
    fit: kind → the curvature of that kind, as functools.partial(fit_curvature, model, train, …).
    queries: a few.
    train: the curvatures are of them, and they are scored.
    dampings: λ > 0.
    gradient_draws: of (t, ε) for the gradients of queries and training examples.
    kinds: name → kind of curvature that is compared.
    solver: of the conjugate gradients.
    compute: how gradients are computed.
    keep: keeps solutions, for a study that may be stopped.

  Raises:
    ValueError: the arguments don't fit together.
  """
  dampings = checked_dampings(dampings)
  check_alike(queries, train)
  reference = fit(ExactGGN(solver))
  assert isinstance(reference, ExactCurvature)
  one = dataclasses.replace(gradient_draws, replicates=1)
  gradients = _Gradients(reference, one, compute)
  grads = gradients.of(queries, QUERY, "query gradients")
  largest = reference.ggn.largest_eigenvalue()
  _LOG.info("curvature study: the largest eigenvalue of the exact GGN is about %.2g", largest)
  exact, residuals = _exact_solutions(reference, grads, dampings, keep)
  rows = [exact]  # each layer name → [L, Q, ...]
  for name, kind in kinds.items():
    _LOG.info("curvature study: %s", name)
    rows.append(_approximate_solutions(fit(kind), grads, dampings))
  stacked = {name: np.stack([solutions[name] for solutions in rows]) for name in grads}
  errors = np.stack([_relative_errors(solutions, exact) for solutions in rows[1:]])
  del rows
  matrices = {name: x.reshape(-1, *x.shape[3:]) for name, x in stacked.items()}
  scores = gradients.of(train, TRAIN, "training gradients", Blocks(PlainProducts(), [matrices]))
  shape = (len(kinds) + 1, len(dampings), len(queries), len(train))
  reference_scores, *others = scores.T.reshape(shape)
  return CurvatureStudy(
    names=tuple(kinds),
    dampings=np.array(dampings),
    errors=errors,
    correlations=np.stack([spearman(reference_scores, other) for other in others]),
    residuals=np.stack([r.relative for r in residuals]),
    iterations=np.stack([r.iterations for r in residuals]),
    largest_eigenvalue=largest,
    settings={
      "num_images": len(train),
      "num_queries": len(queries),
      "draws": reference.settings["draws"],
      "seed": reference.settings["seed"],
      "gradient_draws": gradient_draws.num,
      "solver": dataclasses.asdict(solver),
      "num_parameters": reference.coverage.num_covered,
    },
  )


@dataclasses.dataclass(frozen=True)
class _Gradients:
  """Gradients of examples, one replicate each."""

  curvature: Curvature
  draws: Draws
  compute: Compute

  def of(self, examples: Examples, stream: str, label: str, then: Blocks | None = None) -> Any:
    """Layer name → [n, …], or what a second kernel makes of them."""
    model = self.curvature.model
    layers = layers_of(model, examples, self.curvature.selection)
    replicate = Replicate.of(self.draws, examples.augmentation)
    return map_batches(
      GradientKernel(layers, LOSS, model.process, replicate),
      row_operands(model.params, self.draws, stream),
      Rows.of(examples, 1),
      batch_size=self.compute.rows(self.draws),
      label=label,
      devices=self.compute.devices,
      then=then,
    )


def _exact_solutions(
  curvature: ExactCurvature, grads: Matrices, dampings: Sequence[float], keep: Keep | None
) -> tuple[Matrices, list[Residuals]]:
  """Layer name → x [L, Q, ...] float32, and how well they solve."""
  found, residuals = [], []
  for damping in dampings:
    solve = functools.partial(_solve, curvature, grads, damping)
    solved = solve() if keep is None else keep(f"damping-{damping:e}", solve)
    found.append({name: solved[name] for name in grads})
    residual = Residuals(*(solved[f"residuals.{f.name}"] for f in dataclasses.fields(Residuals)))
    residuals.append(residual)
    _LOG.info(
      "curvature study: λ = %.1e solved in at most %d iterations, residuals up to %.1e",
      damping,
      residual.iterations.max(),
      residual.relative.max(),
    )
  return {name: np.stack([x[name] for x in found]) for name in grads}, residuals


def _solve(curvature: ExactCurvature, grads: Matrices, damping: float) -> Matrices:
  """Layer name → x [Q, ...] float32, and the fields of their residuals."""
  found, residuals = curvature.ggn.solve(grads, damping, preconditioner=curvature.approximation)
  single = {name: np.asarray(x, np.float32) for name, x in found.items()}
  fields = dataclasses.asdict(residuals)
  return single | {f"residuals.{name}": values for name, values in fields.items()}


def _approximate_solutions(
  curvature: Curvature, grads: Matrices, dampings: Sequence[float]
) -> Matrices:
  """Layer name → x̂ [L, Q, ...] float32, computed in float64."""
  return {
    name: np.stack(
      [
        precondition(v.astype(np.float64), curvature.bases[name], damping).astype(np.float32)
        for damping in dampings
      ]
    )
    for name, v in grads.items()
  }


def _relative_errors(solutions: Matrices, exact: Matrices) -> np.ndarray:
  """[L, Q] ‖x̂ − x‖ / ‖x‖ over all layers."""
  rest = lambda x: tuple(range(2, x.ndim))
  squares = lambda x: np.sum(np.square(x, dtype=np.float64), axis=rest(x))
  wrong = sum(squares(solutions[name] - exact[name]) for name in exact)
  return np.sqrt(wrong / sum(squares(x) for x in exact.values()))
