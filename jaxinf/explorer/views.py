"""Each view of the explorer as plain values, which become JSON: numbers, strings, lists, dicts.

Numbers that are not known (an error of one replicate of draws) are None. An `entry` is an image:
its position in the training set (None where it is not there), id, label and caption.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinf.explorer.findings import Findings, NotFound, Source
from jaxinf.explorer.uploads import Upload
from jaxinf.report.pictures import how_shown, picture_of
from jaxinf.scores.scores import NEGATIVE_WEIGHT, Scores
from jaxinf.scores.statistics import spearman

MOST_SHOWN = 500  # images in one answer
_CURVE = 121  # points of all sorted scores

View = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Filter:
  """Which training images are asked for: of a label, where not None, with a text in their id."""

  label: int | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which scores are asked for: of a source, the first where None, at a place of its dampings."""

  source: str | None = None
  damping: int | None = None


def run_view(findings: Findings) -> View:
  """What there is: names, numbers, sources of scores."""
  dataset, samples, scorer = findings.dataset, findings.samples, findings.scorer
  example = np.asarray(dataset.images[0])
  return {
    "name": dataset.name,
    "version": findings.version,
    "numTrain": len(dataset),
    "numSamples": 0 if samples is None else len(samples.ids),
    "hasPictures": picture_of(example) is not None,
    "sharp": example.ndim == 3 and max(example.shape[:2]) < 128,
    "howShown": how_shown(example),
    "labels": findings.label_names,
    "sources": [_source(source) for source in findings.sources.values()],
    "negativeWeight": NEGATIVE_WEIGHT,
    "selfInfluence": findings.self_influence is not None,
    "store": None
    if scorer is None
    else {"needsLabel": scorer.needs_label, "damping": scorer.damping},
  }


def samples_view(findings: Findings, start: int, count: int) -> View:
  """A part of the samples, in their order."""
  num = 0 if findings.samples is None else len(findings.samples.ids)
  rows = range(*slice(start, start + count).indices(num))
  return {"total": num, "rows": [sample_entry(findings, q) for q in rows]}


def training_view(findings: Findings, only: Filter, start: int, count: int) -> View:
  """A part of the training images that match, in the order of the data set."""
  found = np.flatnonzero(findings.matching(only.label, only.text))
  return {
    "total": len(found),
    "rows": [entry(findings, int(n)) for n in found[start : start + count]],
  }


def sample_view(findings: Findings, identity: str, choice: Choice, k: int, only: Filter) -> View:
  """The supporters and opposers of a sample, best first."""
  scores = of_sample(findings, identity, choice)
  q = findings.sample_position(identity)
  view = {"sample": sample_entry(findings, q), "scores": about(findings, choice)}
  return view | ranked(findings, scores, k, only)


def upload_view(findings: Findings, upload: Upload, k: int, only: Filter) -> View:
  """How far an upload is, and its supporters and opposers once they are there."""
  view = {
    name: getattr(upload, name) for name in ("state", "step", "done", "total", "seconds")
  } | dataclasses.asdict(upload.asked)
  if upload.scores is None:
    return view
  settings = {k: upload.scores.settings.get(k) for k in ("measurement", "damping")}
  return view | {"scores": settings} | ranked(findings, upload.scores, k, only)


def ranked(findings: Findings, scores: Scores, k: int, only: Filter) -> View:
  """The k most supporting and most opposing of the images that match, of scores of one query."""
  values = scores.values[0]
  positions = positions_of(findings, scores.train_ids)
  # The last place stands for images of the store that are not in the data set, at position −1.
  matching = np.append(findings.matching(only.label, only.text), only == Filter())
  columns = np.flatnonzero(matching[positions])
  order = columns[np.argsort(-values[columns], kind="stable")]
  k = min(checked_shown(k), len(columns))
  best, worst = order[:k], columns[np.argsort(values[columns], kind="stable")][:k]
  places = np.linspace(0, max(0, len(order) - 1), min(_CURVE, len(order))).round().astype(int)
  return {
    "numMatching": len(order),
    "supporting": scored_entries(findings, scores, best, positions),
    "opposing": scored_entries(findings, scores, worst, positions),
    "curve": numbers(values[order[::-1]][places]),
  }


def scored_entries(
  findings: Findings, scores: Scores, columns: np.ndarray, positions: np.ndarray
) -> list[View]:
  """Entries, with score and errors, of the images in some columns of scores of one query."""
  part = columns_of(scores, columns)
  arrays = (part.values[0], part.std_errors[0], part.model_std_errors[0])
  return [
    entry(findings, int(positions[n]), str(scores.train_ids[n])) | _scored(*row)
    for n, *row in zip(columns, *arrays, strict=True)
  ]


def image_view(findings: Findings, identity: str, choice: Choice) -> View:
  """A training image, and the samples that it supports: all of them, best first.

  `change` is the predicted change of the sample's measurement were this image removed.
  """
  n = findings.position(identity)
  view: View = {"image": entry(findings, n)}
  if findings.self_influence is not None:
    view["selfInfluence"] = _own(findings, _own_place(findings, n))
  if not findings.sources:
    return view | {"samples": []}
  scores = findings.scores(choice.source, choice.damping)
  part = columns_of(scores, np.array([n]))
  changes = part.predicted_change([part.train_ids[0]]).changes
  arrays = part.values[:, 0], part.std_errors[:, 0], part.model_std_errors[:, 0]
  rows = [
    sample_entry(findings, q) | _scored(*row) | {"change": number(changes[q])}
    for q, row in enumerate(zip(*arrays, strict=True))
  ]
  order = np.argsort(-part.values[:, 0], kind="stable")
  return view | {"scores": about(findings, choice), "samples": [rows[q] for q in order]}


def what_if_view(
  findings: Findings, ids: Sequence[str], labels: Sequence[int], choice: Choice
) -> View:
  """The predicted change of every sample were these images, and all of these labels, removed.

  Raises:
    ValueError: nothing is removed, or everything.
  """
  columns = removed_columns(findings, ids, labels)
  num = len(findings.dataset)
  if not 0 < len(columns) < num:
    raise ValueError(f"Remove 1…{num - 1} of the {num} training images; got {len(columns)}.")
  scores = findings.scores(choice.source, choice.damping)
  part = columns_of(scores, columns)
  found = part.predicted_change(part.train_ids)
  arrays = found.changes, found.std_errors, found.model_std_errors
  changes = [
    sample_entry(findings, q)
    | {"change": number(change), "error": number(error), "modelError": number(between)}
    for q, (change, error, between) in enumerate(zip(*arrays, strict=True))
  ]
  return {
    "num": len(columns),
    "numTrain": num,
    "negativeWeight": NEGATIVE_WEIGHT,
    "scores": about(findings, choice),
    "changes": changes,
  }


def removed_columns(findings: Findings, ids: Sequence[str], labels: Sequence[int]) -> np.ndarray:
  """Ascending positions of these training images and of all of these labels, each once."""
  chosen = np.zeros(len(findings.dataset), bool)
  chosen[[findings.position(identity) for identity in ids]] = True
  for label in labels:
    chosen |= findings.matching(label, "")
  return np.flatnonzero(chosen)


def compare_view(findings: Findings, identity: str, first: Choice, second: Choice, k: int) -> View:
  """How far two scores of a sample agree: rank correlation, and what their tops share."""
  one, two = (of_sample(findings, identity, choice).values[0] for choice in (first, second))
  k = min(checked_shown(k), len(one))
  tops = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (one, two)]
  return {"spearman": number(spearman(one, two)), "k": k, "shared": len(tops[0] & tops[1])}


def own_view(findings: Findings, largest: bool, start: int, count: int) -> View:
  """A part of the images in the order of their self-influence, the largest or the least first."""
  found = findings.self_influence
  if found is None:
    raise NotFound("There is no self-influence yet: run the stage self-influence.")
  order = np.argsort(-found.values if largest else found.values, kind="stable")
  return {
    "total": len(order),
    "damping": number(found.settings["damping"]),
    "biased": bool(found.settings.get("biased", False)),
    "rows": [_own(findings, int(place)) for place in order[start : start + count]],
  }


def entry(findings: Findings, n: int, identity: str | None = None) -> View:
  """A training image at a position; −1: one that is not in the data set."""
  if n < 0:
    return {"position": None, "id": identity, "label": None, "caption": None}
  dataset = findings.dataset
  label = None if dataset.labels is None else findings.label_names[int(dataset.labels[n])]
  caption = None if dataset.captions is None else str(dataset.captions[n])
  return {"position": n, "id": str(dataset.ids[n]), "label": label, "caption": caption}


def sample_entry(findings: Findings, q: int) -> View:
  """A sample, and in words what it was made from."""
  samples = findings.samples
  assert samples is not None
  label = None if samples.words is None else samples.words[q]
  return {"position": q, "id": str(samples.ids[q]), "label": label, "caption": None}


def about(findings: Findings, choice: Choice) -> View:
  """What scores are: of which source and damping, measured how, with which errors."""
  source = findings.source(choice.source)
  scores = findings.scores(choice.source, choice.damping)
  place = source.default if choice.damping is None else choice.damping
  models = scores.model_values
  return {
    "source": source.name,
    "title": source.title,
    "place": place if source.dampings else None,
    "damping": source.dampings[place] if source.dampings else None,
    "symbol": source.symbol,
    "measurement": str(scores.settings.get("measurement") or "").replace("_", " ") or None,
    "draws": scores.settings.get("draws"),
    "replicates": len(scores.replicate_values),
    "models": 1 if models is None else len(models),
  }


def of_sample(findings: Findings, identity: str, choice: Choice) -> Scores:
  """Scores [1, N] of one sample."""
  q = findings.sample_position(identity)
  scores = findings.scores(choice.source, choice.damping)
  return scores.with_values(lambda x: x[:, q : q + 1], query_ids=scores.query_ids[q : q + 1])


def columns_of(scores: Scores, columns: np.ndarray) -> Scores:
  """Scores of some training images, of which N still counts all."""
  groups = scores.train_groups
  num = len(scores.train_ids) if scores.num_examples is None else scores.num_examples
  return scores.with_values(
    lambda values: values[..., columns],
    train_ids=scores.train_ids[columns],
    train_groups=None if groups is None else groups[columns],
    num_examples=num,
  )


def positions_of(findings: Findings, ids: np.ndarray) -> np.ndarray:
  """Where images with these ids stand in the data set; −1 of those that are not there."""
  if len(ids) == len(findings.dataset) and np.array_equal(ids, findings.dataset.ids):
    return np.arange(len(ids))
  return np.array([findings.positions.get(str(identity), -1) for identity in ids.tolist()], int)


def checked_shown(k: int) -> int:
  """k where it lies in 1 … MOST_SHOWN; ValueError otherwise."""
  if not 1 <= k <= MOST_SHOWN:
    raise ValueError(f"k and count must lie in 1…{MOST_SHOWN}; got {k}.")
  return k


def number(value: Any) -> float | None:
  """As JSON has it: None where it is not finite."""
  value = float(value)
  return value if math.isfinite(value) else None


def numbers(values: np.ndarray) -> list[float | None]:
  """Likewise, of each."""
  return [number(value) for value in values]


def _scored(score: float, error: float, between: float) -> View:
  return {"score": number(score), "error": number(error), "modelError": number(between)}


def _source(source: Source) -> View:
  names = ("name", "title", "dampings", "symbol", "default")
  return {name: getattr(source, name) for name in names}


def _own(findings: Findings, place: int) -> View:
  """The entry of one self-influence, by its place among them."""
  found = findings.self_influence
  assert found is not None
  identity = str(found.ids[place])
  shown = entry(findings, findings.positions.get(identity, -1), identity)
  return shown | {"value": number(found.values[place]), "error": number(found.std_errors[place])}


def _own_place(findings: Findings, n: int) -> int:
  """Where among the self-influences that of a training image stands; the same but for subsets."""
  found = findings.self_influence
  assert found is not None
  ids = found.ids.tolist()
  identity = findings.dataset.ids[n].item()
  return n if n < len(ids) and ids[n] == identity else ids.index(identity)
