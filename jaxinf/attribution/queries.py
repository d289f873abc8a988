"""From query gradients to the operand of the score pass: preconditioned, then compressed.

Raw gradients [Q, …, d_out, d_in] lie on the host in float32, so that one set of them serves every
damping; a device holds some rows of one layer at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import flat
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.types import Array, Eigenbasis, Matrices, PyTree


def compressed_queries(
  curvature: Curvature,
  grads: Matrices,
  *,
  dampings: Sequence[float],
  compress: Callable,
  num_rows: int,
) -> dict[str, PyTree]:
  """The L · Q compressed (H + λI)⁻¹ ∇m of L dampings and Q queries, damping-major.

  Args:
    curvature: H.
    grads: layer name → ∇m [Q, …, d_out, d_in] on the host.
    dampings: the λ.
    compress: [B, P] → pytree of arrays with leading axis B.
    num_rows: queries at a time on the device.

  Returns:
    Layer name → what `compress` makes, with leading axis L · Q, on the host.
  """
  parts: dict[str, list[PyTree]] = {name: [] for name in grads}
  for damping in dampings:
    for name, matrices in precondition_queries(curvature, grads, damping, num_rows):
      parts[name].append(jax.tree.map(np.asarray, jax.jit(compress)(flat(matrices))))
  concatenate = lambda *arrays: np.concatenate(arrays)
  return {name: jax.tree.map(concatenate, *rows) for name, rows in parts.items()}


def precondition_queries(
  curvature: Curvature, grads: Matrices, damping: float, num_rows: int
) -> Iterator[tuple[str, jax.Array]]:
  """Yields (layer name, the next at most `num_rows` rows of (H + λI)⁻¹ ∇m) in order of rows."""
  if curvature.exact is not None:
    solved, _ = curvature.exact.solve(grads, damping, preconditioner=curvature.approximation)
    for name, matrices in solved.items():
      yield name, jnp.asarray(matrices, jnp.float32)
    return
  for name, matrices in grads.items():
    for start in range(0, len(matrices), num_rows):
      rows = matrices[start : start + num_rows]
      yield name, _precondition(rows, curvature.bases[name], damping)


@jax.jit
def _precondition(grads: Array, basis: Eigenbasis, damping: float) -> Array:
  with jax.default_matmul_precision("highest"):
    return precondition(grads, basis, damping)
