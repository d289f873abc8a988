"""M⁻¹ ≈ (H + λI)⁻¹ for rows of vectors: what preconditions solves with the exact GGN.

With K a fitted curvature, block-diagonal over layers in Kronecker eigenbases, or 0 where there is
none, P = K + λI is inverted in closed form. What K misses is in Ĥ = P^(-½) H P^(-½), of which a
sketch knows the leading eigendirections, Ĥ ≈ U Λ Uᵀ of rank r. There

  M⁻¹ = P^(-½) [I + U ((Λ_r + 1) / (Λ + 1) − 1) Uᵀ] P^(-½)

takes what is above the last eigenvalue Λ_r down to it. For K = 0 this is the preconditioner of a
plain Nyström sketch of H, up to its scale.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import Array, Eigenbasis
from jaxinf.curvature.eigenbasis import from_eigenbasis, to_eigenbasis
from jaxinf.curvature.nystrom import Nystrom, from_root, nystrom
from jaxinf.engine.kernels import numerics
from jaxinf.layers.specs import Layer

# Rows that visit the device together, the last ones padded, so that one program serves any number.
_AT_ONCE = 16


class Kronecker:
  """P^s = (K + λI)^s for rows [R, P], in the eigenbases of K; K = 0 where there are none.

  Args:
    layers: whose matrices a row holds, one after another.
    bases: layer name → eigenbasis, or None for K = 0.
    precision: "float32" or "float64", of what is computed; on the default device.
  """

  def __init__(
    self, layers: Sequence[Layer], bases: Mapping[str, Eigenbasis] | None, precision: str
  ):
    self._shapes = tuple(layer.matrix_shape for layer in layers)
    self._dtype, self._x64 = np.dtype(precision), precision == "float64"
    self._bases = None
    if bases is not None:
      cast = lambda x: jnp.asarray(np.asarray(x), self._dtype)
      with numerics(self._x64):
        self._bases = [jax.tree.map(cast, bases[layer.name]) for layer in layers]

  def power(self, rows: np.ndarray, exponent: float, damping: float) -> np.ndarray:
    """(K + λI)^s v for rows v [R, P], float64."""
    if self._bases is None:
      return rows * damping**exponent
    found = np.empty(rows.shape)
    size = min(_AT_ONCE, len(rows))
    how = np.array([damping, exponent], self._dtype)
    with numerics(self._x64):
      for begin in range(0, len(rows), size):
        part = np.zeros((size, rows.shape[1]), self._dtype)
        num = len(rows[begin : begin + size])
        part[:num] = rows[begin : begin + size]
        found[begin : begin + num] = _power(self._shapes, part, self._bases, how)[:num]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _power(
  shapes: tuple[tuple[int, ...], ...], rows: Array, bases: list[Eigenbasis], how: Array
) -> jax.Array:
  """Rows [R, P] of matrices of these shapes, each Q_out (V · (Λ + λ)^s) Q_inᵀ."""
  damping, exponent = how
  sizes = [int(np.prod(shape)) for shape in shapes]
  parts = jnp.split(rows, np.cumsum(sizes)[:-1], axis=1)
  found = []
  with jax.default_matmul_precision("highest"):
    for part, shape, basis in zip(parts, shapes, bases, strict=True):
      rotated = to_eigenbasis(part.reshape(-1, *shape), basis)
      scaled = rotated * (basis.eigenvalues + damping) ** exponent
      found.append(from_eigenbasis(scaled, basis).reshape(len(rows), -1))
  return jnp.concatenate(found, axis=1)


@dataclasses.dataclass(frozen=True)
class Sketch:
  """The leading directions of Ĥ at one damping, from which those at others follow.

  Attributes:
    kronecker: K.
    nystrom: U and Λ of Ĥ.
    damping: λ there.
  """

  kronecker: Kronecker
  nystrom: Nystrom
  damping: float

  @classmethod
  def of(
    cls,
    product: Callable[[np.ndarray], np.ndarray],
    kronecker: Kronecker,
    *,
    size: int,
    rank: int,
    damping: float,
    rows_at_once: int,
  ) -> "Sketch":
    """A sketch by `rank` products rows v [R, P] → H v, of P = `size`."""
    root = lambda rows: kronecker.power(rows, -0.5, damping)
    found = nystrom(lambda rows: root(product(root(rows))), size, rank, rows_at_once=rows_at_once)
    return cls(kronecker, found, damping)

  def at(self, damping: float) -> Nystrom:
    """U and Λ at another damping: H ≈ BBᵀ with B = P^½ U Λ^½, whatever the λ of P."""
    if damping == self.damping:
      return self.nystrom
    rows = self.nystrom.vectors.T * np.sqrt(self.nystrom.eigenvalues)[:, None]
    rows = self.kronecker.power(rows, 0.5, self.damping)
    return from_root(self.kronecker.power(rows, -0.5, damping))


class Metric:
  """M⁻¹ v for rows v [R, P].

  Args:
    kronecker: K.
    damping: λ.
    sketch: of what K misses, or None.
  """

  def __init__(self, kronecker: Kronecker, damping: float, sketch: Sketch | None = None):
    self._kronecker, self._damping = kronecker, damping
    self._low: tuple[np.ndarray, np.ndarray] | None = None
    if sketch is not None:
      found = sketch.at(damping)
      self._low = (
        kronecker.power(found.vectors.T, -0.5, damping).astype(np.float32),
        ((found.eigenvalues[-1] + 1) / (found.eigenvalues + 1) - 1).astype(np.float32),
      )

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    found = self._kronecker.power(rows, -1, self._damping)
    if self._low is not None:
      vectors, scale = self._low
      along = rows.astype(np.float32) @ vectors.T
      found += (along * scale) @ vectors
    return found
