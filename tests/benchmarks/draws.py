"""The noise of scores under each design of draws, at equal cost, as a table.

  make bench-draws                     # the digits run of `make demo`, which must be finished
  make bench-draws ARGS="--examples=64 --reference_draws=1000"

For every design, many independent replicates of the same number of draws score some training images
for some samples; each group is one attempt at that cost. The reference has many uniform draws, each
image's own. All share the query rows, so that what differs is the training draws.

  relative variance   the variance of a score over groups, ÷ the variance of reference scores over
                      training images; mean over samples
  of differences      likewise for scores less their mean over training images: what orders them
  rank correlation    Spearman's, over training images, of one group with the reference; mean over
                      groups and samples, with the standard error over groups
  top 10              how many of the reference's 10 best images one group has among its 10 best

"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from scipy import stats

from jaxinf import Compute, Draws, Examples, influence
from jaxinf.engine import artifacts
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed

_CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "Of the run.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "A run with its curvature finished.")
_EXAMPLES = flags.DEFINE_integer("examples", 128, "Training images scored.")
_QUERIES = flags.DEFINE_integer("queries", 8, "Samples.")
_DRAWS = flags.DEFINE_multi_integer("draws", [12, 48], "Draws of one attempt.")
_ATTEMPTS = flags.DEFINE_integer("attempts", 16, "Groups of each size.")
_REFERENCE = flags.DEFINE_integer("reference_draws", 5_000, "Draws of the reference.")
_QUERY_DRAWS = flags.DEFINE_integer("query_draws", 1_000, "Draws of a query.")
_DAMPING = flags.DEFINE_float("damping", 1e-8, "λ.")
_BATCH = flags.DEFINE_integer("batch", 128, "Pairs at a time.")
_OUT = flags.DEFINE_string("out", None, "File for the table's numbers, as JSON.")

UNIFORM = dict(timesteps="uniform", antithetic=False, shared=False)
DESIGNS = {
  f"{timesteps}{', antithetic' * antithetic}{', shared' * shared}": dict(
    timesteps=timesteps, antithetic=antithetic, shared=shared
  )
  for shared, antithetic, timesteps in itertools.product(
    (False, True), (False, True), ("uniform", "stratified")
  )
}


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  run = runs.Run(typed(_CONFIG.value), Path(_WORKDIR.value))
  problem = Problem(run)
  began = time.perf_counter()
  reference = problem.replicate_values(UNIFORM, _REFERENCE.value, 50).mean(axis=0)
  print(
    f"{run.dataset.name}: {_EXAMPLES.value} images, {_QUERIES.value} samples, "
    f"λ = {_DAMPING.value}; reference of {_REFERENCE.value} draws in "
    f"{time.perf_counter() - began:.0f} s; {jax.devices()[0].device_kind}"
  )
  print("| draws | design | relative variance | of differences | rank correlation | top 10 |")
  print("| --- | --- | --- | --- | --- | --- |")
  found = []
  for size in _DRAWS.value:
    for name, design in DESIGNS.items():
      groups = problem.replicate_values(design, _ATTEMPTS.value * size, _ATTEMPTS.value)
      row = {"draws": size, "design": name} | quality(groups, reference)
      found.append(row)
      print(
        f"| {size} | {name} | {row['variance']:.3f} | {row['differences']:.3f} "
        f"| {row['rank']:.3f} ± {row['rank_error']:.3f} | {row['top']:.2f} |",
        flush=True,
      )
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(found, indent=1))


class Problem:
  """Training images, samples, and the curvature of a run."""

  def __init__(self, run: runs.Run):
    self._curvature = runs.load_curvature(run, runs.load_model(run))
    self._train = run.dataset.sample(_EXAMPLES.value, seed=0).examples
    samples = artifacts.read(run.folder("sample")).arrays["images"]
    self._queries = Examples(samples[: _QUERIES.value])

  def replicate_values(self, design: dict[str, Any], draws: int, groups: int) -> np.ndarray:
    """[G, Q, N] scores of independent replicates of draws."""
    scores = influence(
      self._curvature,
      queries=self._queries,
      train=self._train,
      damping=_DAMPING.value,
      draws=Draws(draws, groups, seed=1, **design),
      query_draws=Draws(_QUERY_DRAWS.value, 1, seed=1, **UNIFORM),
      compression=None,
      compute=Compute(_BATCH.value),
    )
    return scores.replicate_values


def quality(groups: np.ndarray, reference: np.ndarray) -> dict[str, float]:
  """How near groups [G, Q, N] are to the reference [Q, N]."""
  ranks = np.array(
    [
      [stats.spearmanr(*pair).statistic for pair in zip(group, reference, strict=True)]
      for group in groups
    ]
  )
  best = lambda scores: [set(np.argsort(-row)[:10]) for row in scores]
  top = [
    [len(a & b) / 10 for a, b in zip(best(group), best(reference), strict=True)] for group in groups
  ]
  spread = lambda x: float((x.var(axis=0, ddof=1).mean(axis=1) / reference.var(axis=1)).mean())
  return {
    "variance": spread(groups),
    "differences": spread(groups - groups.mean(axis=2, keepdims=True)),
    "rank": float(ranks.mean()),
    "rank_error": float(ranks.mean(axis=1).std(ddof=1) / np.sqrt(len(groups))),
    "top": float(np.mean(top)),
  }


if __name__ == "__main__":
  app.run(main)
