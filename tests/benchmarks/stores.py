"""Size and accuracy of stores of training gradients, as a table.

  make bench-store                        # the digits run of `make demo`, which must be finished
  make bench-store ARGS="--config=tests/benchmarks/cifar2_slice.py --workdir=runs/cifar2-slice"

For each compression of the rows, a store of some training images is built in a temporary folder,
and samples are scored from it. Scores are compared with those of `influence`, which computes the
training gradients anew, with float32 queries, the same draws and the same dampings.

  MiB           of an image, all replicates of draws together
  rank          Spearman's correlation over training images: mean over samples, and the least
  error         largest difference of scores, of the largest score
"""

import tempfile
import time
from pathlib import Path

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from jaxinf import Compute, Draws, Examples, build_store, influence_sweep
from jaxinf.attribution.scoring import correlations
from jaxinf.compression.compression import compression_named
from jaxinf.engine import artifacts
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "Of the run.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "A run with its curvature finished.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Training images.")
_QUERIES = flags.DEFINE_integer("queries", 8, "Samples.")
_DRAWS = flags.DEFINE_integer("draws", 12, "Draws of every image, in two groups.")
_DAMPINGS = flags.DEFINE_multi_float("damping", [1e-8, 1e-4], "λ.")
_BATCH = flags.DEFINE_integer("batch", 96, "Pairs at a time.")

STORES = (
  (None, None),
  ("bfloat16", None),
  ("int16", None),
  ("int8", None),
  ("int4", None),
  ("truncation", 0.5),
  ("truncation", 0.25),
)


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  run = runs.Run(typed(_CONFIG.value), Path(_WORKDIR.value))
  curvature = runs.load_curvature(run, runs.load_model(run))
  train = run.dataset.sample(min(_EXAMPLES.value, len(run.dataset)), seed=0).examples
  samples = artifacts.read(run.folder("sample")).arrays["images"]
  queries = Examples(samples[: _QUERIES.value])
  settings = dict(draws=Draws(_DRAWS.value, 2), compute=Compute(_BATCH.value))
  anew = influence_sweep(
    curvature,
    queries=queries,
    train=train,
    dampings=_DAMPINGS.value,
    compression=None,
    **settings,
  )
  print(
    f"{run.dataset.name}: {len(train)} images, {len(queries)} samples, {_DRAWS.value} draws; "
    f"{jax.devices()[0].device_kind}"
  )
  head = "".join(f" rank at λ = {value:.0e}, least | error |" for value in _DAMPINGS.value)
  print(f"| rows | MiB an image | s to build | s a query |{head}")
  print("| --- | --- | --- | --- |" + " --- | --- |" * len(_DAMPINGS.value))
  for name, size in STORES:
    compression = compression_named(name, size)
    with tempfile.TemporaryDirectory() as folder:
      began = time.perf_counter()
      store = build_store(folder, curvature, train=train, compression=compression, **settings)
      built, cells = time.perf_counter() - began, []
      for scores in anew:
        damping = scores.settings["damping"]
        for _ in range(2):  # the first compiles
          began = time.perf_counter()
          found = store.query(queries, damping=damping, **settings)
          took = (time.perf_counter() - began) / len(queries)
        compared = correlations(scores.values, found.values)
        error = np.abs(found.values - scores.values).max() / np.abs(scores.values).max()
        cells.append(
          f" {compared['spearman']:.4f}, {compared['least_spearman']:.4f} | {error:.1e} |"
        )
      size = store.num_bytes / len(train) / 2**20
      row = f"| {compression.description} | {size:.3f} | {built:.0f} | {took:.2f} |"
      print(row + "".join(cells), flush=True)


if __name__ == "__main__":
  app.run(main)
