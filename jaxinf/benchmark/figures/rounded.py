"""Scores in half precision (paper, Fig. 21): how much of float32 attribution needs.

The package `traker` keeps features in float16, and so its matrices; `rounded_fisher_scores` rounds
where it does. With features Φ [N, k] and r(·) rounding, sums within a product being float32:

  S = N · r(r(q W) Φᵀ),   W = r(c (G + N λ I)⁻¹) / c,   G = r(Φᵀ Φ),

where N λ is added in half precision, the inverse is taken in float32 and c makes its entries one
in the mean. With more features than examples, the same for Φ Φᵀ in place of Φᵀ Φ.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.examples import examples_of
from jaxinf.attribution.features import features_of, flat_kernel, register_everything
from jaxinf.attribution.kernels import QUERY, TRAIN, DrawGroups, gradient_kernel
from jaxinf.attribution.methods import Method, Question, influence_of
from jaxinf.benchmark.scoring import Row
from jaxinf.compression.projection import Projection
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.scores.scores import Scores


@dataclasses.dataclass(frozen=True)
class RoundedRow(Row):
  """A row whose scores are computed in half precision: one of HALVES[method]."""

  precision: str

  @property
  def name(self) -> str:
    """As in `trak, loss in float16`."""
    return f"{super().name} in {self.precision}"

  @property
  def kind(self) -> Method:
    if self.precision not in HALVES.get(self.method, ()):
      raise ValueError(f"There is no {self.method} in {self.precision}; there are: {HALVES}.")
    scores = functools.partial(_SCORES[self.method], precision=self.precision)
    return dataclasses.replace(super().kind, scores=scores)


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


def _influence(question: Question, precision: str) -> Sequence[Scores]:
  return influence_of(dataclasses.replace(question, compression=precision), precision=precision)


def _trak(question: Question, precision: str) -> Sequence[Scores]:
  return _projected(question, question.measurement, "loss", precision)


def _dtrak(question: Question, precision: str) -> Sequence[Scores]:
  return _projected(question, "square_norm", "square_norm", precision)


def _projected(
  question: Question, measurement: str, train_measurement: str, precision: str
) -> Sequence[Scores]:
  train = _features(question, TRAIN, train_measurement)
  queries = _features(question, QUERY, measurement)
  scores = rounded_fisher_scores(train, queries, question.dampings, precision)
  settings: dict[str, Any] = dict(
    measurement=measurement,
    train_measurement=train_measurement,
    precision=precision,
    projection_dim=question.projection_dim,
  )
  return [
    Scores(values[None], question.query_ids, question.train_ids, settings | {"damping": damping})
    for values, damping in zip(scores, question.dampings, strict=True)
  ]


def _features(question: Question, stream: str, name: str) -> np.ndarray:
  """[rows, k] float32 features with the draws and the projection of `trak`."""
  measurement = measurement_named(name)
  if stream == TRAIN:
    examples = examples_of(question.train_images, question.train_ids, None, "train", measurement)
    draws, num_groups, design = question.draws, question.draw_groups, question.design
  else:
    examples = examples_of(question.of(name), question.query_ids, None, "query", measurement)
    draws, num_groups = question.query_draws, question.query_groups
    design = question.design.without_flips()
  model = register_everything(question.task, examples.image_shape)
  groups = DrawGroups(question.seed, draws // num_groups, design)
  features = features_of(
    flat_kernel(gradient_kernel(model, measurement, question.task.schedule, groups)),
    question.task.params,
    examples,
    groups,
    num_groups=num_groups,
    stream_name=stream,
    projection=Projection(question.projection_dim, question.seed, question.projection),
    batch_size=question.batch_size,
    devices=question.devices,
  )
  return features.mean(axis=1, dtype=np.float32)


# Method → the half precisions it can be computed in.
HALVES = {
  "influence": ("bfloat16",),
  "trak": ("float16", "bfloat16"),
  "dtrak": ("float16", "bfloat16"),
}
_SCORES = {"influence": _influence, "trak": _trak, "dtrak": _dtrak}
