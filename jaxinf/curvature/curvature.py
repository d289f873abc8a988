"""The fitted curvature of a model, in eigenbases."""

import dataclasses

import jax
import numpy as np

from jaxinf.core.types import Eigenbasis, Params
from jaxinf.curvature.eigenbasis import checked_damping, multiply, precondition
from jaxinf.curvature.ggn import GGN
from jaxinf.diffusion.model import Task
from jaxinf.layers.coverage import Coverage, Selection
from jaxinf.layers.specs import Layer, from_matrices, to_matrices


@dataclasses.dataclass(frozen=True, repr=False)
class Curvature:
  """The fitted curvature H ≈ GGN: block-diagonal over layers, diagonal in each one's eigenbasis.

  Attributes:
    layers: the covered layers.
    bases: layer name → its eigenbasis.
    coverage: what became of every parameter.
    task: what it was fitted for.
    settings: how it was fitted.
    diagnostics: layer name → its negative eigenvalues, clipped to zero, where there were any.
    exact: the GGN itself, which then solves for `precondition` with the bases as preconditioner
      (method "cg"); None for the approximations.
  """

  layers: tuple[Layer, ...]
  bases: dict[str, Eigenbasis]
  coverage: Coverage
  task: Task
  settings: dict
  diagnostics: dict = dataclasses.field(default_factory=dict)
  exact: GGN | None = None

  def __repr__(self) -> str:
    return f"Curvature({len(self.layers)} layers: {self.coverage.summary()}; {self.settings})"

  @property
  def selection(self) -> Selection:
    """Which parameters it covers, and how."""
    return Selection(*(self.settings[field.name] for field in dataclasses.fields(Selection)))

  @property
  def approximation(self) -> "Curvature":
    """The curvature of the bases alone, which preconditions the exact one."""
    return dataclasses.replace(self, exact=None)

  def multiply(self, grads: Params, damping: float) -> Params:
    """(H + λI) · grads for a pytree shaped like the parameters; zeros outside the curvature.

    In float64 on the host, and so returned: at a damping far below the largest eigenvalue, float32
    could not tell the small eigendirections from the rounding of the large ones.
    """
    if self.exact is not None:
      return self.exact.multiply(grads, damping)
    return self._apply(multiply, grads, damping)

  def precondition(self, grads: Params, damping: float) -> Params:
    """(H + λI)⁻¹ · grads; otherwise as `multiply`, whose inverse it is inside the curvature."""
    if self.exact is None:
      return self._apply(precondition, grads, damping)
    one_row = {name: matrix[None] for name, matrix in to_matrices(self.layers, grads).items()}
    solved, _ = self.exact.solve(one_row, damping, preconditioner=self.approximation)
    zeros = jax.tree.map(np.zeros_like, grads)
    return from_matrices(self.layers, {name: m[0] for name, m in solved.items()}, zeros)

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
