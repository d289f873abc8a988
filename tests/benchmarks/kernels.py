"""Time of the training-gradient pass against a plain training step of the same pairs, as a table.

  make bench-kernels                                  # the small U-Net (756,035 parameters)
  make bench-kernels ARGS="--model=ddpm-cifar --batch=128"   # the 38.3 M DDPM-CIFAR U-Net

`plain` is forward and backward of a batch of (example, draw) pairs. `curvature` adds the Kronecker
factors of all layers for one target a pair (`make bench-curvature` has more on it). `train
gradients` makes the gradient of every example (the mean over its draws) and its inner products with
int8 queries. Weights and pairs are random.
"""

import absl.logging
import jax
import numpy as np
from absl import app, flags

from jaxinf.attribution.kernels import inner_products
from jaxinf.diffusion.measurements import LOSS
from jaxinf.gradients.quantise import dequantise, quantise
from tests.benchmarks.passes import Kernels
from tests.benchmarks.workloads import (
  BATCH,
  MODEL,
  ROUNDS,
  alternating,
  print_table,
  random_matrix,
  random_workload,
)

_QUERIES = flags.DEFINE_integer("queries", 16, "Queries scored.")


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  batch = BATCH.value
  workload = random_workload(MODEL.value, batch, draws=1)
  print(f"{workload}; {_QUERIES.value} queries")
  params, (pairs,) = workload.params, workload.batches(batch)
  kernels = Kernels.of(workload)
  rng = np.random.default_rng(0)
  queries = {
    layer.name: quantise(random_matrix(rng, (_QUERIES.value, int(np.prod(layer.matrix_shape)))))
    for layer in kernels.model.layers
  }

  def train_gradients(draws):
    @jax.jit
    def kernel(params, noised, queries):
      cotangents = LOSS.cotangents(noised, draws)
      grads = kernels.model.gradients(params, noised, cotangents, rows=batch // draws)
      return inner_products(grads, {name: dequantise(q) for name, q in queries.items()})

    return lambda: kernel(params, pairs.noised, queries)

  plain, factors = jax.jit(kernels.plain), jax.jit(kernels.kfac)
  calls = {
    "plain": (batch, lambda: plain(params, pairs)),
    "curvature": (batch, lambda: factors(params, pairs)),
  }
  for draws in (8, batch):
    calls[f"train gradients, {draws} draws an example"] = (batch, train_gradients(draws))
  print_table(alternating(calls, ROUNDS.value))


if __name__ == "__main__":
  app.run(main)
