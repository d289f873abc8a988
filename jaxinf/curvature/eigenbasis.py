"""Eigendecomposition of Kronecker factors, and (G + λI)^±1 in the basis (paper, Eq. 6 and 12)."""

import numpy as np

from jaxinf.types import Array, Eigenbasis, KroneckerFactors


def eigenbasis(factors: KroneckerFactors, layer: str) -> Eigenbasis:
  """The eigenbasis of G ⊗ A, in float64 on the host.

  Eigenvalues are outer products of those of the factors. Rounding can make a small one negative:
  those are clipped to zero.

  Args:
    factors: A [d_in, d_in] and G [d_out, d_out], symmetric.
    layer: its name, for the error message.

  Raises:
    ValueError: a factor has infinite entries or NaN.
  """
  decomposed = []
  for name, factor in (("input factor A", factors.a), ("gradient factor G", factors.g)):
    factor = np.asarray(factor, np.float64)
    if not np.isfinite(factor).all():
      raise ValueError(
        f"The {name} of layer {layer} is not finite: the model's activations or gradients "
        "overflow. Check that the model's outputs are finite for training images at every timestep."
      )
    values, vectors = np.linalg.eigh((factor + factor.T) / 2)
    decomposed.append((np.maximum(values, 0), vectors))
  (values_in, q_in), (values_out, q_out) = decomposed
  return Eigenbasis(q_in=q_in, q_out=q_out, eigenvalues=np.outer(values_out, values_in))


def precondition(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  """Applies (G + λI)⁻¹ to layer gradients in the Kronecker eigenbasis.

  With V = Q_outᵀ · grads · Q_in, returns Q_out · (V / (Λ + λ)) · Q_inᵀ. NumPy arrays stay on the
  host in their precision; JAX arrays give a JAX computation.

  Args:
    grads: [..., d_out, d_in] layer gradients; the bias is the last column.
    basis: Q_in [d_in, d_in], Q_out [d_out, d_out], Λ [d_out, d_in].
    damping: λ > 0, in the units of Λ (squared gradient of the pixel-mean loss).
  """
  return _scaled(grads, basis, 1 / (basis.eigenvalues + damping))


def multiply(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  """Applies G + λI to layer gradients [..., d_out, d_in]; the inverse of `precondition`."""
  return _scaled(grads, basis, basis.eigenvalues + damping)


def _scaled(grads: Array, basis: Eigenbasis, scale: Array) -> Array:
  rotated = basis.q_out.T @ grads @ basis.q_in
  return basis.q_out @ (rotated * scale) @ basis.q_in.T
