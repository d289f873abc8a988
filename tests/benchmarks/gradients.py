"""Training gradients and scores against plain training steps of the same pairs, and a store.

  make bench-gradients                                    # the small U-Net (756,035 parameters)
  make bench-gradients ARGS="--model=ddpm-cifar --batch=128 --queries=200"
  make bench-gradients ARGS="--work=FOLDER"               # beside other programs, see `curvature`

1. One batch of (example, draw) pairs: forward and backward (plain); the gradient of every example,
   the mean over its draws, for several numbers of draws an example; and the same with its inner
   products with compressed queries. What the inner products alone take.
2. All pairs: gradients and scores of stored pairs, batch by batch; and through the library's
   driver, which makes the pairs from keys.
3. A store of such gradients: what a query takes for each (query, row), and the rate at which rows
   are read, ÷ the rate at which this machine reads memory.

Rounds go through everything in turn, so that slow drift of the machine hits all alike; medians are
shown. Values are random: times do not depend on them.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxinf.attribution.kernels import (
  TRAIN,
  GradientKernel,
  Replicate,
  ScoreKernel,
  row_operands,
)
from jaxinf.compression.compression import Compression, compression_named
from jaxinf.core.draws import Draws
from jaxinf.diffusion.measurements import LOSS
from jaxinf.engine import Blocks, Rows, stream_batches
from jaxinf.layers.precision import in_precision
from jaxinf.store.eigenrows import ProductKernel, product_operands
from jaxinf.store.flat import bits_of
from jaxinf.store.packing import Packing
from tests.benchmarks.floor import matmul
from tests.benchmarks.passes import Kernels
from tests.benchmarks.results import append_line, print_results
from tests.benchmarks.workloads import (
  BATCH,
  MODEL,
  PROCESS,
  ROUNDS,
  Timing,
  Workload,
  alternating,
  folder_workload,
  print_table,
  random_matrix,
  random_workload,
)

_WORK = flags.DEFINE_string("work", None, "Folder of the network, pairs and results to share.")
_QUERIES = flags.DEFINE_integer("queries", 16, "Queries scored.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Random examples, with 8 draws each.")
_COMPRESSION = flags.DEFINE_string("compression", "int8", "Of the query rows.")
_DRAWS = flags.DEFINE_multi_integer("draws", [8, 64], "Draws an example in one batch.")
_PRECISION = flags.DEFINE_multi_string("precision", [], "Further precisions of the products.")
_WHOLE = flags.DEFINE_boolean("whole", True, "Whether to go through all pairs.")
_STORE_ROWS = flags.DEFINE_integer("store_rows", 1024, "Rows of the store; 0 for no store.")
_WHOLE_ROUNDS = 3
_ROWS = 256  # of a block of the store

PROJECTED = {"CIFAR-2": 5_000, "CIFAR-10": 50_000}  # training images, with 250 draws each


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  if _WORK.value:
    workload = folder_workload(Path(_WORK.value))
  else:
    workload = random_workload(MODEL.value, _EXAMPLES.value, draws=8)
  kernels, compression = Kernels.of(workload), compression_named(_COMPRESSION.value)
  print(f"{workload}; {_QUERIES.value} {compression.description} queries")
  operands = query_operands(kernels, compression, _QUERIES.value)
  one_batch(workload, kernels, compression, operands)
  if _WHOLE.value:
    timings = all_pairs(workload, kernels, compression, operands)
    if _WORK.value:
      path = Path(_WORK.value) / "results.jsonl"
      for name, timing in timings.items():
        append_line(path, f"jaxinf-{name}", timing, timings["plain"], batch=BATCH.value)
      print_results(path)
  if _STORE_ROWS.value:
    store(kernels, workload)


def query_operands(kernels: Kernels, compression: Compression, num: int) -> dict:
  """Layer name → (num compressed random rows, Λ), as the score kernel takes them."""
  rng, operands = np.random.default_rng(0), {}
  for layer in kernels.layers.layers:
    eigenvalues = jnp.ones(layer.matrix_shape)
    rows = random_matrix(rng, (num, *layer.matrix_shape))
    operands[layer.name] = (jax.jit(compression.compress)(rows, eigenvalues), eigenvalues)
  return operands


def one_batch(
  workload: Workload, kernels: Kernels, compression: Compression, operands: dict
) -> None:
  """Passes over one batch, the part of the inner products, and what known sizes would take."""
  size, params = BATCH.value, workload.params
  pairs = workload.batches(size)[0]
  score = ScoreKernel(compression)

  def gradients(layers, draws):
    def kernel(params, noised):
      return layers.gradients(
        params, noised, LOSS.cotangents(PROCESS, noised, draws), rows=size // draws
      )

    return jax.jit(kernel)

  def scored(layers, draws):
    made = gradients(layers, draws)
    products = jax.jit(score)
    return lambda: products(operands, made(params, pairs.noised))

  plain = jax.jit(kernels.plain)
  calls = {"plain": (size, lambda: plain(params, pairs))}
  for draws in sorted({min(draws, size) for draws in _DRAWS.value}):
    made = gradients(kernels.layers, draws)
    rows = made(params, pairs.noised)
    calls[f"gradients, {draws} draws an example"] = (
      size, functools.partial(made, params, pairs.noised)
    )  # fmt: skip
    calls[f"… and scores, {draws} draws"] = (size, scored(kernels.layers, draws))
    calls[f"scores alone, {draws} draws"] = (
      size, functools.partial(jax.jit(score), operands, rows)
    )  # fmt: skip
  for precision in _PRECISION.value:
    other = Kernels.of(
      Workload(
        workload.name, in_precision(workload.apply_fn, precision), params, workload.images,
        workload.pairs,
      )
    )  # fmt: skip
    step, draws = jax.jit(other.plain), max(_DRAWS.value)
    calls[f"plain, {precision}"] = (size, functools.partial(step, params, pairs))
    calls[f"gradients and scores, {draws} draws, {precision}"] = (size, scored(other.layers, draws))
  product, flops = matmul()
  timings = alternating(calls | {"matrix product": (0, product)}, ROUNDS.value)
  print_table(timings)
  rate = flops / timings["matrix product"].median
  counted = plain.lower(params, pairs).compile().cost_analysis() or {}
  plain_flops = float(counted.get("flops", np.nan))
  print(
    f"matrix product: {rate / 1e9:,.0f} Gflop/s; plain: {plain_flops / 1e9:,.1f} Gflop a batch, "
    f"{plain_flops / timings['plain'].median / rate:.0%} of that rate"
  )
  most = min(max(_DRAWS.value), size)
  each = timings[f"… and scores, {most} draws"].median / size
  for name, images in PROJECTED.items():
    hours = images * 250 * each / 3600
    print(f"{name}, {images:,} × 250 pairs and {_QUERIES.value} queries: {hours:.2f} h")


def all_pairs(
  workload: Workload, kernels: Kernels, compression: Compression, operands: dict
) -> dict[str, Timing]:
  """Gradients and scores of all pairs: stored ones, and as many from the library's driver."""
  size, num, num_images = BATCH.value, len(workload), len(workload.images)
  draws, batches = num // num_images, workload.batches(size)
  params, score = workload.params, ScoreKernel(compression)

  def over_batches(function: Callable) -> Callable:
    return lambda: [
      np.asarray(jax.tree.leaves(function(pairs))[0]).ravel()[:1] for pairs in batches
    ]

  @jax.jit
  def grads(params, noised):
    cotangents = LOSS.cotangents(PROCESS, noised, draws)
    return kernels.layers.gradients(params, noised, cotangents, rows=size // draws)

  plain, products = jax.jit(kernels.plain), jax.jit(score)
  drawn = Draws(draws, 1, "uniform", antithetic=False, shared=False)
  kernel = GradientKernel(kernels.layers, LOSS, PROCESS, Replicate.of(drawn))

  def driver():
    stream = stream_batches(
      kernel,
      row_operands(params, drawn, TRAIN),
      Rows.of(workload.examples, 1),
      batch_size=size // draws,
      label=None,
      then=Blocks(score, [operands]),
    )
    return np.concatenate(list(stream))

  timings = alternating(
    {
      "plain": (num, over_batches(lambda pairs: plain(params, pairs))),
      "scores": (num, over_batches(lambda pairs: products(operands, grads(params, pairs.noised)))),
      "scores-driver": (num, driver),
    },
    _WHOLE_ROUNDS,
  )
  print_table(timings)
  return timings


def store(kernels: Kernels, workload: Workload) -> None:
  """Rows of a store in memory against query vectors: time, and the rate at which rows are read."""
  shapes = {layer.name: layer.matrix_shape for layer in kernels.layers.layers}
  names, rng = tuple(shapes), np.random.default_rng(0)
  eigenvalues = {name: jnp.ones(shape) for name, shape in shapes.items()}
  num_rows = _STORE_ROWS.value
  whole = jnp.asarray(rng.standard_normal(2**27).astype(np.float32))
  read_all = jax.jit(lambda x: jnp.sum(x.reshape(-1, 1024), axis=0))
  calls: dict = {"memory": (0, lambda: read_all(whole))}
  sizes = {}
  for name in (None, "bfloat16", "int8", "int4"):
    compression = compression_named(name)
    packing = Packing.of(compression, shapes)
    pack = jax.jit(lambda rows, packing=packing: packing.pack(rows, eigenvalues))
    # Different rows, more than a cache holds.
    blocks = [
      [
        jnp.asarray(bits_of(np.asarray(array)))
        for array in pack({n: random_matrix(rng, (_ROWS, *s)) for n, s in shapes.items()})
      ]
      for _ in range(num_rows // _ROWS)
    ]
    kernel = jax.jit(ProductKernel(packing, names))
    for num in (1, _QUERIES.value):
      vectors = {n: random_matrix(rng, (num, *shape)) for n, shape in shapes.items()}
      operands = jax.device_put(product_operands(packing, vectors, eigenvalues))
      call = lambda kernel=kernel, operands=operands, blocks=blocks: [
        kernel(operands, block) for block in blocks
      ]
      key = f"{compression.description}, {num} queries"
      calls[key] = (0, call)
      sizes[key] = (num, packing.row_bytes)
  timings = alternating(calls, ROUNDS.value)
  bandwidth = whole.nbytes / timings["memory"].median
  print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
  print("| store | MiB a row | µs for a (query, row) | rows read, GB/s | ÷ memory | numbers, G/s |")
  print("| --- | --- | --- | --- | --- | --- |")
  for key, (num, row_bytes) in sizes.items():
    seconds, rows = timings[key].median, num_rows // _ROWS * _ROWS
    rate, numbers = rows * row_bytes / seconds, sum(int(np.prod(s)) for s in shapes.values())
    print(
      f"| {key} | {row_bytes / 2**20:.2f} | {seconds / rows / num * 1e6:.1f} | {rate / 1e9:.2f} "
      f"| {rate / bandwidth:.0%} | {rows * numbers / seconds / 1e9:.2f} |"
    )


if __name__ == "__main__":
  app.run(main)
