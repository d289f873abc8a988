"""The passes that are timed: kernels on one batch of pairs, and fits that go through all pairs.

A fit is made twice: by a bare loop over stored pairs, and by the library's own driver, which makes
the pairs from keys as `fit_curvature` does.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import ApplyFn, Eigenbasis, Params, PyTree
from jaxinf.curvature.decompose import decomposed
from jaxinf.curvature.fit import SKIP_NORMALISATION
from jaxinf.curvature.targets import curvature_pairs, monte_carlo
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import predict
from jaxinf.engine import Rows, reduce_batches
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, layers_of
from tests.benchmarks.workloads import PROCESS, Call, Pairs, Workload, random_matrix

Kernel = Callable[[PyTree, Pairs], PyTree]  # (operands, pairs) → sums
Reduce = Callable[[PyTree], PyTree]  # operands → sums over all pairs


@dataclasses.dataclass(frozen=True)
class Kernels:
  """What goes through a batch of pairs: (operands, pairs) → sums over it.

  Operands are the parameters; for `ekfac`, parameters and rotations.
  """

  apply_fn: ApplyFn
  layers: Registration
  diagonal_layers: Registration

  @classmethod
  def of(cls, workload: Workload) -> "Kernels":
    kronecker = Selection(SKIP_NORMALISATION)
    diagonal = dataclasses.replace(kronecker, diagonal=(".",))
    found = (layers_of(workload.model, workload.examples, s) for s in (kronecker, diagonal))
    return cls(workload.apply_fn, *found)

  def plain(self, params: Params, pairs: Pairs) -> PyTree:
    """Forward and backward: the gradient of the loss."""

    def loss(params):
      outputs = predict(self.apply_fn, params, pairs.noised)
      return jnp.mean(LOSS.value(PROCESS, outputs, pairs.noised))

    return jax.grad(loss)(params)

  def taps(self, params: Params, pairs: Pairs) -> PyTree:
    """Inputs and output gradients of all layers: what plain has in common with the passes."""
    return self.layers._layer_arrays(params, pairs.noised, _cotangents(pairs))

  def kfac(self, params: Params, pairs: Pairs) -> PyTree:
    """The first pass: Kronecker factors."""
    return self.layers.factor_sums(params, pairs.noised, _cotangents(pairs), _weights(pairs))

  def ekfac(self, operands: PyTree, pairs: Pairs) -> PyTree:
    """The second pass: eigenvalues in the eigenbases."""
    params, rotations = operands
    return self.layers.eigenvalue_sums(
      params, pairs.noised, _cotangents(pairs), _weights(pairs), rotations
    )

  def diagonal(self, params: Params, pairs: Pairs) -> PyTree:
    """The one pass of diagonal curvature."""
    sums = self.diagonal_layers.factor_sums
    return sums(params, pairs.noised, _cotangents(pairs), _weights(pairs))


def _cotangents(pairs: Pairs) -> Callable:
  return lambda out: pairs.cotangents[None]


def _weights(pairs: Pairs) -> jax.Array:
  return jnp.ones(len(pairs.cotangents))


def random_rotations(registration: Registration) -> dict[str, Eigenbasis]:
  """Matrices in the place of eigenvectors: times do not depend on them."""
  rng = np.random.default_rng(0)

  def rotation(layer):
    *groups, d_out, d_in = layer.matrix_shape
    q_in, q_out = (random_matrix(rng, (*groups, d, d)) for d in (d_in, d_out))
    return Eigenbasis(q_in, q_out, None)

  return {layer.name: rotation(layer) for layer in registration.layers}


def stored_pairs(workload: Workload, batch: int) -> Callable[[Kernel], Reduce]:
  """Makes a kernel a sum over all pairs of the workload, batch by batch."""
  batches = workload.batches(batch)

  def over_all(kernel: Kernel) -> Reduce:
    add = lambda sums, *args: jax.tree.map(jnp.add, sums, kernel(*args))
    step = jax.jit(add, donate_argnums=0)
    zeros = jax.jit(lambda *args: jax.tree.map(jnp.zeros_like, jax.eval_shape(kernel, *args)))

    def run(operands):
      sums = zeros(operands, batches[0])
      for pairs in batches:
        sums = step(sums, operands, pairs)
      return jax.block_until_ready(sums)

    return run

  return over_all


def driver_pairs(workload: Workload, batch: int) -> Callable[[Kernel], Reduce]:
  """The same through the library's driver, with as many draws from keys."""
  rows = Rows.of(workload.examples, len(workload) // len(workload.images))

  def over_all(kernel: Kernel) -> Reduce:
    def drawn(operands, rows):
      noised, keys = curvature_pairs(PROCESS, 0, rows)
      (cotangents,) = monte_carlo(keys, noised, 1)(noised.target)
      return kernel(operands, Pairs(noised, cotangents))

    return lambda operands: reduce_batches(drawn, operands, rows, batch_size=batch, label=None)

  return over_all


def fits(
  workload: Workload, kernels: Kernels, over_all: Callable[[Kernel], Reduce], where: str
) -> dict[str, Call]:
  """Benchmark → fit from all pairs, which returns the seconds of its stages.

  Args:
    workload: the network and its pairs.
    kernels: of the network.
    over_all: `stored_pairs` or `driver_pairs`.
    where: of the eigendecomposition, "host" or "devices".
  """
  first, second = over_all(kernels.kfac), over_all(kernels.ekfac)
  diagonal = over_all(kernels.diagonal)
  decompose = lambda sums: decomposed(kernels.layers.factors(sums, len(workload)), where)

  def kfac():
    return _stages({"factors": lambda _: first(workload.params)})

  def ekfac():
    return _stages(
      {
        "factors": lambda _: first(workload.params),
        "eigenvectors": decompose,
        "correction": lambda found: second((workload.params, _rotations(found[0]))),
      }
    )

  def diagonals():
    return _stages({"diagonal": lambda _: diagonal(workload.params)})

  return {"kfac": kfac, "ekfac": ekfac, "diagonal": diagonals}


def _rotations(bases: Mapping[str, Eigenbasis]) -> dict[str, Eigenbasis]:
  single = lambda x: np.asarray(x, np.float32)
  return {name: Eigenbasis(single(b.q_in), single(b.q_out), None) for name, b in bases.items()}


def _stages(stages: Mapping[str, Callable]) -> dict[str, float]:
  """Seconds of each stage, which is given what the one before returned."""
  seconds, value = {}, None
  for name, stage in stages.items():
    began = time.perf_counter()
    value = stage(value)
    seconds[name] = time.perf_counter() - began
  return seconds
