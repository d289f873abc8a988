"""Scores of every method for the proof: one artefact a method and measurement, at all dampings."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from jaxinf.attribution.methods import Attribution, Ingredients, Method, method_named
from jaxinf.attribution.similarity import clip_embeddings
from jaxinf.compression.projection import Projection
from jaxinf.core.checks import checked_count
from jaxinf.core.examples import Examples
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.kinds import ExactGGN, Kind
from jaxinf.data.files import read_embeddings
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine import artifacts, processes
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.evaluation.replay import ReplayTraining
from jaxinf.runs.config import settings
from jaxinf.runs.perform import perform
from jaxinf.runs.run import (
  Run,
  content_of_stage,
  data_key,
  kind_of_config,
  load_curvature,
  load_model,
  own_settings,
)
from jaxinf.runs.sampling import load_samples
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

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
    """What of the samples it needs: "examples", "trajectories" or "pictures"."""
    return measurement_named(self.measurement).of if self.measurement else self.kind.of

  @property
  def kind(self) -> Method:
    return method_named(self.method)

  def scores(self, run: Run, sums: pathlib.Path) -> Sweep:
    """The scores, at every damping; `sums` is where unfinished work is kept."""
    return answered(run, self, self.kind.make(ingredients(run, self)), sums)


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
    if row.measurement is not None:
      measurement_named(row.measurement).check_gradient(run.process)
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


def models_of(run: Run, row: Row) -> list[Run]:
  """The runs of all models whose scores a row has: of the first alone where it sees no model."""
  models = run.each_model()
  return models if row.kind.sees_model else models[:1]


def at_default(run: Run, row: Row) -> Scores:
  """The scores of a row at the damping recommended without a benchmark, or its only ones."""
  return at_damping(run, row, row.kind.default_damping)


def at_damping(run: Run, row: Row, damping: float | None) -> Scores:
  """The scores of a row at one of its dampings; its only ones where the method has none.

  Raises:
    ValueError: it was not scored at that damping.
  """
  run = run.of_model(run.model_number)
  sweep = scored(run, row)
  if row.kind.default_damping is None:
    return sweep[0]
  found = [scores for scores in sweep if scores.settings["damping"] == damping]
  if not found:
    dampings = ", ".join(f"{scores.settings['damping']:g}" for scores in sweep)
    raise ValueError(f"{row.name} is scored at the dampings {dampings}; got {damping}.")
  return found[0]


def is_scored(run: Run, row: Row) -> bool:
  """Whether the scores of a row, by all models, are there.

  Raises:
    StaleArtifact: some were made otherwise.
  """
  there = [artifacts.finished(_folder(m, row), score_key(m, row)) for m in models_of(run, row)]
  return all(there)


def has_scores(run: Run, row: Row) -> bool:
  """Likewise, without an error where they were made otherwise."""
  return all(artifacts.holds(_folder(m, row), score_key(m, row)) for m in models_of(run, row))


def scored(run: Run, row: Row) -> Sweep:
  """Scores of one row at every damping (or one), computed where they are not there yet.

  They are of one model, the first unless the run is `Run.of_model`.

  Raises:
    ValueError: there are several processes, or the method lacks something.
  """
  if processes.count() > 1:
    raise ValueError("Scores for a proof take one process: start it alone.")
  run = run.of_model(run.model_number)
  folder = _folder(run, row)

  def compute() -> Outcome:
    found = row.scores(run, folder / "sums")
    arrays = {
      "values": np.stack([scores.values for scores in found]),
      "query_ids": found[0].query_ids,
      "train_ids": found[0].train_ids,
    }
    notes = {"settings": [dict(scores.settings) for scores in found]}
    return arrays, notes, f"scores at {len(found)} dampings"

  if row.kind.curved and not is_scored(run, row):  # before, so that the cost is of scores alone
    fitted(run, row.kind.other_kind)
  artifact = artifacts.cached(folder, score_key(run, row), compute, label=_label(run, row))
  return sweep_of(artifact)


def sweep_of(artifact: artifacts.Artifact) -> Sweep:
  """The scores of a row from its artefact."""
  ids = artifact.arrays["query_ids"], artifact.arrays["train_ids"]
  pairs = zip(artifact.arrays["values"], artifact.notes["settings"], strict=True)
  return Sweep(Scores(values[None], *ids, settings) for values, settings in pairs)


def _label(run: Run, row: Row) -> str:
  return f"score: {row.name}" + (f", model {run.model_number}" if run.model_number else "")


def cost_of(run: Run, row: Row) -> dict[str, Any]:
  """What the scores of a row took at all dampings, with the fit of the curvature they take.

  Returns:
    seconds, core_seconds of all threads (None where they were not kept), and the devices.
  """
  places = [_folder(run, row)]
  if row.kind.curved:
    places.append(fitted(run, row.kind.other_kind).folder("curvature"))
  manifests = [artifacts.read_manifest(place) for place in places]
  costs = [manifest["cost"] for manifest in manifests]
  kept = all("core_seconds" in cost for cost in costs)
  return {
    "seconds": sum(cost["seconds"] for cost in costs),
    "core_seconds": sum(cost["core_seconds"] for cost in costs) if kept else None,
    "devices": sorted({device for manifest in manifests for device in manifest["devices"]}),
  }


def _folder(run: Run, row: Row) -> pathlib.Path:
  return run.folder("score") / artifacts.file_name(row.name)


def score_key(run: Run, row: Row) -> dict[str, Any]:
  """What the scores of a row depend on."""
  key = settings(run.config.score, only=row.kind.reads) | {
    "seed": run.seed,
    "method": row.method,
    "measurement": None if row.measurement is None else measurement_named(row.measurement).name,
    "dampings": row.kind.dampings(run.config.score.dampings),
    "data": data_key(run),
    "train_content": content_of_stage(run, "train"),
    "sample_content": content_of_stage(run, "sample"),
  }
  if "clip" in row.kind.reads and run.config.score.clip is not None:
    path = pathlib.Path(run.config.score.clip).expanduser()
    key["clip_content"] = artifacts.fingerprint_of_files(path)
  if "journey_steps" in row.kind.reads and not run.clips:
    key["clip_predictions"] = False
  if row.kind.curved:
    key["curvature"] = own_settings(run, "curvature")
  return key


def samples_of(run: Run, row: Row) -> Examples:
  """The samples as a row takes them: images, or the trajectories on which they were made."""
  try:
    return load_samples(run, row.of)
  except ValueError as error:
    raise ValueError(f"{row.name}: {error}") from error


def answered(run: Run, row: Row, method: Attribution, sums: pathlib.Path) -> Sweep:
  """A method's scores of the samples.

  A method that takes a curvature answers the samples in score.passes parts, each with a pass of its
  own over the training examples. A replay takes as many parts, one after another at every segment.
  """
  config, queries = run.config.score, samples_of(run, row)
  power = row.kind.power(config.loss_power)
  draws = run.draws(config.draws, config.replicates, config.design, power)
  passes = checked_count(config.passes, "score.passes")
  chunk = math.ceil(len(queries) / passes) if row.kind.replays else None
  compute = run.compute(config.batch_size, checkpoint=Checkpointing(sums), query_chunk=chunk)
  passes = passes if row.kind.curved else 1
  parts = np.array_split(np.arange(len(queries)), min(passes, len(queries)))
  found = [
    method.scores(
      queries=queries.take(rows) if len(parts) > 1 else queries,
      train=run.dataset.examples if row.of == "pictures" else run.train,
      draws=draws,
      compute=compute.within(f"part-{number:03d}") if len(parts) > 1 else compute,
    )
    for number, rows in enumerate(parts)
  ]
  return Sweep.of_parts(found)


def ingredients(run: Run, row: Row) -> Ingredients:
  """What the method of a row is made of."""
  config, model = run.config.score, load_model(run)
  return Ingredients(
    model=model,
    curvature=lambda kind: _curvature(run, model, kind),
    dampings=row.kind.dampings(config.dampings),
    measurement=row.measurement or "loss",
    query_draws=run.draws(config.query_draws, config.query_replicates, config.design),
    compression=config.compression,
    projection=Projection(config.projection_dim, run.seed, config.projection),
    journey_steps=config.journey_steps,
    clip=run.clips,
    learning_rate=run.config.train.learning_rate,
    unlearning_steps=config.unlearning_steps,
    embed=lambda examples: _embeddings(run, examples),
    training=lambda: ReplayTraining(
      run.model, run.process, run.config.train, run.seed, model.params
    ),
  )


def _embeddings(run: Run, examples: Examples) -> np.ndarray:
  """CLIP's of examples, read or computed."""
  if run.config.score.clip is None:
    raise ValueError(_NO_CLIP)
  path = pathlib.Path(run.config.score.clip).expanduser()
  if path.suffix == ".npz":
    return read_embeddings(path, examples.ids)
  return clip_embeddings(examples.data, path)


def _curvature(run: Run, model: DiffusionModel, kind: Kind | None) -> Curvature:
  """The curvature of a method, read or fitted."""
  return load_curvature(fitted(run, kind), model)


def fitted(run: Run, kind: Kind | None) -> Run:
  """The run whose stage `curvature` is done: its own kind, or another in a folder of its own."""
  own = run.config.curvature
  solver = own.solver
  if isinstance(kind, ExactGGN):  # whose solver is the config's, but for the method
    solver = dataclasses.replace(solver, method=kind.solver.method)
    kind = ExactGGN(solver)
  if kind is not None and kind != kind_of_config(own):
    section = dataclasses.replace(
      own,
      kind=kind.name,
      approx=kind.approx,
      fisher=kind.fisher,
      samples=kind.samples,
      solver=solver,
    )
    stochastic = ("stochastic",) * (isinstance(kind, ExactGGN) and solver.method == "stochastic")
    name = "-".join(("curvature", section.kind, section.approx, section.fisher, *stochastic))
    run = run.with_curvature(section, name)
  perform(run, "curvature")
  return run
