"""How systems (H + λI) x = b with the exact GGN are solved, and how well they were."""

import dataclasses
from typing import Any

import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.registry import named

PRECISIONS = ("float32", "float64")
METHODS = ("cg", "stochastic")


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a preconditioner is made of.

  Attributes:
    kronecker: the eigenbases of a fit over all pairs.
    corrected: with the eigenvalues of EK-FAC.
    sketched: the leading directions of the rest, from products with H.
  """

  kronecker: bool = False
  corrected: bool = False
  sketched: bool = False


PRECONDITIONERS: dict[str, Parts] = {
  "none": Parts(),
  "kfac": Parts(kronecker=True),
  "ekfac": Parts(kronecker=True, corrected=True),
  "nystrom": Parts(sketched=True),
  "kfac-nystrom": Parts(kronecker=True, sketched=True),
  "ekfac-nystrom": Parts(kronecker=True, corrected=True, sketched=True),
}


def _added(value: Any) -> Any:
  """A field that came after results were kept, whose keys leave it out at this value."""
  return dataclasses.field(default=value, metadata={"before": value})


@dataclasses.dataclass(frozen=True)
class Solver:
  """How (H + λI) x = b is solved.

  Attributes:
    tolerance: relative residual to reach, in (0, 1).
    max_iterations: for each right-hand side; each is one product. Of the stochastic method, the
      number of its steps.
    precision: of products and preconditioner, "float32" or "float64". A float32 product is right to
      some 1e-6 of the largest eigenvalue of H, so that a damping far below that is lost in its
      rounding and solves stall: "float64" computes the network in float64 on the same float32
      draws.
    sketch_rank: r of a Nyström sketch: r products, once, and r vectors in memory. It pays where H
      has more than a few hundred eigenvalues above the damping: then take as many.
    method: "cg", conjugate gradients with H over all pairs; or "stochastic", preconditioned steps,
      each with H over pairs of its own: cheap, and as near as its noise allows.
    preconditioner: a name of PRECONDITIONERS. None: "nystrom" for conjugate gradients where there
      is a sketch_rank, otherwise "ekfac".
    step_pairs: (example, draw) pairs of a stochastic step, with draws that no other step has; where
      they are as many as all, every step has H over all pairs.
    learning_rate: α of a stochastic step, less where it could diverge; None: as large as is safe.
    momentum: of stochastic steps, in [0, 1).
    decay: factor of α over a hundred stochastic steps, in (0, 1].

  Raises:
    ValueError: an unknown name, or a number out of its range.
  """

  tolerance: float = 1e-4
  max_iterations: int = 200
  precision: str = "float32"
  sketch_rank: int = 0
  method: str = _added("cg")
  preconditioner: str | None = _added(None)
  step_pairs: int = _added(64)
  learning_rate: float | None = _added(None)
  momentum: float = _added(0.9)
  decay: float = _added(0.9)

  def __post_init__(self):
    named(dict.fromkeys(PRECISIONS), self.precision, "precision")
    named(dict.fromkeys(METHODS), self.method, "method of solving")
    checked_count(self.max_iterations, "max_iterations")
    checked_count(self.sketch_rank, "sketch_rank", least=0)
    checked_count(self.step_pairs, "step_pairs")
    if not 0 < self.tolerance < 1:
      raise ValueError(f"tolerance must lie between 0 and 1; got {self.tolerance}.")
    if self.learning_rate is not None and not self.learning_rate > 0:
      raise ValueError(f"learning_rate must be positive, or None; got {self.learning_rate}.")
    if not 0 <= self.momentum < 1:
      raise ValueError(f"momentum must be at least 0 and less than 1; got {self.momentum}.")
    if not 0 < self.decay <= 1:
      raise ValueError(f"decay must be more than 0 and at most 1; got {self.decay}.")
    if self.parts.sketched and not self.sketch_rank:
      raise ValueError(
        f"The preconditioner {self.preconditioner!r} is made of a sketch: give a sketch_rank, such "
        "as 500."
      )

  @property
  def parts(self) -> Parts:
    """Of the preconditioner."""
    sketched = self.method == "cg" and self.sketch_rank
    name = self.preconditioner or ("nystrom" if sketched else "ekfac")
    return named(PRECONDITIONERS, name, "preconditioner")

  @property
  def settings(self) -> dict[str, Any]:
    """The fields as JSON, but those that came later and have the value from before."""
    each = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
    return {f.name: v for f, v in each if "before" not in f.metadata or v != f.metadata["before"]}


@dataclasses.dataclass(frozen=True)
class Residuals:
  """How well Q systems (H + λI) x = b were solved.

  Attributes:
    relative: [Q] ‖(H + λI) x − b‖ / ‖b‖ with H over all pairs, by a fresh product with each
      solution; 0 where b is 0. Of the stochastic method estimated, from two fresh samples of pairs.
    iterations: [Q] int, each of one product: of conjugate gradients, or steps.
    converged: [Q] bool, whether `relative` is within the tolerance.
  """

  relative: np.ndarray
  iterations: np.ndarray
  converged: np.ndarray
