"""Sums over (example, draw) pairs that curvature is made of, for one layer.

A layer with inputs a_r (1 appended where it has a bias) and output gradients g_r at positions
r = 1 … R of a pair has the gradient Σ_r g_r a_rᵀ. K-FAC approximates the GGN block by G ⊗ A with

  expand: A = E of a_r a_rᵀ over pairs and positions,   G = E over pairs of Σ_r g_r g_rᵀ,
  reduce: A = E of ā āᵀ, ā the mean of a_r,             G = E of ĝ ĝᵀ, ĝ the sum of g_r

(Eschenhagen et al. 2023; paper, Section 3.1 and Appendix B). A dense layer without positions has
R = 1, where both are one. EK-FAC (George et al. 2018) keeps the eigenvectors Q_out ⊗ Q_in of G ⊗ A
and replaces its eigenvalues by the second moments of gradients along them,

  Λ = E over pairs of (Q_outᵀ (Σ_r g_r a_rᵀ) Q_in)²,

which is the diagonal of the GGN in that basis; with Q = I it is the diagonal approximation.

Shampoo (Gupta, Koren and Singer 2018) takes the eigenvectors of second moments of whole gradients,

  gradients: A = E of VᵀV,  G = E of V Vᵀ,  V = Σ_r g_r a_rᵀ of a pair,

which assume nothing of how positions depend on each other. Λ is corrected in that basis likewise.

Grouped layers have a group axis before d_in and d_out everywhere: one block a group.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxinf.core.types import Eigenbasis

_HIGHEST = jax.lax.Precision.HIGHEST
APPROXIMATIONS = ("expand", "reduce")
GRADIENTS = "gradients"  # the moments of Shampoo, whose Kronecker product approximates nothing


class Tap(NamedTuple):
  """What curvature needs of a layer for B (example, draw) pairs with R positions each.

  Attributes:
    inputs: a [B, R, (groups,) d_in], without the 1 for a bias.
    gradients: g [B, R, (groups,) d_out], of whatever was back-propagated.
  """

  inputs: jax.Array
  gradients: jax.Array


def input_sum(inputs: jax.Array, weights: jax.Array, *, has_bias: bool, approx: str) -> jax.Array:
  """Σ_b w_b (1/R) Σ_r a_r a_rᵀ (expand) or Σ_b w_b ā āᵀ (reduce): [(groups,) d_in, d_in].

  Args:
    inputs: a [B, R, (groups,) d_in].
    weights: w [B].
    has_bias: whether a 1 is appended to the inputs.
    approx: "expand" or "reduce".
  """
  chex.assert_rank(inputs, {3, 4})
  chex.assert_shape(weights, inputs.shape[:1])
  if approx == "reduce":
    inputs = jnp.mean(inputs, axis=1, keepdims=True)
  weighted = inputs * (_along(weights, inputs) / inputs.shape[1])
  moments = _gram(weighted, inputs)
  return (
    with_ones(moments, jnp.sum(weighted, axis=(0, 1)), jnp.sum(weights)) if has_bias else moments
  )


def with_ones(moments: jax.Array, sums: jax.Array, count: jax.Array) -> jax.Array:
  """Second moments [..., d + 1, d + 1] of inputs with 1 appended, from those without.

  Args:
    moments: [..., d, d] sums of a aᵀ.
    sums: [..., d] sums of a.
    count: their number.
  """
  column = sums[..., None]
  corner = jnp.broadcast_to(count, (*sums.shape[:-1], 1, 1))
  top = jnp.concatenate([moments, column], axis=-1)
  return jnp.concatenate(
    [top, jnp.concatenate([jnp.swapaxes(column, -1, -2), corner], axis=-1)], axis=-2
  )


def gradient_sum(gradients: jax.Array, weights: jax.Array, *, approx: str) -> jax.Array:
  """Σ_b w_b Σ_r g_r g_rᵀ (expand) or Σ_b w_b ĝ ĝᵀ (reduce): [(groups,) d_out, d_out].

  Args:
    gradients: g [B, R, (groups,) d_out].
    weights: w [B].
    approx: "expand" or "reduce".
  """
  chex.assert_rank(gradients, {3, 4})
  chex.assert_shape(weights, gradients.shape[:1])
  if approx == "reduce":
    gradients = jnp.sum(gradients, axis=1, keepdims=True)
  return _gram(gradients * _along(weights, gradients), gradients)


def gradient_matrices(tap: Tap, *, rows: int, has_bias: bool) -> jax.Array:
  """Σ over pairs and positions of g aᵀ for each of `rows` equal runs of pairs.

  Args:
    tap: a [B, R, (groups,) d_in] and g [B, R, (groups,) d_out]; rows divides B.
    rows: M, how many matrices; each sums B / M consecutive pairs.
    has_bias: whether a 1 is appended to the inputs.

  Returns:
    [M, (groups,) d_out, d_in], the bias in the last column.
  """
  chex.assert_equal_shape_prefix(tap, 2)
  chex.assert_is_divisible(len(tap.inputs), rows)
  inputs, gradients = (_runs(x, rows) for x in tap)
  groups = "g" if inputs.ndim == 4 else ""
  matrices = jnp.einsum(
    f"mk{groups}o,mk{groups}i->m{groups}oi", gradients, inputs, precision=_HIGHEST
  )
  if not has_bias:
    return matrices
  return jnp.concatenate([matrices, jnp.sum(gradients, axis=1)[..., None]], axis=-1)


def matrix_moments(tap: Tap, weights: jax.Array, *, has_bias: bool) -> dict[str, jax.Array]:
  """Σ_b w_b VᵀV and Σ_b w_b V Vᵀ of each pair's gradient V = Σ_r g_r a_rᵀ [(groups,) d_out, d_in].

  Either V is formed, or the products of positions with each other, as V Vᵀ = Σ_rs g_r (a_r·a_s)
  g_sᵀ: whichever takes fewer operations.

  Args:
    tap: a [B, R, (groups,) d_in] and g [B, R, (groups,) d_out].
    weights: w [B].
    has_bias: whether a 1 is appended to the inputs.

  Returns:
    "a": [(groups,) d_in, d_in]; "g": [(groups,) d_out, d_out].
  """
  chex.assert_equal_shape_prefix(tap, 2)
  chex.assert_shape(weights, tap.inputs.shape[:1])
  inputs, gradients = _rotated_inputs(tap.inputs, None, has_bias), tap.gradients
  positions, d_in, d_out = inputs.shape[1], inputs.shape[-1], gradients.shape[-1]
  by_positions = 2 * positions**2 * (d_in + d_out) + positions * (d_in**2 + d_out**2)
  if by_positions < d_in * d_out * (d_in + d_out + positions):
    of_inputs, of_gradients = _mixed(gradients, inputs), _mixed(inputs, gradients)
    moment = lambda mixed, x: _gram(mixed * _along(weights, x), x)
    return {"a": moment(of_inputs, inputs), "g": moment(of_gradients, gradients)}
  matrices = gradient_matrices(Tap(inputs, gradients), rows=len(inputs), has_bias=False)
  weighted = matrices * _along(weights, matrices)
  return {
    "a": jnp.einsum("b...oi,b...oj->...ij", weighted, matrices, precision=_HIGHEST),
    "g": jnp.einsum("b...oi,b...pi->...op", weighted, matrices, precision=_HIGHEST),
  }


def _mixed(other: jax.Array, x: jax.Array) -> jax.Array:
  """Σ_s (y_r · y_s) x_s [B, R, (groups,) d] of x like that and y, `other`, of any d."""
  groups = "g" if x.ndim == 4 else ""
  products = jnp.einsum(f"br{groups}i,bs{groups}i->b{groups}rs", other, other, precision=_HIGHEST)
  return jnp.einsum(f"b{groups}rs,bs{groups}i->br{groups}i", products, x, precision=_HIGHEST)


def eigenvalue_sum(tap: Tap, basis: Eigenbasis, weights: jax.Array, *, has_bias: bool) -> jax.Array:
  """Σ_b w_b (Q_outᵀ (Σ_r g_r a_rᵀ) Q_in)², [(groups,) d_out, d_in].

  Either the inputs and output gradients are rotated, or each pair's matrix after they are
  multiplied: whichever takes fewer operations.

  Args:
    tap: a [B, R, (groups,) d_in] and g [B, R, (groups,) d_out].
    basis: Q_in [(groups,) d_in, d_in] and Q_out, or None for the identity.
    weights: w [B].
    has_bias: whether a 1 is appended to the inputs.
  """
  chex.assert_equal_shape_prefix(tap, 2)
  chex.assert_shape(weights, tap.inputs.shape[:1])
  inputs, gradients = tap
  positions, d_in, d_out = inputs.shape[1], inputs.shape[-1] + has_bias, gradients.shape[-1]
  first = positions * (d_in**2 + d_out**2) < d_in * d_out * (d_in + d_out)
  if basis.q_in is None or first or positions == 1:
    inputs, gradients = (
      _rotated_inputs(inputs, basis.q_in, has_bias),
      _rotated(gradients, basis.q_out),
    )
    if positions == 1:  # then the square of the outer product is the outer product of squares
      squares = jnp.square(gradients[:, 0]) * _along(weights, gradients[:, 0])
      return _sum_of_products(squares, jnp.square(inputs[:, 0]))
    rotated = gradient_matrices(Tap(inputs, gradients), rows=len(inputs), has_bias=False)
  else:
    matrices = gradient_matrices(tap, rows=len(inputs), has_bias=has_bias)
    rotated = jnp.matmul(_transposed(basis.q_out), matrices, precision=_HIGHEST)
    rotated = jnp.matmul(rotated, basis.q_in, precision=_HIGHEST)
  return jnp.sum(jnp.square(rotated) * _along(weights, rotated), axis=0)


def _rotated_inputs(inputs: jax.Array, q_in: jax.Array | None, has_bias: bool) -> jax.Array:
  """Inputs [B, R, (groups,) d_in] with 1 appended where has_bias, times Q_in."""
  if q_in is None:
    ones = jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)
    return jnp.concatenate([inputs, ones], axis=-1) if has_bias else inputs
  if not has_bias:
    return _rotated(inputs, q_in)
  return _rotated(inputs, q_in[..., :-1, :]) + q_in[..., -1, :]


def _rotated(x: jax.Array, q: jax.Array | None) -> jax.Array:
  """x [B, R, (groups,) d] times q [(groups,) d, d']."""
  if q is None:
    return x
  groups = "g" if x.ndim == 4 else ""
  return jnp.einsum(f"br{groups}i,{groups}ij->br{groups}j", x, q, precision=_HIGHEST)


def _sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Σ_b x yᵀ of x [B, (groups,) m] and y [B, (groups,) n]."""
  groups = "g" if x.ndim == 3 else ""
  return jnp.einsum(f"b{groups}m,b{groups}n->{groups}mn", x, y, precision=_HIGHEST)


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
  """Σ over pairs and positions of x yᵀ."""
  return _sum_of_products(*(v.reshape(-1, *v.shape[2:]) for v in (x, y)))


def _along(weights: jax.Array, like: jax.Array) -> jax.Array:
  return weights.reshape(-1, *[1] * (like.ndim - 1))


def _runs(x: jax.Array, rows: int) -> jax.Array:
  """[B, R, …] → [rows, B / rows · R, …]."""
  return x.reshape(rows, -1, *x.shape[2:])


def _transposed(q: jax.Array) -> jax.Array:
  return jnp.swapaxes(q, -1, -2)
