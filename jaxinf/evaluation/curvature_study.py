"""How near each approximation of the curvature is to the exact GGN.

All curvatures are of the same (example, draw) pairs, so that what differs is the approximation. For
every damping λ, (H + λI) x = v is solved by conjugate gradients for the gradient v of each query;
an approximation Ĥ gives x̂ = (Ĥ + λI)⁻¹ v. Two numbers a query follow: the relative error
‖x̂ − x‖ / ‖x‖, and the rank correlation of the training examples' scores ⟨x̂, ∇ℓ_n⟩ with ⟨x, ∇ℓ_n⟩.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  DrawGroups,
  gradient_kernel,
  gradient_operands,
  inner_products,
)
from jaxinf.core.random import example_numbers
from jaxinf.core.types import Array, Matrices
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import checked_damping, precondition
from jaxinf.curvature.fit import SKIP_NORMALISATION, fit_curvature
from jaxinf.curvature.ggn import Residuals, Solver
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.model import Task, checked_ids, checked_images
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine import Blocks, map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.layers.register import register

_LOG = logging.getLogger("jaxinf")

# Name → arguments of fit_curvature.
APPROXIMATIONS: Mapping[str, Mapping[str, Any]] = {
  "EK-FAC": dict(method="ekfac"),
  "EK-FAC, 8 targets": dict(method="ekfac", targets=8),
  "EK-FAC, reduce": dict(method="ekfac", sharing="reduce"),
  "K-FAC": dict(method="kfac"),
  "K-FAC, reduce": dict(method="kfac", sharing="reduce"),
  "K-FAC, empirical": dict(method="kfac", estimator="empirical"),
  "diagonal": dict(method="diagonal"),
  "identity": dict(method="identity"),
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
      f"{'cg: largest residual, iterations':32}"
      + "".join(f"{f'{r:.0e}, {i}':>18}" for r, i in solved)
    )
    return "\n".join(lines)


def curvature_study(
  task: Task,
  images: Array,
  queries: Array,
  *,
  dampings: Sequence[float],
  draws: int,
  gradient_draws: int,
  seed: int,
  approximations: Mapping[str, Mapping[str, Any]] = APPROXIMATIONS,
  ids: np.ndarray | None = None,
  query_ids: np.ndarray | None = None,
  skip: Sequence[str] = SKIP_NORMALISATION,
  solver: Solver | None = None,
  batch_size: int = 128,
  devices: Sequence[jax.Device] | None = None,
  keep: Keep | None = None,
) -> CurvatureStudy:
  """Compares approximations with the exact GGN; a few hundred images and a few queries.

  Args:
    task: the model.
    images: [N, H, W, C] training images: the curvatures are of them, and they are scored.
    queries: [Q, H, W, C].
    dampings: λ > 0.
    draws: of (t, ε) for each image, in the curvatures.
    gradient_draws: of (t, ε) for the gradients of queries and images.
    seed: of all draws.
    approximations: name → arguments of `fit_curvature`.
    ids, query_ids: stable ids; row numbers where None.
    skip: regular expressions on parameter paths to leave out.
    solver: of the conjugate gradients.
    batch_size: (image, draw) pairs at a time over all devices.
    devices: local devices; all of them where None.
    keep: keeps solutions, for a study that may be stopped.

  Raises:
    ValueError: the arguments don't fit together.
  """
  dampings = [float(damping) for damping in dampings]
  if not dampings or gradient_draws < 1:
    raise ValueError("The study needs at least one damping and one draw for the gradients.")
  for damping in dampings:
    checked_damping(damping)
  images, queries = checked_images(images), checked_images(queries)
  train = Rows(images, example_numbers(checked_ids(ids, len(images), "ids")))
  asked = Rows(queries, example_numbers(checked_ids(query_ids, len(queries), "query_ids")))
  shared: dict[str, Any] = dict(
    draws=draws, seed=seed, ids=train.ids, skip=skip, batch_size=batch_size, devices=devices
  )
  reference = fit_curvature(task, images, method="cg", solver=solver, **shared)
  model = register(task.apply_fn, task.params, images.shape[1:], reference.selection)
  kernel = gradient_kernel(
    model, LOSS, task.schedule, DrawGroups(seed, gradient_draws, DrawDesign())
  )
  grads = map_batches(
    kernel, gradient_operands(task.params, QUERY), dataclasses.replace(asked, draws=1),
    batch_size=max(1, batch_size // gradient_draws), label="query gradients", devices=devices,
  )  # fmt: skip
  assert reference.exact is not None
  largest = reference.exact.largest_eigenvalue()
  _LOG.info("curvature study: the largest eigenvalue of the exact GGN is about %.2g", largest)
  exact, residuals = _exact_solutions(reference, grads, dampings, keep)
  rows = [exact]  # each layer name → [L, Q, ...]
  for name, options in approximations.items():
    _LOG.info("curvature study: %s", name)
    fitted = fit_curvature(task, images, **shared, **options)
    rows.append(_approximate_solutions(fitted, grads, dampings))
  stacked = {name: np.stack([solutions[name] for solutions in rows]) for name in grads}
  errors = np.stack([_relative_errors(solutions, exact) for solutions in rows[1:]])
  del rows
  matrices = {name: x.reshape(math.prod(x.shape[:3]), -1) for name, x in stacked.items()}
  scores = map_batches(
    kernel, gradient_operands(task.params, TRAIN), dataclasses.replace(train, draws=1),
    label="training gradients", batch_size=max(1, batch_size // gradient_draws), devices=devices,
    then=Blocks(lambda rows, grads: inner_products(grads, rows), [matrices]),
  )  # fmt: skip
  shape = (len(approximations) + 1, len(dampings), len(queries))
  correlations = _rank_correlations(scores.T.reshape(*shape, len(images)))
  return CurvatureStudy(
    names=tuple(approximations),
    dampings=np.array(dampings),
    errors=errors,
    correlations=correlations,
    residuals=np.stack([r.relative for r in residuals]),
    iterations=np.stack([r.iterations for r in residuals]),
    largest_eigenvalue=largest,
    settings=dict(
      num_images=len(images), num_queries=len(queries), draws=draws, seed=seed,
      gradient_draws=gradient_draws, solver=reference.settings["solver"],
      num_parameters=reference.coverage.num_covered,
    ),
  )  # fmt: skip


def _exact_solutions(
  curvature: Curvature, grads: Matrices, dampings: Sequence[float], keep: Keep | None
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
      damping, residual.iterations.max(), residual.relative.max(),
    )  # fmt: skip
  return {name: np.stack([x[name] for x in found]) for name in grads}, residuals


def _solve(curvature: Curvature, grads: Matrices, damping: float) -> Matrices:
  """Layer name → x [Q, ...] float32, and the fields of their residuals."""
  assert curvature.exact is not None
  found, residuals = curvature.exact.solve(grads, damping, preconditioner=curvature.approximation)
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


def _rank_correlations(scores: np.ndarray) -> np.ndarray:
  """[A, L, Q] Spearman's correlations of scores [1 + A, L, Q, N] with the first of them."""
  reference, *others = scores
  correlate = lambda a, b: spearmanr(a, b).statistic
  return np.array(
    [
      [
        [correlate(*pair) for pair in zip(one, other, strict=True)]
        for one, other in zip(reference, approximation, strict=True)
      ]
      for approximation in others
    ]
  )
