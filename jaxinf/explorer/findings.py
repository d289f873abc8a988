"""What there is to explore in a run: images, samples, scores by every method, self-influence.

Only consistency is asked for, not the settings of today's config: the scores must be of these
training images and these samples, whatever they were made with.
"""

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.attribution.methods import METHODS
from jaxinf.benchmark.scoring import sweep_of
from jaxinf.core.damping import damping_of, symbol_of
from jaxinf.data.dataset import Dataset
from jaxinf.engine import artifacts
from jaxinf.explorer.uploads import StoreScorer
from jaxinf.report.rows import label_name
from jaxinf.runs.reporting import made_from
from jaxinf.runs.run import Run, attribute_sweep_of
from jaxinf.runs.sampling import load_samples
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Scores
from jaxinf.scores.self_influence import SelfInfluence

ATTRIBUTE = "attribute"  # the name of the source that the stage of that name left
_KEPT = 2  # sources in memory: as many as are compared; one of 50,000 images may take gigabytes
_LOG = logging.getLogger("jaxinf")


class NotFound(ValueError):
  """What was asked for by name is not there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Scores of all samples by one method, read when they are asked for.

  Attributes:
    name: "attribute", or "score/NAME" of the benchmark.
    title: what people call it.
    dampings: of its scores, in order; empty where the method has none.
    symbol: λ, or ρ where they are relative.
    default: the place in `dampings` of the one that is shown first.
    read: the scores at each damping, or the only ones.
  """

  name: str
  title: str
  dampings: tuple[float, ...]
  symbol: str
  default: int
  read: Callable[[], Sequence[Scores]]


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """The samples that are explained: ids [Q], pictures [Q, …], and words for each, if any."""

  ids: np.ndarray
  data: Any
  words: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
  """All that can be looked at.

  Attributes:
    dataset: the N training images.
    version: changes where pictures or scores do; part of the addresses of pictures.
    samples: None where there are none yet.
    sources: scores by name, the first shown first.
    self_influence: None where it was not computed.
    scorer: what scores new images; None where there is no store.
  """

  dataset: Dataset
  version: str
  samples: Samples | None = None
  sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
  self_influence: SelfInfluence | None = None
  scorer: StoreScorer | None = None
  _read: collections.OrderedDict = dataclasses.field(default_factory=collections.OrderedDict)
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def source(self, name: str | None) -> Source:
    """The source of a name, the first where None; NotFound names those that there are."""
    if not self.sources:
      raise NotFound("This run has no scores yet: run the stage attribute, then start again.")
    found = self.sources.get(next(iter(self.sources)) if name is None else name)
    if found is None:
      raise NotFound(f"There are no scores {name!r}; there are: {', '.join(self.sources)}.")
    return found

  def scores(self, name: str | None = None, place: int | None = None) -> Scores:
    """The scores of a source at the damping in that place; NotFound where there is none."""
    source = self.source(name)
    with self._lock:  # two requests for the same must not read it twice
      if source.name not in self._read:
        while len(self._read) >= _KEPT:
          self._read.popitem(last=False)
        self._read[source.name] = tuple(self._checked(source, x) for x in source.read())
      self._read.move_to_end(source.name)
      every = self._read[source.name]
    place = source.default if place is None else place
    if not 0 <= place < len(every):
      raise NotFound(f"{source.title} has {len(every)} dampings; got the number {place}, from 0.")
    return every[place]

  @functools.cached_property
  def positions(self) -> Mapping[str, int]:
    """Of the training images, by id."""
    return {identity: n for n, identity in enumerate(self.dataset.ids.tolist())}

  def position(self, identity: str) -> int:
    """Of one training image; NotFound where it is none's."""
    if identity not in self.positions:
      raise NotFound(f"No training image has the id {identity!r}.")
    return self.positions[identity]

  @functools.cached_property
  def sample_positions(self) -> Mapping[str, int]:
    """Of the samples, by id."""
    ids = [] if self.samples is None else self.samples.ids.tolist()
    return {str(identity): q for q, identity in enumerate(ids)}

  def sample_position(self, identity: str) -> int:
    """Of one sample; NotFound where it is none's."""
    if identity not in self.sample_positions:
      raise NotFound(f"No sample has the id {identity!r}.")
    return self.sample_positions[identity]

  @functools.cached_property
  def label_names(self) -> list[str]:
    """Of the labels 0, 1, … in words; empty where images have none."""
    labels = self.dataset.labels
    if labels is None:
      return []
    return [label_name(self.dataset, label) for label in range(self._num_labels)]

  @property
  def _num_labels(self) -> int:
    labels = self.dataset.labels
    assert labels is not None
    return len(self.dataset.label_names) or int(labels.max()) + 1

  @functools.cached_property
  def _texts(self) -> list[str]:
    """What images are found by: id and caption, in small letters."""
    captions = self.dataset.captions
    ids = self.dataset.ids.tolist()
    pairs = ids if captions is None else [f"{i}\n{c}" for i, c in zip(ids, captions, strict=True)]
    return [text.lower() for text in pairs]

  def matching(self, label: int | None, text: str) -> np.ndarray:
    """[N] booleans: the training images of a label, any where None, with a text in id or caption.

    Raises:
      ValueError: the images have no such label.
    """
    found = np.ones(len(self.dataset), bool)
    if label is not None:
      if not 0 <= label < len(self.label_names):
        raise ValueError(f"label is a number in 0…{len(self.label_names) - 1}; got {label}.")
      found &= np.asarray(self.dataset.labels) == label
    if text:
      found &= np.array([text.lower() in each for each in self._texts])
    return found

  def _checked(self, source: Source, scores: Scores) -> Scores:
    ids = [] if self.samples is None else self.samples.ids.tolist()
    if scores.train_ids.tolist() != self.dataset.ids.tolist() or scores.query_ids.tolist() != ids:
      raise ValueError(
        f"The scores of {source.title} are of other images or samples than this run's: compute "
        "them again, or start with the config that they were made with."
      )
    return scores


def findings_of(run: Run) -> Findings:
  """What a run has found.

  Raises:
    ValueError: it has neither scores nor a store, or they are of other training images than those
      that the config names.
  """
  has = lambda name: artifacts.has_manifest(run.folder(name))
  samples = _samples(run) if has("sample") else None
  sources = _sources(run) if samples is not None else {}
  if not sources and not has("index"):
    raise ValueError(
      f"{run.workdir} has neither scores nor a store to explore: run the stage all, or index, "
      "first."
    )
  own = None
  if has("self-influence"):
    artifact = _of_these_images(run, run.folder("self-influence"))
    own = SelfInfluence(settings=artifact.notes["settings"], **artifact.arrays)
  if has("index"):
    _check_images(run, run.folder("index"))
  contents = [run.data_content]
  contents += [artifacts.read_manifest(run.folder("sample"))["content"]] * (samples is not None)
  return Findings(
    run.dataset,
    artifacts.fingerprint_of(contents)[:12],
    samples,
    sources,
    own,
    StoreScorer(run) if has("index") else None,
  )


def _samples(run: Run) -> Samples:
  found = load_samples(run, "pictures")
  return Samples(np.asarray(found.ids).astype(str), found.data, made_from(run, found))


def _sources(run: Run) -> dict[str, Source]:
  """Those of the stage attribute, then those of the benchmark, in the order of METHODS."""
  found = [_attribute(run)] if artifacts.has_manifest(run.folder("attribute")) else []
  folder = run.folder("score")
  names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  scored = [source for name in names if (source := _benchmarked(run, name)) is not None]
  found += sorted(scored, key=lambda source: _rank(source.title.partition(",")[0]))
  return {source.name: source for source in found}


def _rank(method: str) -> int:
  """Where a method stands in the table of methods, the best known first."""
  return [*METHODS, method].index(method)


def _attribute(run: Run) -> Source:
  manifest = artifacts.read_manifest(run.folder("attribute"))
  _check_images(run, run.folder("attribute"))
  _check_samples(run, run.folder("attribute"), manifest)
  settings = manifest["notes"]["settings"]
  sweep = [float(x) for x in manifest["key"]["attribute"].get("sweep", ())]

  def read() -> list[Scores]:
    each = [attribute_sweep_of(artifacts.read(m.folder("attribute"))) for m in run.each_model()]
    return [mean_scores(scores) for scores in zip(*each, strict=True)]

  measurement = str(settings["measurement"]).replace("_", " ")
  return Source(
    ATTRIBUTE,
    f"attribute ({measurement})",
    (float(settings["damping"]), *sweep),
    symbol_of(damping_of(settings)),
    0,
    read,
  )


def _benchmarked(run: Run, name: str) -> Source | None:
  """The scores of a method in score/; None where they are not finished, or no scores at all."""
  folders = [model.folder("score") / name for model in run.each_model()]
  if not artifacts.has_manifest(folders[0]):
    return None
  manifest = artifacts.read_manifest(folders[0])
  if "values" not in manifest["shapes"]:
    return None  # a curvature that a method has of its own
  try:
    _check_images(run, folders[0])
    _check_samples(run, folders[0], manifest)
  except ValueError as error:
    _LOG.warning("explore: left out: %s", error)
    return None
  if not all(map(artifacts.has_manifest, folders)):
    folders = folders[:1]  # methods that see no model have scores of the first alone

  def read() -> list[Scores]:
    return [
      mean_scores(x) for x in zip(*(sweep_of(artifacts.read(f)) for f in folders), strict=True)
    ]

  key, every = manifest["key"], manifest["notes"]["settings"]
  dampings = tuple(float(s["damping"]) for s in every if "damping" in s)
  method = METHODS.get(key["method"])
  default = None if method is None else method.default_damping
  title = ", ".join(str(x) for x in (key["method"], key["measurement"]) if x)
  return Source(
    f"score/{name}",
    title,
    dampings,
    symbol_of(damping_of(every[0])) if dampings else "",
    dampings.index(default) if default in dampings else 0,
    read,
  )


def _of_these_images(run: Run, folder: Path) -> artifacts.Artifact:
  _check_images(run, folder)
  return artifacts.read(folder)


def _check_images(run: Run, folder: Path) -> None:
  """Raises ValueError where a result is of other training images than the config's."""
  content = artifacts.read_manifest(folder)["key"].get("data", {}).get("content")
  if content != run.data_content:
    raise ValueError(
      f"{folder} was made of other training images than config.data names: start with the config "
      "of that run."
    )


def _check_samples(run: Run, folder: Path, manifest: Mapping[str, Any]) -> None:
  """Raises ValueError where scores are of other samples than those that are there."""
  if manifest["key"].get("sample_content") != _content(run, "sample"):
    raise ValueError(
      f"{folder} is of other samples than those in {run.folder('sample')}: delete it and compute "
      "it again."
    )


def _content(run: Run, stage: str) -> str:
  return artifacts.read_manifest(run.folder(stage))["content"]
