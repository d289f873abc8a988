"""Scores of every method for the proof: one artefact a method and measurement, at all dampings."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinf.attribution.methods import Method, Question, method_named
from jaxinf.attribution.similarity import clip_embeddings
from jaxinf.curvature.curvature import Curvature
from jaxinf.data.files import read_embeddings
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.model import Task
from jaxinf.engine import artifacts, processes
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Resume
from jaxinf.runs.config import settings
from jaxinf.runs.perform import perform
from jaxinf.runs.run import (
  Run,
  content_of_stage,
  draw_design,
  load_curvature,
  load_task,
  own_settings,
)
from jaxinf.runs.sampling import load_samples
from jaxinf.scores.scores import Scores

_NO_CLIP = "The method clip needs score.clip: a folder with a CLIP, or embeddings.npz."


@dataclasses.dataclass(frozen=True)
class Row:
  """A method with the measurement whose gradient it takes; None where it takes none."""

  method: str
  measurement: str | None

  @property
  def name(self) -> str:
    """As in `influence, loss`."""
    return f"{self.method}, {self.measurement}" if self.measurement else self.method

  @property
  def of(self) -> str:
    """What of the samples it needs: "images" or "trajectories"."""
    return measurement_named(self.measurement).of if self.measurement else self.kind.of

  @property
  def kind(self) -> Method:
    return method_named(self.method)


def rows_of(run: Run) -> list[Row]:
  """The methods of the config, each with the measurements it may take."""
  config = run.config.score
  if not config.methods or not config.measurements:
    raise ValueError("score.methods and score.measurements must name at least one each.")
  measurements = lambda name: config.measurements if method_named(name).measures else (None,)
  return [Row(name, m) for name in config.methods for m in measurements(name)]


def check_rows(run: Run) -> None:
  """Raises ValueError where a method is unknown, or will lack what it needs."""
  for row in rows_of(run):
    if row.of == "trajectories" and not run.config.sample.keep_trajectory:
      raise ValueError(
        f"{row.name} needs sampling trajectories: set sample.keep_trajectory=True, in a new "
        "workdir, or leave it out of score.methods and score.measurements."
      )
    if "clip" in row.kind.reads and run.config.score.clip is None:
      raise ValueError(_NO_CLIP)


def row_of(method: str, measurement: str) -> Row:
  """The row of a method, with the measurement where it takes one."""
  return Row(method, measurement if method_named(method).measures else None)


def at_default(run: Run, row: Row) -> Scores:
  """The scores of a row at the damping recommended without a benchmark, or its only ones."""
  return at_damping(run, row, row.kind.default_damping)


def at_damping(run: Run, row: Row, damping: float | None) -> Scores:
  """The scores of a row at one of its dampings; its only ones where the method has none.

  Raises:
    ValueError: it was not scored at that damping.
  """
  sweep = scored(run, row)
  if row.kind.default_damping is None:
    return sweep[0]
  found = [scores for scores in sweep if scores.settings["damping"] == damping]
  if not found:
    dampings = ", ".join(f"{scores.settings['damping']:g}" for scores in sweep)
    raise ValueError(f"{row.name} is scored at the dampings {dampings}; got {damping}.")
  return found[0]


def is_scored(run: Run, row: Row) -> bool:
  """Whether the scores of a row are there; StaleArtifact where they were made otherwise."""
  return artifacts.finished(_folder(run, row), score_key(run, row))


def scored(run: Run, row: Row) -> list[Scores]:
  """Scores of one row at every damping (or one), computed where they are not there yet.

  Raises:
    ValueError: there are several processes, or the method lacks something.
  """
  if processes.count() > 1:
    raise ValueError("Scores for a proof take one process: start it alone.")
  folder = _folder(run, row)

  def compute() -> Outcome:
    found = row.kind.scores(_question(run, row, folder / "sums"))
    arrays = {
      "values": np.stack([scores.values for scores in found]),
      "query_ids": found[0].query_ids,
      "train_ids": found[0].train_ids,
    }
    notes = {"settings": [dict(scores.settings) for scores in found]}
    return arrays, notes, f"scores at {len(found)} dampings"

  artifact = artifacts.cached(folder, score_key(run, row), compute, label=f"score: {row.name}")
  ids = artifact.arrays["query_ids"], artifact.arrays["train_ids"]
  return [
    Scores(values[None], *ids, settings)
    for values, settings in zip(artifact.arrays["values"], artifact.notes["settings"], strict=True)
  ]


def _folder(run: Run, row: Row) -> pathlib.Path:
  return run.folder("score") / artifacts.file_name(row.name)


def score_key(run: Run, row: Row) -> dict[str, Any]:
  """What the scores of a row depend on."""
  section = settings(run.config.score)
  key = {name: value for name, value in section.items() if name in row.kind.reads} | {
    "seed": run.config.seed,
    "method": row.method,
    "measurement": row.measurement,
    "dampings": row.kind.dampings(run.config.score.dampings),
    "data": {"content": run.data_content, "random_flip": run.dataset.random_flip},
    "train_content": content_of_stage(run, "train"),
    "sample_content": content_of_stage(run, "sample"),
  }
  if "clip" in row.kind.reads and section["clip"] is not None:
    path = pathlib.Path(section["clip"]).expanduser()
    key["clip_content"] = artifacts.fingerprint_of_files(path)
  if row.kind.curved:
    key["curvature"] = own_settings(run, "curvature")
  return key


def _question(run: Run, row: Row, sums: pathlib.Path) -> Question:
  config, task, dataset = run.config.score, load_task(run), run.dataset
  samples = load_samples(run, trajectories=row.of == "trajectories")
  return Question(
    task=task,
    queries=samples["images"],
    query_ids=samples["ids"],
    trajectories=samples.get("trajectories"),
    train_images=dataset.images,
    train_ids=dataset.ids,
    measurement=row.measurement or "loss",
    dampings=row.kind.dampings(config.dampings),
    draws=config.draws,
    draw_groups=config.draw_groups,
    query_draws=config.query_draws,
    query_groups=config.query_groups,
    design=draw_design(config.design, dataset.random_flip),
    compression=config.compression,
    passes=config.passes,
    projection_dim=config.projection_dim,
    projection=config.projection,
    journey_steps=config.journey_steps,
    embeddings=lambda: _embeddings(run, samples),
    curvature=lambda options: _curvature(run, task, options),
    seed=run.config.seed,
    batch_size=config.batch_size,
    devices=run.devices,
    resume=Resume(sums),
  )


def _embeddings(run: Run, samples: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """CLIP's of the samples and of the training images, read or computed."""
  if run.config.score.clip is None:
    raise ValueError(_NO_CLIP)
  path, dataset = pathlib.Path(run.config.score.clip).expanduser(), run.dataset
  if path.suffix == ".npz":
    return read_embeddings(path, samples["ids"]), read_embeddings(path, dataset.ids)
  return clip_embeddings(samples["images"], path), clip_embeddings(dataset.images, path)


def _curvature(run: Run, task: Task, options: Mapping[str, str]) -> Curvature:
  """The run's curvature, or one that differs in `options`, in a folder of its own."""
  section = dataclasses.replace(run.config.curvature, **options)  # type: ignore[arg-type]
  if section != run.config.curvature:
    name = "curvature-" + "-".join((section.method, section.sharing, section.estimator))
    run = dataclasses.replace(
      run,
      config=dataclasses.replace(run.config, curvature=section),
      folders={**run.folders, "curvature": run.workdir / "score" / name},
    )
  perform(run, "curvature")
  return load_curvature(run, task)
