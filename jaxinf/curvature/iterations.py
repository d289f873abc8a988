"""Iterations for R systems A x = b at once, with A = H + λI symmetric and positive definite.

The systems are rows: b, x … are [R, P], float64 on the host. A is known by its products with rows,
and M ≈ A by the rows M⁻¹ v. Each system has step lengths of its own, so that a row's numbers do not
depend on the others; they go in lockstep because a product with many rows costs less than as many
products with one. Both iterations yield after each round of products, between which their state may
be saved.

Conjugate gradients: Hestenes and Stiefel (1952). Stochastic steps: preconditioned gradient descent
on ½ xᵀA x − bᵀx with a new sample of H in each (ASTRA, Wang et al. 2025).
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Linear = Callable[[np.ndarray], np.ndarray]  # rows [R, P] → rows [R, P], each by itself

# The size of residuals in the norm of M⁻¹, against that of the first, from which stochastic steps
# are said to diverge: their noise is a few times the first residual, and divergence is exponential.
_GROWTH = 100.0
_HUNDRED = 100  # steps in which α shrinks by the factor `decay`


@dataclasses.dataclass
class Iterate:
  """Where R iterations stand; all that one needs to go on.

  Attributes:
    x: [R, P] solutions so far.
    residual: [R, P] b − A x, as the iteration updates it; of a stochastic step's own A.
    direction: [R, P] of the last or next step.
    energy: [R] rᵀM⁻¹r of the residual; of the first one in stochastic steps.
    iterations: [R] int.
  """

  x: np.ndarray
  residual: np.ndarray
  direction: np.ndarray
  energy: np.ndarray
  iterations: np.ndarray

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The fields by name."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def begin(
  metric: Linear, b: np.ndarray, warm: tuple[np.ndarray, np.ndarray] | None = None
) -> Iterate:
  """The start of conjugate gradients: each row at 0, or at a warm start where that is nearer.

  Args:
    metric: v → M⁻¹ v.
    b: [R, P] right-hand sides.
    warm: x and its residuals b − A x, [R, P] each, such as the solutions at another damping. Near
      is what has little rᵀM⁻¹r, which is the squared error in the norm of A if M is A.
  """
  residual, direction = b.copy(), metric(b)
  x, energy = np.zeros_like(b), dots(b, direction)
  if warm is not None:
    near = metric(warm[1])
    better = dots(warm[1], near) < energy
    for rows, others in ((x, warm[0]), (residual, warm[1]), (direction, near)):
      rows[better] = others[better]
    energy = dots(residual, direction)
  return Iterate(x, residual, direction, energy, np.zeros(len(b), np.int64))


def conjugate_gradients(
  product: Linear,
  metric: Linear,
  b: np.ndarray,
  at: Iterate,
  *,
  tolerance: float,
  max_iterations: int,
) -> Iterator[None]:
  """Goes on from `at`, in place, until each row has converged, stalls, or has had its iterations.

  A row has converged when its running residual is within half of the tolerance, because rounding
  parts the true one from it. It stalls where rounding leaves no direction in which A is positive.

  Args:
    product: v → A v, of the rows that are still to be solved.
    metric: v → M⁻¹ v.
    b: [R, P] right-hand sides.
    at: from `begin`, or as it was saved.
    tolerance: of ‖b − A x‖ / ‖b‖.
    max_iterations: of each row.
  """
  goal = tolerance / 2 * norms(b)
  while True:
    going = (norms(at.residual) > goal) & (at.iterations < max_iterations) & (at.energy > 0)
    rows = np.flatnonzero(going)
    if not len(rows):
      return
    direction, energy = at.direction[rows], at.energy[rows]
    image = product(direction)
    curving = dots(direction, image)
    positive = curving > 0
    step = np.divide(energy, curving, out=np.zeros_like(energy), where=positive)[:, None]
    at.x[rows] += step * direction
    residual = at.residual[rows] - step * image
    descent = metric(residual)
    left = dots(residual, descent)
    at.residual[rows] = residual
    at.direction[rows] = descent + (left / energy)[:, None] * direction
    at.energy[rows] = np.where(positive, left, 0)
    at.iterations[rows] += 1
    yield


def stochastic_steps(
  sample: Callable[[int, np.ndarray], np.ndarray],
  metric: Linear,
  b: np.ndarray,
  at: Iterate,
  *,
  learning_rate: float,
  momentum: float,
  decay: float,
  num_steps: int,
) -> Iterator[None]:
  """u ← μ u + M⁻¹ (b − A_k x),  x ← x + α_k u from `at`, in place, up to step `num_steps`.

  Args:
    sample: (k, v) → A_k v, where A_k is A over a sample of pairs.
    metric: v → M⁻¹ v.
    b: [R, P] right-hand sides.
    at: from `first_guess`, or as it was saved.
    learning_rate: α_0; α_k shrinks by `decay` in every hundred steps.
    momentum: μ.
    decay: of α.
    num_steps: in all, with those that `at` has had.

  Raises:
    ValueError: residuals grow, or are not finite.
  """
  for number in range(int(at.iterations.max(initial=0)), num_steps):
    at.residual[:] = b - sample(number, at.x)
    descent = metric(at.residual)
    energy = dots(at.residual, descent)
    if number == 0:
      at.energy[:] = energy
    _check_growth(energy, at.energy, number)
    at.direction *= momentum
    at.direction += descent
    at.x += learning_rate * decay ** (number / _HUNDRED) * at.direction
    at.iterations += 1
    yield


def first_guess(metric: Linear, b: np.ndarray) -> Iterate:
  """The start of stochastic steps: x = M⁻¹ b."""
  zeros = np.zeros_like(b)
  return Iterate(metric(b), zeros, zeros.copy(), np.zeros(len(b)), np.zeros(len(b), np.int64))


def largest_ratio(
  product: Linear, metric: Linear, start: np.ndarray, iterations: int = 20
) -> float:
  """The largest eigenvalue of M⁻¹A from below, by the power iteration from rows [R, P].

  The iteration is u ← A M⁻¹ u, and the Rayleigh quotient that of the inner product ⟨u, M⁻¹ v⟩.
  """
  found, rows = 0.0, start
  for _ in range(iterations):
    z = metric(rows)
    image = product(z)
    found = max(found, float(np.max(dots(z, image) / dots(rows, z))))
    rows = image / np.maximum(norms(image), np.finfo(np.float64).tiny)[:, None]
  return found


def norms(rows: np.ndarray) -> np.ndarray:
  """[R] of rows [R, P]."""
  return np.linalg.norm(rows, axis=-1)


def dots(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
  """[R] inner products of rows [R, P]."""
  return np.einsum("rp,rp->r", rows, others)


def _check_growth(energy: np.ndarray, first: np.ndarray, number: int) -> None:
  if not np.isfinite(energy).all() or (energy > _GROWTH**2 * first).any():
    raise ValueError(
      f"The stochastic solves diverge: after {number} steps, residuals are not finite or more than "
      f"{_GROWTH:g} times those of the first step. Take more pairs in a step (step_pairs), a "
      "smaller learning_rate, less momentum, or a larger damping."
    )
