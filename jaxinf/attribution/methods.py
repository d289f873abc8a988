"""Methods of attribution by name, in one frame: a question in, scores at every damping out.

The names stand in METHODS at the foot. All return `Scores` of the same queries and training images,
positive where an image supports a query. The oracle, exact retraining, predicts models rather than
scoring images, and is evaluation/oracle.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.attribution import similarity
from jaxinf.attribution.das import das
from jaxinf.attribution.influence import influence
from jaxinf.attribution.journey import journey_trak
from jaxinf.attribution.trak import dtrak, trak
from jaxinf.core.types import Array
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine.checkpoints import Resume
from jaxinf.scores.scores import Scores


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked of a method: which training images support which queries.

  Attributes:
    task: the model.
    queries: [Q, H, W, C] generated images.
    query_ids: [Q].
    trajectories: [Q, T + 1, H, W, C] on which they were sampled, or None.
    train_images: [N, H, W, C].
    train_ids: [N].
    measurement: whose gradient is taken at the queries; see diffusion.measurements.
    dampings: L values of λ, for methods that have one.
    draws, draw_groups, query_draws, query_groups: of (t, ε), as of `influence`.
    design: of the draws for training images, with flips where training had them.
    compression: of preconditioned query gradients.
    passes: parts of the queries (at most one a query), whose preconditioned gradients are in memory
      one after another.
    projection_dim, projection, journey_steps: of TRAK and its kin.
    embeddings: () → those of queries [Q, E] and of training images [N, E], for "clip".
    curvature: options of `fit_curvature` that differ from the usual ones → the curvature.
    seed, batch_size, devices, resume: as of `influence`.
  """

  task: Task
  queries: Array
  query_ids: np.ndarray
  trajectories: Array | None
  train_images: Array
  train_ids: np.ndarray
  measurement: str
  dampings: Sequence[float]
  draws: int
  draw_groups: int
  query_draws: int
  query_groups: int
  design: DrawDesign
  compression: str | None
  passes: int
  projection_dim: int
  projection: str
  journey_steps: int
  embeddings: Callable[[], tuple[Array, Array]]
  curvature: Callable[[Mapping[str, Any]], Curvature]
  seed: int
  batch_size: int
  devices: Sequence[jax.Device] | None = None
  resume: Resume | None = None

  def of(self, measurement: str) -> Array:
    """The queries that a measurement is of: images, or trajectories."""
    of = measurement_named(measurement).of
    if of == "predictions":
      raise ValueError(
        f"{measurement} is of images predicted on the way to a query, which only the method "
        "journey-trak makes: ask that, with journey_steps, or measure something else."
      )
    return self.queries if of == "images" else self.saved_trajectories

  @property
  def saved_trajectories(self) -> Array:
    """The trajectories; ValueError where none were kept."""
    if self.trajectories is None:
      raise ValueError(
        "The sampling trajectories are needed, and were not kept: sample with "
        "sample.keep_trajectory=True (keep_trajectory of jaxinf.diffusion.sampler.sample)."
      )
    return self.trajectories

  @property
  def common(self) -> dict[str, Any]:
    """Arguments that all methods on gradients share."""
    return dict(
      damping=tuple(self.dampings), draws=self.draws, draw_groups=self.draw_groups,
      query_draws=self.query_draws, query_groups=self.query_groups, design=self.design,
      query_ids=self.query_ids, train_ids=self.train_ids, seed=self.seed,
      batch_size=self.batch_size, devices=self.devices, resume=self.resume,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
  """A method, and what a user takes where nothing was tuned.

  Attributes:
    scores: question → scores, one for each damping, or a single one.
    default_damping: λ recommended without a benchmark (paper, J.4); None: the method has none.
    measures: whether scores depend on the measurement whose gradient is taken.
    curved: whether they depend on a fitted curvature.
    reads: fields of the question they depend on, of those that are settings.
    sweeps: whether damping changes more than the scale of scores.
    of: what of the queries it needs where it takes no measurement: "images" or "trajectories".
  """

  scores: Callable[[Question], Sequence[Scores]]
  default_damping: float | None = None
  measures: bool = False
  curved: bool = False
  reads: tuple[str, ...] = ()
  sweeps: bool = True
  of: str = "images"

  def dampings(self, sweep: Sequence[float]) -> tuple[float, ...]:
    """Those of a sweep and the default, ascending; none where the method has none."""
    if self.default_damping is None:
      return ()
    return tuple(sorted({*sweep, self.default_damping} if self.sweeps else {self.default_damping}))


def method_named(name: str) -> Method:
  """The method of that name; an unknown one is a ValueError that lists them."""
  if name not in METHODS:
    raise ValueError(f"Unknown method {name!r}; there are: {', '.join(METHODS)}.")
  return METHODS[name]


def influence_of(
  question: Question, *, precision: str | None = None, **options: Any
) -> Sequence[Scores]:
  """In `passes` parts of the queries, each with a pass of its own over the training gradients.

  Args:
    question: what is asked.
    precision: of the network's products in the passes over training images, as of `influence`.
    options: of the curvature, where they differ from the usual ones.

  Raises:
    ValueError: there is no pass.
  """
  queries = question.of(question.measurement)
  if question.passes < 1:
    raise ValueError(f"passes must be at least 1; got {question.passes}.")
  passes = min(question.passes, len(queries))
  curvature = question.curvature(options)
  parts = []
  for number, rows in enumerate(np.array_split(np.arange(len(queries)), passes)):
    common = question.common | {"query_ids": question.query_ids[rows]}
    if question.resume is not None and passes > 1:
      folder = question.resume.folder / f"part-{number:03d}"
      common["resume"] = dataclasses.replace(question.resume, folder=folder)
    parts.append(
      influence(
        question.task, curvature, queries[rows], question.train_images,
        measurement=question.measurement, compression=question.compression, precision=precision,
        **common,
      )
    )  # fmt: skip
  return [_joined(alike) for alike in zip(*parts, strict=True)]


def _joined(parts: Sequence[Scores]) -> Scores:
  """The scores of several parts of the queries."""
  if len(parts) == 1:
    return parts[0]
  of_queries = [part.query_group_values for part in parts]
  return dataclasses.replace(
    parts[0],
    group_values=np.concatenate([part.group_values for part in parts], axis=1),
    query_ids=np.concatenate([part.query_ids for part in parts]),
    query_group_values=None if of_queries[0] is None else np.concatenate(of_queries, axis=1),  # type: ignore[arg-type]
  )


def _projected(question: Question, method: Callable[..., Any], **options: Any) -> Sequence[Scores]:
  queries = question.of(options.get("measurement", "loss"))
  return method(
    question.task, queries, question.train_images, projection_dim=question.projection_dim,
    projection=question.projection, **options, **question.common,
  )  # fmt: skip


def _trak(question: Question) -> Sequence[Scores]:
  return _projected(question, trak, measurement=question.measurement)


def _journey_trak(question: Question) -> Any:
  total, num = question.task.schedule.num_steps, question.journey_steps
  timesteps = np.unique(np.linspace(0, total - 1, num + 2).round().astype(int)[1:-1])
  return journey_trak(
    question.task, question.saved_trajectories, question.train_images,
    timesteps=timesteps.tolist(), projection_dim=question.projection_dim,
    projection=question.projection, **question.common,
  )  # fmt: skip


def _pixel(question: Question, metric: str) -> Sequence[Scores]:
  ids = dict(query_ids=question.query_ids, train_ids=question.train_ids)
  images = question.queries, question.train_images
  return [similarity.pixel_similarity(*images, metric=metric, **ids)]


def _clip(question: Question) -> Sequence[Scores]:
  ids = dict(query_ids=question.query_ids, train_ids=question.train_ids)
  return [similarity.embedding_similarity(*question.embeddings(), name="clip", **ids)]


def _random(question: Question) -> Sequence[Scores]:
  return [similarity.random_scores(question.query_ids, question.train_ids, seed=question.seed)]


_DRAWS = ("draws", "draw_groups", "query_draws", "query_groups", "design")
_PROJECTED = (*_DRAWS, "projection_dim", "projection")


def _with_curvature(sweeps: bool = True, **options: Any) -> Method:
  scores = functools.partial(influence_of, **options)
  return Method(scores, 1e-8, True, True, (*_DRAWS, "compression"), sweeps)


METHODS: dict[str, Method] = {
  "influence": _with_curvature(),  # the run's own
  "kfac": _with_curvature(method="kfac", sharing="expand", estimator="mc"),
  "ekfac": _with_curvature(method="ekfac", sharing="expand", estimator="mc"),
  "kfac-empirical": _with_curvature(method="kfac", sharing="expand", estimator="empirical"),
  "kfac-reduce": _with_curvature(method="kfac", sharing="reduce", estimator="mc"),
  "kfac-reduce-empirical": _with_curvature(method="kfac", sharing="reduce", estimator="empirical"),
  "diagonal": _with_curvature(method="diagonal", estimator="mc"),
  "identity": _with_curvature(method="identity", sweeps=False),
  "cg": _with_curvature(method="cg"),
  "trak": Method(_trak, 1e-9, measures=True, reads=_PROJECTED),
  "dtrak": Method(functools.partial(_projected, method=dtrak), 1e-9, reads=_PROJECTED),
  "journey-trak": Method(
    _journey_trak, 1e-9, reads=(*_PROJECTED, "journey_steps"), of="trajectories"
  ),
  "das": Method(functools.partial(_projected, method=das), 1e-9, reads=_PROJECTED),
  "pixel": Method(functools.partial(_pixel, metric="cosine")),
  "pixel-l2": Method(functools.partial(_pixel, metric="l2")),
  "clip": Method(_clip, reads=("clip",)),
  "random": Method(_random),
}
