"""Truths: what retraining made of a model's samples, kept to judge anyone's scores by.

A truth holds the attributed model, its samples, M random subsets of the training examples with the
measurements of models that were retrained on them, and what our own methods predicted. The training
images are not in it: `Truth.dataset` loads them, and compares them with those that models saw.

The package has some by name, as `truths` lists them; the stage `truth` makes one of any proof.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from jaxinf import data
from jaxinf.core.examples import Examples
from jaxinf.core.registry import named
from jaxinf.core.types import Params
from jaxinf.data.dataset import DataConfig, Dataset
from jaxinf.data.subsets import Subsets
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.process import Process
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Artifact
from jaxinf.evaluation.lds import LDS, Retrained, lds, lds_of_predictions, p_text, percent_range
from jaxinf.networks import apply_fn_of, build, num_params
from jaxinf.scores.scores import Scores

_COMMITTED = Path(__file__).parents[1] / "truths"  # a folder each, as the stage `truth` leaves it
# Arrays by name: what is before the slash, and which measurement, method or parameter.
VALUES, PREDICTED, PARAMS, GIVEN = "values/", "predicted/", "params/", "conditioning/"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """One of our methods, at one damping, on a truth.

  Attributes:
    name: of the method, and of the measurement whose gradient it takes.
    damping: λ; None where the method has none.
    best_for: measurements for which this damping was picked on the very numbers that are reported.
    default: whether the damping is that recommended without a benchmark.
    predicted: [M, Q] float32, changes of the samples' measurements by subset.
    lds: measurement → mean, std_error, interval and interval_both of the LDS, and p_value of its
      difference from the truth's `standard`.
    cost: seconds, core_seconds (of all threads) and the devices they are of, of scores at all
      dampings and a fit of the curvature; numbers are None where they were not kept.
  """

  name: str
  damping: float | None
  best_for: tuple[str, ...]
  default: bool
  predicted: np.ndarray
  lds: Mapping[str, Mapping[str, Any]]
  cost: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Truth:
  """What retraining says of a model's samples; see `load_truth`.

  Attributes:
    name: of the truth.
    subsets: M subsets of the N training examples, with their ids.
    retrained: measurement → measurements [M, K, Q] of the samples by the retrained models.
    samples: the Q samples of the attributed model, to be explained.
    params: of the attributed model, which is trained on all N examples.
    references: our own methods; the first is the `standard`.
    notes: `settings` of the run by section, `process`, `num_classes`, `data_content` (a hash of the
      training images), and `limits`: measurement → exact retraining and the noise ceiling.
  """

  name: str
  subsets: Subsets
  retrained: Mapping[str, Retrained]
  samples: Examples
  params: Params
  references: tuple[Reference, ...]
  notes: Mapping[str, Any]

  @property
  def settings(self) -> Mapping[str, Any]:
    """How images, model and measurements came about: sections of a config, as plain dicts."""
    return self.notes["settings"]

  @property
  def standard(self) -> Reference:
    """The method of ours that paired tests are against: influence at its default damping."""
    return self.references[0]

  @functools.cached_property
  def model(self) -> DiffusionModel:
    """The attributed model, as `fit_curvature` and the methods take it."""
    section, process = self.settings["model"], Process.from_settings(self.notes["process"])
    channels = self.samples.data.shape[-1]
    network = build(section["name"], dict(section["fields"]), channels, self.notes["num_classes"])
    return DiffusionModel(apply_fn_of(network, process), self.params, process)

  def dataset(self, **places: str) -> Dataset:
    """The training images, from where they are.

    Args:
      places: data_dir, path or captions, as of a config's section `data`, where that is not the
        data set's default.

    Raises:
      ValueError: they are not there, or are not those that the models were trained on.
    """
    fields: dict[str, Any] = {**self.settings["data"], **places}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    found = data.load(DataConfig(**(fields | lists)))
    if found.fingerprint() != self.notes["data_content"]:
      raise ValueError(
        f"These are not the training images of {self.name}: their hash is {found.fingerprint()}, "
        f"and the models saw {self.notes['data_content']}. Read the files that it was made of."
      )
    return found

  def lds(self, reference: Reference, measurement: str) -> LDS:
    """The LDS of one of the references, to compare others with by `LDS.against`."""
    settings = {"method": reference.name, "damping": reference.damping}
    return lds_of_predictions(reference.predicted, self._retrained(measurement), settings=settings)

  def evaluate(
    self, scores: Scores | Sequence[Scores], measurement: str | None = None, *, name: str = "yours"
  ) -> "Evaluation":
    """What retraining makes of scores.

    Args:
      scores: of all samples for all training examples, ids in any order; or several, such as a
        sweep over damping.
      measurement: one of `retrained`; None: the first.
      name: of the method that gave them, in the table.

    Raises:
      ValueError: an unknown measurement, ids that are missing or others, or scores not finite.
    """
    retrained = self._retrained(measurement or next(iter(self.retrained)))
    several = [scores] if isinstance(scores, Scores) else list(scores)
    found = tuple(lds(one, self.subsets, retrained) for one in several)
    return Evaluation(self, name, found, self.lds(self.standard, retrained.measurement))

  def summary(self) -> str:
    """What it is of, in two lines."""
    values = next(iter(self.retrained.values())).values
    num_trained = max(int(one.trained.sum()) for one in self.retrained.values())
    section, train = self.settings["data"], self.settings["train"]
    shape = " × ".join(map(str, self.samples.data.shape[1:]))
    return (
      f"{self.name}: {num_trained} models of {values.shape[0]} subsets of the "
      f"{self.subsets.membership.shape[1]:,} training images {section['name']} ({shape}), measured "
      f"on {values.shape[2]} samples by {', '.join(self.retrained)}.\n"
      f"The attributed model is a network {self.settings['model']['name']} of "
      f"{num_params(self.params):,} parameters after {train['steps']:,} steps; models of subsets "
      f"have {self.settings['retrain']['steps']:,}."
    )

  def leaderboard(self, measurement: str | None = None) -> str:
    """Our methods, best first, as a Markdown table: LDS, intervals, p and cost."""
    return self._table(self._retrained(measurement or next(iter(self.retrained))), [])

  def __repr__(self) -> str:
    return f"Truth({self.summary()})"

  def _retrained(self, measurement: str) -> Retrained:
    return named(self.retrained, measurement, f"measurement of {self.name}")

  def _table(self, retrained: Retrained, rows: list[tuple[float, list[str]]]) -> str:
    """The table of `leaderboard` with more rows, each the LDS it is sorted by and its cells."""
    measurement = retrained.measurement
    for one in self.references:
      if one.default or measurement in one.best_for:
        summary = one.lds[measurement]
        marks = ["best here"] * (measurement in one.best_for and not one.default)
        rows = [*rows, (summary["mean"], _cells(one.name, one.damping, summary, one.cost, marks))]
    limits, last = self.notes["limits"][measurement], []
    if limits["oracle"]:
      last.append(_cells("one model trained again", None, limits["oracle"], {}, []))
    if ceiling := limits["ceiling"]:
      interval = percent_range(ceiling["interval"])
      last.append(["ceiling of perfect scores", "", f"{100 * ceiling['ceiling']:.1f}", interval])
    standard = self.standard.name
    if self.standard.damping is not None:
      standard += f" at λ = {self.standard.damping:.0e}"
    best_first = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    return (
      f"LDS (%) on {self.name} for the measurement {measurement}; p against {standard}.\n\n"
      + _markdown([_HEAD, *best_first, *last])
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
  """What a truth says of someone's scores.

  Attributes:
    truth: what they were judged by.
    name: of the method.
    ldses: its LDS, one of each of the scores that were given.
    standard: the LDS of our own method, on the same subsets, samples and resamples.
  """

  truth: Truth
  name: str
  ldses: tuple[LDS, ...]
  standard: LDS

  def table(self) -> str:
    """The leaderboard with a row in bold for each of the scores, and p of its paired test."""
    rows = []
    for found in self.ldses:
      summary = summary_of(found, self.standard)
      damping = found.settings.get("damping")
      rows.append((found.mean, _cells(f"**{self.name}**", damping, summary, {}, [])))
    retrained = self.truth.retrained[self.standard.measurement]
    return self.truth._table(retrained, rows)

  def __repr__(self) -> str:
    return f"Evaluation({self.name}: {'; '.join(found.summary() for found in self.ldses)})"


def truths() -> tuple[str, ...]:
  """Names of the truths that the package has, for `load_truth`."""
  return tuple(sorted(path.parent.name for path in _COMMITTED.glob("*/manifest.json")))


def load_truth(name: str | Path) -> Truth:
  """A truth of the package by its name, or of anyone's proof by the folder its stage `truth` left.

  Raises:
    ValueError: there is none of that name and no such folder, or its files are damaged.
  """
  if isinstance(name, Path) or (name not in truths() and Path(name).is_dir()):
    folder = Path(name).absolute()
    return _truth(folder.parent.name if folder.name == "truth" else folder.name, folder)
  return _truth(name, _COMMITTED / named({known: known for known in truths()}, name, "truth"))


def summary_of(found: LDS, against: LDS | None = None) -> dict[str, Any]:
  """An LDS in numbers, and the p-value of its difference from another."""
  return {
    "mean": found.mean,
    "std_error": found.std_error,
    "interval": found.interval,
    "interval_both": found.interval_both,
    "p_value": None if against is None else found.against(against).p_value,
  }


def _truth(name: str, folder: Path) -> Truth:
  """The truth in a folder."""
  artifact = artifacts.read(folder)
  arrays, notes = artifact.arrays, artifact.notes
  train_ids, query_ids = arrays["train_ids"], arrays["query_ids"]
  membership = np.unpackbits(arrays["membership"], axis=1, count=len(train_ids)).astype(bool)
  return Truth(
    name=name,
    subsets=Subsets(membership, train_ids),
    retrained={m: Retrained(v, query_ids, m) for m, v in _below(artifact, VALUES).items()},
    samples=Examples(arrays["samples"], query_ids, _below(artifact, GIVEN) or None),
    params=flax.traverse_util.unflatten_dict(_below(artifact, PARAMS), sep="/"),
    references=tuple(
      Reference(**{**one, "best_for": tuple(one["best_for"])}, predicted=predicted)
      for one, predicted in zip(
        notes["references"], _below(artifact, PREDICTED).values(), strict=True
      )
    ),
    notes=notes,
  )


def _below(artifact: Artifact, prefix: str) -> dict[str, np.ndarray]:
  """The arrays whose names begin so, by the rest of their names, in the order they were written."""
  arrays = artifact.arrays
  return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


_HEAD = ["method", "λ", "LDS", "over subsets", "and samples", "p", "cost"]


def _cells(
  name: str,
  damping: float | None,
  summary: Mapping[str, Any],
  cost: Mapping[str, Any],
  marks: Sequence[str],
) -> list[str]:
  """A row of the table."""
  return [
    name,
    " ".join([*([] if damping is None else [f"{damping:.0e}"]), *(f"({mark})" for mark in marks)]),
    f"{100 * summary['mean']:.1f} ± {100 * summary['std_error']:.1f}",
    percent_range(summary["interval"]),
    percent_range(summary["interval_both"]),
    p_text(summary["p_value"]),
    _cost(cost),
  ]


def _cost(cost: Mapping[str, Any]) -> str:
  """Seconds of a processor's core where there was no other device, and of the clock otherwise."""
  if set(cost.get("devices", ())) == {"cpu"} and cost["core_seconds"] is not None:
    return f"{cost['core_seconds']:.0f} core s"
  seconds = cost.get("seconds")
  return "–" if seconds is None else f"{seconds:.0f} s"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table whose columns also stand below each other in plain text."""
  rows = [[*row, *[""] * (len(_HEAD) - len(row))] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [" | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
  rule = " | ".join("-" * width for width in widths)
  return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))
