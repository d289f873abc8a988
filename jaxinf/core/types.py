"""The pytrees that travel between the parts of jaxinf.

Dimensions used throughout: B examples of a batch, N training examples, Q queries, G groups of
draws, H × W × C pixels and channels, d_out × d_in one layer's gradient matrix (bias last column).
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

Array = Any  # jax.Array or np.ndarray: a kernel's arguments come as either
PyTree = Any
Params = PyTree
Arrays = tuple[jax.Array, jax.Array]  # a layer's input x and the gradient dy at its output
Matrices = dict[str, Array]  # layer name -> [..., (groups,) d_out, d_in]

# apply_fn(params, inputs [B, …], time [B]) -> prediction [B, …]; a conditional model is
# apply_fn(params, inputs, time, conditioning), with a pytree of arrays [B, …]. See noise.predict.
ApplyFn = Callable[..., jax.Array]


@flax.struct.dataclass
class Batch:
  """Rows of examples as a kernel sees them.

  Attributes:
    data: [B, …], floating-point numbers or uint8 in 0…255; None where rows have no data yet.
    ids: [B] uint32 example numbers, from which each example's random keys derive.
    draws: [B] int32, which draw of (t, ε), or replicate of draws, a row is; None: all of them.
    mask: [B] float32, 1 for an example and 0 for padding.
    conditioning: pytree of arrays [B, …], such as labels [B] or text embeddings [B, L, E]; None
      where the model has no further inputs.
  """

  data: Array
  ids: Array
  draws: Array
  mask: Array
  conditioning: PyTree = None


@flax.struct.dataclass
class KroneckerFactors:
  """K-FAC factors of one layer: G ⊗ A approximates the layer's GGN block.

  Attributes (a grouped convolution has an axis of groups in front):
    a: [d_in, d_in] second moment of the layer's inputs (1 appended for a bias), mean over
      examples, draws and positions.
    g: [d_out, d_out] second moment of the gradients at its outputs, mean over examples and
      draws, sum over positions.
  """

  a: Array
  g: Array


@flax.struct.dataclass
class Eigenbasis:
  """The Kronecker eigenbasis of one layer, Q_out ⊗ Q_in, and the eigenvalues in it.

  Attributes (a grouped convolution has an axis of groups in front):
    q_in: [d_in, d_in] eigenvectors of A in columns; None for the identity (diagonal curvature).
    q_out: [d_out, d_out] eigenvectors of G in columns, or None likewise.
    eigenvalues: Λ [d_out, d_in] ≥ 0, in squared gradients of the pixel-mean loss.
  """

  q_in: Array
  q_out: Array
  eigenvalues: Array
