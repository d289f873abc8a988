"""TRAK features against plain training steps of the same pairs, and scores beside traker's.

  make bench-trak                                         # the small U-Net, random pairs
  make bench-trak ARGS="--work=FOLDER"                    # beside traker, see `trak_peer`

1. All pairs: forward and backward (plain); the gradients of all examples with respect to all
   parameters, brought to the host; and their features, by the library's own pass. With --work also
   what traker took, where FOLDER/results.jsonl has a line of the benchmark "trak".
2. With --work, scores for several projections: rank correlations, means over queries, among ours,
   among traker's (of FOLDER/traker-scores.npz), between them, and to the scores without projection.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import stats

from jaxinf import engine
from jaxinf.attribution.features import FeaturePass, all_layers
from jaxinf.attribution.fisher import fisher_of
from jaxinf.attribution.kernels import flat
from jaxinf.compression.projection import ENTRIES, Projection
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.noise import Noised
from jaxinf.engine import Compute, Rows
from tests.benchmarks.passes import Kernels
from tests.benchmarks.results import append_line
from tests.benchmarks.workloads import (
  BATCH,
  MODEL,
  PROCESS,
  ROUNDS,
  Workload,
  alternating,
  folder_workload,
  print_table,
  random_workload,
  stored,
)

_WORK = flags.DEFINE_string("work", None, "Folder of the network, pairs and results to share.")
_EXAMPLES = flags.DEFINE_integer("examples", 256, "Random examples, with 8 draws each.")
_DIM = flags.DEFINE_integer("dim", 2048, "Dimension of the projection.")
_KINDS = flags.DEFINE_multi_enum("kind", ["rademacher"], sorted(ENTRIES), "Entries of P.")
_BLOCK = flags.DEFINE_float("block_mib", 1024, "Gradients projected at once.")
_TIMES = flags.DEFINE_boolean("times", True, "Whether to time anything.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Projections that are compared.")
_DAMPING = flags.DEFINE_float("damping", 0.03, "λ, where there are no scores of traker.")


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  folder = Path(_WORK.value) if _WORK.value else None
  workload = folder_workload(folder) if folder else random_workload(MODEL.value, _EXAMPLES.value, 8)
  print(f"{workload}; {_DIM.value} dimensions")
  kernel = stored_kernel(workload)
  if _TIMES.value:
    times(workload, kernel, folder)
  if folder:
    agreement(workload, kernel, folder)


def stored_kernel(workload: Workload) -> engine.Kernel:
  """(params, rows with the stored pairs of an example each) → gradients [B, P]."""
  layers = all_layers(workload.model, workload.examples)

  def kernel(params, batch):
    num, draws = batch.conditioning.t.shape
    noised = jax.tree.map(lambda x: x.reshape(num * draws, *x.shape[2:]), batch.conditioning)
    cotangents = LOSS.cotangents(PROCESS, noised, draws)
    grads = layers.gradients(params, noised, cotangents, rows=num)
    return jnp.concatenate([flat(matrices) for matrices in grads.values()], axis=1)

  return kernel


def stored_rows(noised: Noised, num: int) -> Rows:
  """One row an example, of `num`, with its pairs."""
  each = lambda x: np.asarray(x).reshape(num, -1, *x.shape[1:])
  return Rows(None, np.arange(num, dtype=np.uint32), conditioning=jax.tree.map(each, noised))


def times(workload: Workload, kernel: engine.Kernel, folder: Path | None) -> None:
  """Plain, gradients and features of all pairs."""
  size, num, num_images = BATCH.value, len(workload), len(workload.images)
  rows, params = stored_rows(workload.pairs.noised, num_images), workload.params
  batches, per_batch = workload.batches(size), max(1, size * num_images // num)
  plain = jax.jit(Kernels.of(workload).plain)

  def gradients():
    stream = engine.stream_batches(kernel, params, rows, batch_size=per_batch, label=None)
    return [grads[:, :1] for grads in stream]

  def features(kind: str):
    compute = Compute(block_mib=_BLOCK.value)
    feature_pass = FeaturePass(Projection(_DIM.value, 0, kind), compute)
    return lambda: feature_pass(kernel, params, rows, batch_size=per_batch, label="features")

  calls = {
    "plain": (num, lambda: [plain(params, pairs) for pairs in batches][-1]),
    "gradients": (num, gradients),
  } | {f"features, {kind}": (num, features(kind)) for kind in _KINDS.value}
  timings = alternating(calls, ROUNDS.value)
  print_table(timings)
  entries = _DIM.value * sum(leaf.size for leaf in jax.tree.leaves(params))
  for kind in _KINDS.value:
    seconds = timings[f"features, {kind}"].median - timings["gradients"].median
    print(
      f"projection, {kind}: {seconds:.2f} s for {entries / 1e9:.2f} G entries and {num_images} "
      f"rows, {2 * num_images * entries / seconds / 1e9:,.0f} Gflop/s with the making of P"
    )
  if folder:
    for kind in _KINDS.value:
      append_line(
        folder / "results.jsonl", f"jaxinf-trak-features-{kind}", timings[f"features, {kind}"],
        timings["plain"], batch=size, proj_dim=_DIM.value,
      )  # fmt: skip
    print_traker(folder / "results.jsonl", timings[f"features, {_KINDS.value[0]}"].median)


def print_traker(path: Path, ours: float) -> None:
  """traker's featurisation of the same pairs, from its last line in the results."""
  lines = map(json.loads, path.read_text().splitlines())
  found = [line for line in lines if line["benchmark"] == "trak"]
  if not found:
    print("no line of traker in results.jsonl: run bench_trak.py of the peers")
    return
  stages, plain = found[-1]["stages"], found[-1]["plain_seconds"]["median"]
  seconds, inside = (stages[name]["median"] for name in ("featurize", "featurize_projection"))
  print(
    f"traker, {found[-1]['proj_type']}: features {seconds:.1f} s, of which projection {inside:.1f} "
    f"s; ÷ its plain {seconds / plain:.2f}; ÷ ours {seconds / ours:.2f}"
  )


def agreement(workload: Workload, kernel: engine.Kernel, folder: Path) -> None:
  """Rank correlations of scores for several projections."""
  with np.load(folder / "data-small.npz") as file:
    data = {key: file[key] for key in file.files}
  splits = [
    (workload.pairs.noised, len(workload.images)),
    (_noised(data, "query"), len(data["query"])),
  ]
  train, query = (
    np.concatenate(
      list(
        engine.stream_batches(
          kernel, workload.params, stored_rows(noised, num), batch_size=8, label=None
        )
      )
    )
    for noised, num in splits
  )
  path = folder / "traker-scores.npz"
  theirs, damping = None, _DAMPING.value
  if path.exists():
    with np.load(path) as file:
      theirs, damping = list(file["scores"]), float(file["damping"])
  trace = np.mean(np.sum(np.square(train), axis=1, dtype=np.float64))
  print(f"λ = {damping:.1e}; the trace of H is {trace:.1e}, {trace / len(train):.1e} an example")
  exact = fisher_of(train).scores(query, damping)
  project = jax.jit(Projection(_DIM.value, 0))
  both = jnp.asarray(np.concatenate([train, query]))
  ours = []
  for seed in range(_SEEDS.value):
    features = np.asarray(project(both, Projection(_DIM.value, seed).key))
    ours.append(fisher_of(features[: len(train)]).scores(features[len(train) :], damping))
  print("| scores of | and of | Spearman, mean over queries and projections |")
  print("| --- | --- | --- |")
  rows = [("jaxinf", ours, "other projections", None), ("jaxinf", ours, "no projection", [exact])]
  if theirs is not None:
    mean = [np.mean(ours, axis=0)]
    rows += [
      ("traker", theirs, "other projections", None),
      ("traker", theirs, "no projection", [exact]),
      ("jaxinf", ours, "traker", theirs),
      ("jaxinf, mean over projections", mean, "traker, likewise", [np.mean(theirs, axis=0)]),
    ]
  for name, first, other, second in rows:
    pairs = itertools.combinations(first, 2) if second is None else itertools.product(first, second)
    print(f"| {name} | {other} | {np.mean([_spearman(*pair) for pair in pairs]):.3f} |")


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
  """Mean over queries of the rank correlation over training images."""
  each: Sequence[float] = [
    stats.spearmanr(*pair).statistic for pair in zip(first, second, strict=True)
  ]
  return float(np.mean(each))


def _noised(data: dict[str, np.ndarray], split: str) -> Noised:
  """The stored pairs of a split, channels last."""
  t = data[f"{split}_t"]
  spread = lambda table: table[t][..., None, None, None]
  clean, noise = spread(data["sqrt_abar"]), spread(data["sqrt_one_minus_abar"])
  x_t = clean * data[split][:, None] + noise * data[f"{split}_eps"]
  last = lambda x: np.ascontiguousarray(np.moveaxis(x.reshape(-1, *x.shape[2:]), -3, -1))
  return stored(last(x_t), t.reshape(-1), last(data[f"{split}_eps"]))


if __name__ == "__main__":
  app.run(main)
