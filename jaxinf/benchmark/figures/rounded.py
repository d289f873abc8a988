"""Scores in half precision (paper, Fig. 21): how much of float32 attribution needs.

The package `traker` keeps features in float16, and so its matrices; `rounded_fisher_scores` rounds
where it does. With features Φ [N, k] and r(·) rounding, sums within a product being float32:

  S = N · r(r(q W) Φᵀ),   W = r(c (G + N λ I)⁻¹) / c,   G = r(Φᵀ Φ),

where N λ is added in half precision, the inverse is taken in float32 and c makes its entries one
in the mean. With more features than examples, the same for Φ Φᵀ in place of Φᵀ Φ.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.features import projection_of, split_draws
from jaxinf.attribution.kernels import QUERY, TRAIN
from jaxinf.attribution.trak import TRAK
from jaxinf.benchmark.scoring import Row, answered, ingredients
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine.compute import Compute
from jaxinf.runs.run import Run
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class RoundedRow(Row):
  """A row whose scores are computed in half precision: one of HALVES[method]."""

  precision: str

  @property
  def name(self) -> str:
    """As in `trak, loss in float16`."""
    return f"{super().name} in {self.precision}"

  def scores(self, run: Run, sums: Path) -> Sweep:
    """The scores with the gradients, or the features and their Fisher, in half precision."""
    if self.precision not in HALVES.get(self.method, ()):
      raise ValueError(f"There is no {self.method} in {self.precision}; there are: {HALVES}.")
    given = ingredients(run, self)
    if self.method == "influence":
      rounded = dataclasses.replace(given, compression=self.precision, precision=self.precision)
      return answered(run, self, self.kind.make(rounded), sums)
    method = self.kind.make(given)
    assert isinstance(method, TRAK)
    return answered(run, self, RoundedTRAK(method, self.precision), sums)


@dataclasses.dataclass(frozen=True)
class RoundedTRAK:
  """TRAK or D-TRAK of one model, its features and its Fisher in half precision."""

  method: TRAK
  precision: str

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping."""
    method = self.method
    projection = projection_of(method.projection, draws)
    draws, asked = split_draws(draws, method.query_draws)
    found = [
      method.features(examples, stream, of, projection, compute).mean(axis=1, dtype=np.float32)
      for examples, stream, of in ((train, TRAIN, draws), (queries, QUERY, asked))
    ]
    values = rounded_fisher_scores(found[0], found[1], method.dampings, self.precision)
    settings = {
      "measurement": measurement_named(method.measurement).name,
      "train_measurement": measurement_named(method.train_measurement).name,
      "precision": self.precision,
      "projection_dim": projection.dim,
    }
    return Sweep(
      Scores(each[None], queries.ids, train.ids, settings | {"damping": damping})
      for each, damping in zip(values, method.dampings, strict=True)
    )


def rounded_fisher_scores(
  train: np.ndarray, queries: np.ndarray, dampings: Sequence[float], precision: str
) -> np.ndarray:
  """Scores [L, Q, N] float32 of rounded features; NaN or infinite where half precision fails.

  Args:
    train: Φ [N, k] float32.
    queries: q [Q, k] float32.
    dampings: λ, normalised by N.
    precision: "float16" or "bfloat16".
  """
  dtype, num = jnp.dtype(precision), len(train)
  rounded = lambda x: x.astype(dtype).astype(np.float32)
  with np.errstate(over="ignore", invalid="ignore"):
    train, queries = rounded(train), rounded(queries)
    primal = train.shape[1] <= num
    gram = rounded(train.T @ train if primal else train @ train.T)
    asked = queries if primal else rounded(queries @ train.T)
    found = []
    for damping in dampings:
      damped = gram.copy()
      damped[np.diag_indices_from(damped)] += rounded(np.float32(num * damping))
      weights, scale = _inverse(rounded(damped))
      solved = rounded(asked @ rounded(weights / scale))
      scores = rounded(solved @ train.T) if primal else solved
      found.append(scores * (num * scale))
  return np.stack(found)


def _inverse(matrix: np.ndarray) -> tuple[np.ndarray, np.float32]:
  """The inverse in float32 and the mean magnitude of its entries; NaN where there is none."""
  try:
    if not np.isfinite(matrix).all():
      raise np.linalg.LinAlgError
    inverse = np.linalg.inv(matrix)
  except np.linalg.LinAlgError:
    inverse = np.full_like(matrix, np.nan)
  return inverse, np.abs(inverse).mean()


# Method → the half precisions it can be computed in.
HALVES = {
  "influence": ("bfloat16",),
  "trak": ("float16", "bfloat16"),
  "dtrak": ("float16", "bfloat16"),
}
