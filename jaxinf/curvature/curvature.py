"""The fitted curvature of a model, in eigenbases; and the exact one, which they precondition."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.arrays import fingerprint
from jaxinf.core.checks import checked_damping
from jaxinf.core.damping import Damping, RelativeDamping, of_layer
from jaxinf.core.types import Array, Eigenbasis, Matrices, Params
from jaxinf.curvature.eigenbasis import multiply, precondition
from jaxinf.curvature.ggn import GGN
from jaxinf.curvature.kinds import Kind
from jaxinf.curvature.solver import Residuals
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.engine.kernels import numerics
from jaxinf.layers.coverage import Coverage, Selection
from jaxinf.layers.specs import Layer, from_matrices, to_matrices


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Curvature:
  """The fitted curvature H ≈ GGN: block-diagonal over layers, diagonal in each one's eigenbasis.

  Attributes:
    model: what it was fitted for.
    kind: what of the GGN it keeps.
    layers: the covered layers.
    bases: layer name → its eigenbasis.
    coverage: what became of every parameter.
    selection: which parameters it covers, and how.
    settings: how it was fitted, as JSON.
    diagnostics: layer name → its negative eigenvalues, clipped to zero, where there were any.
  """

  model: DiffusionModel
  kind: Kind
  layers: tuple[Layer, ...]
  bases: Mapping[str, Eigenbasis]
  coverage: Coverage
  selection: Selection
  settings: Mapping[str, Any]
  diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    return (
      f"{type(self).__name__}({self.kind}, {len(self.layers)} layers: {self.coverage.summary()})"
    )

  @property
  def has_eigenbasis(self) -> bool:
    """Whether H is diagonal in the bases, so that gradients can be kept there for any damping."""
    return True

  def check_damping(self, damping: Damping) -> None:
    """Raises ValueError unless the damping is positive, and one that this curvature can have."""
    if not isinstance(damping, RelativeDamping):  # which has checked itself
      checked_damping(damping)

  def damping_in(self, name: str, damping: Damping) -> float:
    """λ of a layer."""
    return of_layer(damping, self.bases[name].eigenvalues)

  def content(self) -> str:
    """A hash of what (H + λI)⁻¹ is made from."""
    return fingerprint(self._arrays())

  def multiply(self, grads: Params, damping: Damping) -> Params:
    """(H + λI) · grads for a pytree shaped like the parameters; zeros outside the curvature.

    With RelativeDamping, each layer has a λ of its own; ExactGGN has none and refuses it.

    In float64 on the host, and so returned: at a damping far below the largest eigenvalue, float32
    could not tell the small eigendirections from the rounding of the large ones.
    """
    return self._apply(multiply, grads, damping)

  def precondition(self, grads: Params, damping: Damping) -> Params:
    """(H + λI)⁻¹ · grads; otherwise as `multiply`, whose inverse it is inside the curvature."""
    return self._apply(precondition, grads, damping)

  def precondition_rows(self, grads: Matrices, damping: Damping) -> Iterator[tuple[str, jax.Array]]:
    """Yields (layer name, (H + λI)⁻¹ ∇) for gradients [B, …, d_out, d_in], layer by layer."""
    for name, matrices in grads.items():
      yield name, _precondition(matrices, self.bases[name], self.damping_in(name, damping))

  def eigenvalues(self, name: str) -> np.ndarray:
    """Λ [(groups,) d_out, d_in] of a layer, float32."""
    return np.asarray(self.bases[name].eigenvalues, np.float32)

  def rotations(self) -> dict[str, Eigenbasis]:
    """Layer name → its eigenbasis in float32, as kernels take it."""
    single = lambda x: None if x is None else np.asarray(x, np.float32)
    return {
      name: Eigenbasis(single(b.q_in), single(b.q_out), single(b.eigenvalues))
      for name, b in self.bases.items()
    }

  def save(self, folder: str | Path) -> None:
    """Writes it to a folder, which `jaxinf.load_curvature(folder, model)` reads."""
    from jaxinf.curvature.saving import save_curvature

    save_curvature(Path(folder), self)

  def _arrays(self) -> dict[str, Any]:
    leaves = jax.tree.leaves(self.bases)
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}

  def _apply(self, function, grads: Params, damping: Damping) -> Params:
    self.check_damping(damping)
    expected, got = (jax.tree.map(np.shape, tree) for tree in (self.model.params, grads))
    if expected != got:
      raise ValueError("grads must be a pytree with the structure and shapes of the parameters.")
    grads = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
    matrices = to_matrices(self.layers, grads)
    applied = {
      name: function(matrix, self.bases[name], self.damping_in(name, damping))
      for name, matrix in matrices.items()
    }
    return from_matrices(self.layers, applied, grads)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ExactCurvature(Curvature):
  """The GGN itself; the bases precondition its solves.

  Attributes:
    ggn: products with it and solves.
  """

  ggn: GGN = None  # type: ignore[assignment]

  @property
  def has_eigenbasis(self) -> bool:
    return False

  @property
  def approximation(self) -> Curvature:
    """The curvature of the bases alone."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Curvature)}
    return Curvature(**fields)

  def check_damping(self, damping: Damping) -> None:
    checked_damping(damping)

  def multiply(self, grads: Params, damping: Damping) -> Params:
    return self.ggn.multiply(grads, checked_damping(damping))

  def precondition(self, grads: Params, damping: Damping) -> Params:
    one_row = {name: matrix[None] for name, matrix in to_matrices(self.layers, grads).items()}
    number = checked_damping(damping)
    solved, _ = self.ggn.solve(one_row, number, preconditioner=self.approximation)
    zeros = jax.tree.map(lambda x: np.zeros(np.shape(x)), grads)
    return from_matrices(self.layers, {name: m[0] for name, m in solved.items()}, zeros)

  def precondition_rows(self, grads: Matrices, damping: Damping) -> Iterator[tuple[str, jax.Array]]:
    ((_, solved, _),) = self.solutions(grads, (checked_damping(damping),))
    yield from solved.items()

  def solutions(
    self, grads: Matrices, dampings: Sequence[float], checkpoint: Checkpointing | None = None
  ) -> Iterator[tuple[float, dict[str, jax.Array], Residuals]]:
    """Yields (λ, (H + λI)⁻¹ ∇ as `precondition_rows`, how well it solves), from the largest λ down.

    Args:
      grads: layer name → [R, …, d_out, d_in].
      dampings: the λ.
      checkpoint: where unfinished solves are kept and gone on from.
    """
    found = self.ggn.solutions(
      grads, dampings, preconditioner=self.approximation, checkpoint=checkpoint
    )
    for damping, solved, residuals in found:
      single = {name: jnp.asarray(x, jnp.float32) for name, x in solved.items()}
      yield damping, single, residuals

  def _arrays(self) -> dict[str, Any]:
    return super()._arrays() | self.ggn.content


def _precondition(grads: Array, basis: Eigenbasis, damping: float) -> jax.Array:
  with numerics(), jax.default_matmul_precision("highest"):
    return _precondition_on_device(grads, basis, damping)


_precondition_on_device = jax.jit(precondition)
