"""Time and memory of fitting curvature against plain training steps of the same pairs, as tables.

  make bench-curvature                                   # the small U-Net (756,035 parameters)
  make bench-curvature ARGS="--model=ddpm-cifar --batch=128"   # the 38.3 M DDPM-CIFAR U-Net
  make bench-curvature ARGS="--work=FOLDER"              # beside other programs

1. One batch of (example, draw) pairs: forward and backward (plain), the part of it that curvature
   needs (taps: inputs and output gradients of all layers), the passes of K-FAC, EK-FAC and the
   diagonal, and the eigendecomposition of all layers.
2. The floor: how much of each pass is the products that it must make.
3. All pairs: whole fits, from stored pairs and through the library's driver.

Rounds go through everything in turn, so that slow drift of the machine hits all alike; medians are
shown. Weights and pairs are random: times do not depend on them.

With --work, they are those of a folder that several programs measure themselves on:

  unet-small/      the network, as diffusers saves it: config.json and the weights
  data-small.npz   train [N, C, H, W] in [-1, 1]; train_t [N, S], 0-based; train_eps (true noise)
                   and train_xi (noise of one model-sampled target) [N, S, C, H, W]; sqrt_abar and
                   sqrt_one_minus_abar [T], from which x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε
  results.jsonl    one line a result, ours among them when the benchmark has run
"""

import functools
from pathlib import Path

import absl.logging
import jax
from absl import app, flags

from jaxinf.curvature.decompose import DECOMPOSERS, decomposed
from tests.benchmarks.floor import layer_products, matmul, print_floor
from tests.benchmarks.passes import Kernels, driver_pairs, fits, random_rotations, stored_pairs
from tests.benchmarks.results import append_line, print_results
from tests.benchmarks.workloads import (
  BATCH,
  MODEL,
  ROUNDS,
  Timing,
  Workload,
  alternating,
  folder_workload,
  print_table,
  random_workload,
  together,
)

_WORK = flags.DEFINE_string("work", None, "Folder of the network, pairs and results to share.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Random examples, with 8 draws each.")
_DECOMPOSE = flags.DEFINE_multi_enum(
  "decompose", list(DECOMPOSERS), list(DECOMPOSERS), "Where factors are decomposed."
)
_FITS = flags.DEFINE_boolean("fits", True, "Whether to go through all pairs.")
_FIT_ROUNDS = 3

PROJECTED = {"CIFAR-2": 5_000, "CIFAR-10": 50_000}  # training images, with 250 draws each


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  if _WORK.value:
    workload = folder_workload(Path(_WORK.value))
  else:
    workload = random_workload(MODEL.value, _EXAMPLES.value, draws=8)
  print(workload)
  kernels = Kernels.of(workload)
  one_batch(workload, kernels)
  if not _FITS.value:
    return
  timings = all_pairs(workload, kernels)
  if _WORK.value:
    path = Path(_WORK.value) / "results.jsonl"
    for name, timing in timings.items():
      append_line(path, f"jaxinf-{name}", timing, timings["plain"], batch=BATCH.value)
    print_results(path)


def one_batch(workload: Workload, kernels: Kernels) -> None:
  """Passes over one batch: times, the floor, and what fits of known size would take."""
  size, params = BATCH.value, workload.params
  pairs = workload.batches(size)[0]
  on_pairs = lambda kernel, operands: (size, functools.partial(jax.jit(kernel), operands, pairs))
  factors = kernels.layers.factors(jax.jit(kernels.kfac)(params, pairs), size)
  product, flops = matmul()
  calls = {
    "plain": on_pairs(kernels.plain, params),
    "taps": on_pairs(kernels.taps, params),
    "K-FAC pass": on_pairs(kernels.kfac, params),
    "EK-FAC pass": on_pairs(kernels.ekfac, (params, random_rotations(kernels.layers))),
    "diagonal": on_pairs(kernels.diagonal, params),
  }
  for where in _DECOMPOSE.value:
    decompose = functools.partial(decomposed, factors, where)
    calls[f"eigendecomposition, {where}"] = (0, lambda decompose=decompose: decompose()[1])
  timings = alternating(calls | {"matrix product": (0, product)}, ROUNDS.value)
  timings["K-FAC and EK-FAC pass"] = together(timings["K-FAC pass"], timings["EK-FAC pass"])
  print_table(timings)
  seconds = {name: timing.median for name, timing in timings.items()}
  print_floor(
    layer_products(kernels.layers, workload),
    pairs=size,
    rate=flops / seconds["matrix product"],
    plain=seconds["plain"],
    taps=seconds["taps"],
    passes={
      "kfac": seconds["K-FAC pass"],
      "ekfac": seconds["EK-FAC pass"],
      "diagonal": seconds["diagonal"],
    },
  )
  for name, images in PROJECTED.items():
    hours = lambda fit, images=images: images * 250 / size * seconds[fit] / 3600
    kfac, ekfac = hours("K-FAC pass"), hours("K-FAC and EK-FAC pass")
    print(f"{name}, {images:,} × 250 pairs: K-FAC {kfac:.2f} h, EK-FAC {ekfac:.2f} h")


def all_pairs(workload: Workload, kernels: Kernels) -> dict[str, Timing]:
  """Whole fits from stored pairs, and through the driver with as many draws of its own."""
  size, num = BATCH.value, len(workload)
  stored, driver = stored_pairs(workload, size), driver_pairs(workload, size)
  calls = {"plain": (num, functools.partial(stored(kernels.plain), workload.params))}
  for suffix, over_all in (("", stored), ("-driver", driver)):
    for name, fit in fits(workload, kernels, over_all, _DECOMPOSE.value[0]).items():
      calls[name + suffix] = (num, fit)
  timings = alternating(calls, _FIT_ROUNDS)
  print_table(timings)
  return timings


if __name__ == "__main__":
  app.run(main)
