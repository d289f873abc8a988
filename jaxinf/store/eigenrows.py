"""Gradients as the rows of a store: in the curvature's eigenbasis, their numbers of one size.

A row is V = Q_outᵀ ∇ℓ Q_in divided by √(Λ + ε), compressed. It knows no damping: with a query's
gradient U in that basis, the score is the sum over layers and entries of

  row_i · U_i √(Λ_i + ε) / (Λ_i + λ),

and the product of two rows under (H + λI)⁻¹ is that over row_i · row'_i (Λ_i + ε) / (Λ_i + λ).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import inner_products, replicate_products
from jaxinf.compression.compression import Blockwise
from jaxinf.core.damping import Damping
from jaxinf.core.types import Array, Eigenbasis, Matrices, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import to_eigenbasis
from jaxinf.engine import processes
from jaxinf.engine.kernels import numerics
from jaxinf.store.flat import flat_products, flat_vectors, of_bits
from jaxinf.store.packing import Packing

_FLOOR = 1e-6  # ε as a share of the mean of a layer's Λ


def widths_of(eigenvalues: Array) -> Array:
  """√(Λ + ε) [(groups,) d_out, d_in]: about the size of a gradient's numbers in the eigenbasis."""
  floor = _FLOOR * jnp.mean(eigenvalues) + jnp.finfo(jnp.float32).tiny
  return jnp.sqrt(eigenvalues + floor)


@dataclasses.dataclass(frozen=True)
class PackKernel:
  """Kernel from gradients to the arrays [B, W_k] of the store; its operands are the rotations."""

  packing: Packing

  def __call__(self, bases: dict[str, Eigenbasis], grads: Matrices) -> list[jax.Array]:
    with jax.default_matmul_precision("highest"):
      rows = {
        name: to_eigenbasis(grad, bases[name]) / widths_of(bases[name].eigenvalues)
        for name, grad in grads.items()
      }
    return self.packing.pack(rows, {name: basis.eigenvalues for name, basis in bases.items()})


def query_vectors(
  curvature: Curvature,
  gradient_batches: Iterator[Matrices],
  *,
  num_rows: int,
  dampings: Sequence[Damping],
  layers: Sequence[str],
) -> Matrices:
  """Layer name → U √(Λ + ε) / (Λ + λ) [L · R, …], damping-major, of R rows of query gradients.

  Args:
    curvature: H.
    gradient_batches: layer name → this process's share of the R rows, a few at a time.
    num_rows: R.
    dampings: L of them.
    layers: names of the layers wanted.
  """
  bases = curvature.rotations()
  parts: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in dampings] for name in layers}
  for grads in gradient_batches:
    for name in layers:
      for part, damping in zip(parts[name], dampings, strict=True):
        value = curvature.damping_in(name, damping)
        part.append(np.asarray(_vectors(grads[name], bases[name], value)))
  joined = lambda part: processes.gathered(np.concatenate(part), num_rows)
  return {name: np.concatenate([joined(p) for p in of_layer]) for name, of_layer in parts.items()}


@dataclasses.dataclass(frozen=True)
class ProductKernel:
  """Kernel from the arrays of a store [B, W_k] to products [B, R] with R query vectors.

  Its operands are those of `product_operands`.

  Attributes:
    packing: of the rows.
    layers: names of those that count.
  """

  packing: Packing
  layers: tuple[str, ...]

  def __call__(self, operands: PyTree, arrays: Sequence[Array]) -> jax.Array:
    compression = self.packing.compression
    if isinstance(compression, Blockwise):
      return flat_products(compression, operands, arrays)
    vectors, eigenvalues = operands
    return inner_products(self.packing.unpack(arrays, eigenvalues, self.layers), vectors)


@dataclasses.dataclass(frozen=True)
class SelfProductKernel:
  """Kernel from the arrays of a store [B · G, W_k] to `replicate_products` of examples [B, 2, G].

  Its operands are (Λ of each layer, λ).

  Attributes:
    packing: of the rows, G consecutive ones for each example.
    layers: names of those that count.
    replicates: G.
  """

  packing: Packing
  layers: tuple[str, ...]
  replicates: int

  def __call__(self, operands: PyTree, arrays: Sequence[Array]) -> jax.Array:
    eigenvalues, damping = operands
    restored = self.packing.unpack([of_bits(a) for a in arrays], eigenvalues, self.layers)
    rows = {n: x.reshape(-1, self.replicates, *x.shape[1:]) for n, x in restored.items()}
    weights = {n: jnp.square(widths_of(x)) / (x + damping) for n, x in eigenvalues.items()}
    return replicate_products(rows, weights)


def product_operands(
  packing: Packing, vectors: Matrices, eigenvalues: Mapping[str, Array]
) -> PyTree:
  """Operands of the product kernel of these layers: query vectors [R, …] and Λ, by layer name."""
  if isinstance(packing.compression, Blockwise):
    return flat_vectors(packing, packing.compression.block_size, vectors, tuple(vectors))
  return vectors, {name: eigenvalues[name] for name in vectors}


@numerics()
@jax.jit
def _vectors(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  with jax.default_matmul_precision("highest"):
    rotated = to_eigenbasis(grads, basis)
  return rotated * (widths_of(basis.eigenvalues) / (basis.eigenvalues + damping))
