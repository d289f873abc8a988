"""Eigendecomposition of Kronecker factors, and (H + λI)^±1 in the basis (paper, Eq. 6 and 12)."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import Array, Eigenbasis, KroneckerFactors
from jaxinf.engine import rehearsal


@dataclasses.dataclass(frozen=True)
class Decomposition:
  """The eigendecomposition of one factor.

  Attributes:
    values: [..., d] ≥ 0, ascending.
    vectors: [..., d, d] in columns.
    num_clipped: negative eigenvalues set to zero.
    most_negative: the least of them ÷ the largest eigenvalue; 0 where there is none.
  """

  values: np.ndarray
  vectors: np.ndarray
  num_clipped: int
  most_negative: float


def eigh_on_host(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues [..., d], ascending, and eigenvectors [..., d, d] in float64 by LAPACK."""
  return rehearsal.decomposed(np.linalg.eigh, factor)


def eigh_on_device(factor: Array) -> tuple[Array, Array]:
  """The same as a JAX computation in float32: eigenvalues are good to 1e-7 of the largest."""
  return jnp.linalg.eigh(jnp.asarray(factor, jnp.float32))


def checked_factors(factors: KroneckerFactors, layer: str) -> KroneckerFactors:
  """The factors, symmetric in float64; ValueError where entries are infinite or NaN."""
  symmetric = {}
  for name, what in (("a", "input factor A"), ("g", "gradient factor G")):
    factor = np.asarray(getattr(factors, name), np.float64)
    if not np.isfinite(factor).all():
      cause = {"a": "activations", "g": "gradients"}[name]
      raise ValueError(
        f"The {what} of layer {layer} is not finite: its {cause} overflow. Check that the model's "
        "outputs are finite for training examples at every timestep, or skip the layer by name."
      )
    symmetric[name] = (factor + np.swapaxes(factor, -1, -2)) / 2
  return KroneckerFactors(**symmetric)


def decomposition(values: Array, vectors: Array) -> Decomposition:
  """Clips negative eigenvalues, which rounding makes of small ones, and counts them."""
  values, vectors = np.asarray(values, np.float64), np.asarray(vectors, np.float64)
  largest = max(float(values.max()), np.finfo(np.float64).tiny)
  return Decomposition(
    values=np.maximum(values, 0),
    vectors=vectors,
    num_clipped=int((values < 0).sum()),
    most_negative=min(float(values.min()) / largest, 0.0),
  )


def eigenbasis(a: Decomposition, g: Decomposition) -> Eigenbasis:
  """The eigenbasis of G ⊗ A, whose eigenvalues are outer products of those of the factors."""
  eigenvalues = g.values[..., :, None] * a.values[..., None, :]
  return Eigenbasis(q_in=a.vectors, q_out=g.vectors, eigenvalues=eigenvalues)


def precondition(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  """Applies (H + λI)⁻¹ to layer gradients in the Kronecker eigenbasis.

  With V = Q_outᵀ · grads · Q_in, returns Q_out · (V / (Λ + λ)) · Q_inᵀ. NumPy arrays stay on the
  host in their precision; JAX arrays give a JAX computation.

  Args:
    grads: [..., d_out, d_in] layer gradients; the bias is the last column.
    basis: Q_in [d_in, d_in], Q_out [d_out, d_out], Λ [d_out, d_in].
    damping: λ > 0, in the units of Λ (squared gradient of the pixel-mean loss).
  """
  return _scaled(grads, basis, 1 / (basis.eigenvalues + damping))


def multiply(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  """Applies H + λI to layer gradients [..., d_out, d_in]; the inverse of `precondition`."""
  return _scaled(grads, basis, basis.eigenvalues + damping)


def to_eigenbasis(grads: Array, basis: Eigenbasis) -> Array:
  """V = Q_outᵀ · grads · Q_in of layer gradients [..., d_out, d_in]; themselves in the identity."""
  if basis.q_in is None:
    return grads
  return basis.q_out.swapaxes(-1, -2) @ grads @ basis.q_in


def from_eigenbasis(rotated: Array, basis: Eigenbasis) -> Array:
  """Q_out · V · Q_inᵀ of V [..., d_out, d_in]; the inverse of `to_eigenbasis`."""
  if basis.q_in is None:
    return rotated
  return basis.q_out @ rotated @ basis.q_in.swapaxes(-1, -2)


def _scaled(grads: Array, basis: Eigenbasis, scale: Array) -> Array:
  chex.assert_shape(grads, (..., *np.shape(scale)))
  return from_eigenbasis(to_eigenbasis(grads, basis) * scale, basis)
