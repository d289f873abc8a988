"""What the studies of a proof share: their numbers, true measurements, predictions and LDS."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.benchmark.measuring import measure_models, measured_everywhere, retrained
from jaxinf.benchmark.retraining import subset_specs, subsets_of
from jaxinf.data.subsets import Subsets
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine import artifacts
from jaxinf.evaluation.lds import Retrained, predictions
from jaxinf.runs.run import Run
from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import mean_and_error, spearman


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What a study finds.

  Attributes:
    title: what they show.
    caption: how to read them, and what was found.
    shown: the same as the study's figure takes them, by argument.
    arrays: the same by name, to be kept.
    header, rows: of a table of the same; empty for none.
    made: what it was made of: models, samples, draws.
    inputs: what it depends on besides the section `study` of the config.
    notes: anything more to keep.
  """

  title: str
  caption: str
  shown: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray]
  header: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  made: str = ""
  inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
  """True measurements of several names by models of the same M subsets.

  Attributes:
    subsets: all of the run.
    kept: [M] numbers of those whose models hold all the measurements.
    query_ids: [Q].
    retrained: name → measurements of all subsets.
    means: name → [M, Q] means over seeds.
    outside_weight: w of the images outside a subset in its models' loss; 0: they are left out.
  """

  subsets: Subsets
  kept: np.ndarray
  query_ids: np.ndarray
  retrained: Mapping[str, Retrained]
  means: Mapping[str, np.ndarray]
  outside_weight: float = 0.0

  def predicted(self, scores: Scores) -> np.ndarray:
    """[M, Q] changes that scores of the same samples predict: (1 − w) Σ_{n∉subset m} scores / N."""
    if not np.array_equal(scores.query_ids, self.query_ids):
      raise ValueError("The scores are of other samples than those measured, or in another order.")
    return (1 - self.outside_weight) * predictions(scores, self.subsets)[self.kept]

  def lds(self, scores: Scores, name: str) -> np.ndarray:
    """[Q] rank correlations of predicted and true changes; NaN where scores are not finite."""
    if not np.isfinite(scores.values).all():
      return np.full(len(self.query_ids), np.nan)
    return spearman(self.predicted(scores), self.means[name], axis=0)

  def sweep(self, sweep: Sequence[Scores], name: str) -> tuple[np.ndarray, np.ndarray]:
    """LDS ([L], their standard errors [L] over queries) of scores at L dampings."""
    return mean_and_error(np.array([self.lds(scores, name) for scores in sweep]))

  def inputs(self) -> dict[str, str]:
    """Hash of the measurements, for the key of what is made of them."""
    return {"measured_content": artifacts.fingerprint(self.means)}

  def made(self) -> str:
    """Models, what they were trained on, and samples in words."""
    trained = next(iter(self.retrained.values())).trained.sum()
    num, size = len(self.subsets.train_ids), self.subsets.membership[0].sum()
    which = f"{len(self.kept)} random subsets of {size:,}"
    seen = f"{which} of {num:,} training images"
    if self.outside_weight:
      seen = f"all {num:,} training images, with weight {self.outside_weight:g} outside {which}"
    return f"{trained} models retrained on {seen}; {len(self.query_ids)} samples."


def truth_of(run: Run, names: Sequence[str]) -> Truth:
  """The true measurements; those that lack are taken of the retrained models that are there.

  Raises:
    ValueError: models of fewer than two subsets are measured, or can be.
  """
  measure_models(run, subset_specs(run), names)
  if len(measured_everywhere(run, names)) == 0:
    weight = run.config.retrain.outside_weight
    option = f" --config.retrain.outside_weight={weight:g}" if weight else ""
    option += " --config.retrain.same_batches=True" if run.config.retrain.same_batches else ""
    raise ValueError(
      f"No retrained model was measured by all of {', '.join(names)}, and none is there to be "
      f"measured: run the stage retrain{option} first. (Models may be deleted once they are "
      "measured, but then nothing more can be measured of them.)"
    )
  found = {name: retrained(run, name) for name in names}
  kept = np.flatnonzero(np.all([truth.trained.any(axis=1) for truth in found.values()], axis=0))
  if len(kept) < 2:
    raise ValueError("Rank correlations need models of at least two subsets. Retrain more.")
  means = {name: truth.means()[kept] for name, truth in found.items()}
  query_ids = next(iter(found.values())).query_ids
  return Truth(subsets_of(run), kept, query_ids, found, means, run.config.retrain.outside_weight)


def image_measurements(run: Run) -> list[str]:
  """The config's true measurements that are of images, not of trajectories."""
  return [m for m in run.config.measure.measurements if measurement_named(m).of == "examples"]


def dampings_of(sweep: Sequence[Scores]) -> np.ndarray:
  """[L] the dampings of a sweep."""
  return np.array([scores.settings["damping"] for scores in sweep], float)


def timestep_of(measurement: str) -> int | None:
  """t of loss_at_timestep(t), counted from 0; None for other measurements."""
  call = re.fullmatch(r"loss_at_timestep\((\d+)\)", measurement)
  return None if call is None else int(call[1])


def plain_name(measurement: str) -> str:
  """A measurement in words: ℓ_{t+1} of loss_at_timestep(t), as the paper counts timesteps."""
  timestep = timestep_of(measurement)
  return measurement.replace("_", " ") if timestep is None else f"ℓ_{timestep + 1}"


def math_name(measurement: str) -> str:
  """The same with the timestep as a subscript, for figures."""
  timestep = timestep_of(measurement)
  return plain_name(measurement) if timestep is None else f"$\\ell_{{{timestep + 1}}}$"
