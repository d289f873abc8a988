"""What page and figure both show: for each query, its training examples in three groups.

Numbers of one report share a power of ten and a number of decimals, so that they compare at sight.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxinf.data.dataset import Dataset
from jaxinf.report.pictures import picture_of
from jaxinf.report.words import Unit
from jaxinf.scores.scores import Ranking, Scores

# Groups of training examples, in the order they are shown, and their titles.
TITLES = {
  "supporting": "Most supporting",
  "opposing": "Most opposing",
  "neutral": "Most neutral",
}


_SHOWN = ("positions", "values", "std_errors", "model_std_errors")  # of a ranking


@dataclasses.dataclass(frozen=True)
class Neighbour:
  """One training example beside a query.

  Attributes:
    picture: uint8 [H, W, C]; None: it has none. See `pictures.picture_of`.
    id: its id.
    label: name of its label, or None.
    score: its score for the query.
    std_error: of the score; NaN where unknown.
    model_std_error: of the score between models; NaN of one model.
  """

  picture: np.ndarray | None
  id: str
  label: str | None
  score: float
  std_error: float
  model_std_error: float = math.nan


@dataclasses.dataclass(frozen=True)
class Row:
  """One query and its top_k training examples of each group, best first.

  Attributes:
    picture: uint8 [H, W, C] of the sample; None: it has none.
    id: its id.
    groups: name of each of TITLES → training examples.
    values: [N] all scores, ascending.
    label: what it was made from, in words; None: from nothing else.
  """

  picture: np.ndarray | None
  id: str
  groups: dict[str, list[Neighbour]]
  values: np.ndarray
  label: str | None = None


def explained_rows(
  dataset: Dataset,
  *,
  samples: np.ndarray,
  scores: Scores,
  num_queries: int,
  top_k: int,
  labels: Sequence[str] | None = None,
) -> list[Row]:
  """Rows of the first `num_queries` samples, or of all where there are fewer.

  Args:
    dataset: the N training examples.
    samples: [Q, …], the queries.
    scores: of these samples and this data set, in their order.
    num_queries: 1 or more.
    top_k: training examples in each group; all N where it is more.
    labels: [Q] what each sample was made from, in words; None: from nothing else.

  Raises:
    ValueError: the scores belong to other samples or data, or a number is below 1.
  """
  _check(dataset, samples, scores, num_queries=num_queries, top_k=top_k)
  top_k = min(top_k, len(dataset))
  rankings = {
    "supporting": scores.top(top_k),
    "opposing": scores.bottom(top_k),
    "neutral": scores.neutral(top_k),
  }
  values = np.sort(scores.values, axis=1)
  return [
    Row(
      picture=picture_of(samples[q]),
      id=str(scores.query_ids[q]),
      groups={name: _neighbours(dataset, ranking, q) for name, ranking in rankings.items()},
      values=values[q],
      label=None if labels is None else labels[q],
    )
    for q in range(min(num_queries, len(samples)))
  ]


def common_unit(rows: list[Row]) -> Unit:
  """The unit in which the largest score shown has one to three digits before the point.

  The exponent is a multiple of three. Decimals show two digits of the typical standard error, or
  three of the largest score where there are no errors; at most three.
  """
  shown = [n for row in rows for name in ("supporting", "opposing") for n in row.groups[name]]
  largest = max(abs(neighbour.score) for neighbour in shown)
  if largest == 0:
    return Unit(exponent=0, decimals=0)
  exponent = 3 * math.floor(math.log10(largest) / 3)
  errors = [n.std_error for n in shown if n.std_error > 0]
  precision = np.median(errors) / 10 if errors else largest / 100
  decimals = -math.floor(math.log10(precision / 10.0**exponent))
  return Unit(exponent, int(np.clip(decimals, 0, 3)))


def _neighbours(dataset: Dataset, ranking: Ranking, query: int) -> list[Neighbour]:
  return [
    Neighbour(
      picture=picture_of(dataset.images[n]),
      id=str(dataset.ids[n]),
      label=_label(dataset, n),
      score=float(score),
      std_error=float(error),
      model_std_error=float(between),
    )
    for n, score, error, between in zip(
      *(getattr(ranking, name)[query] for name in _SHOWN), strict=True
    )
  ]


def _label(dataset: Dataset, position: int) -> str | None:
  words = [] if dataset.labels is None else [label_name(dataset, int(dataset.labels[position]))]
  words += [] if dataset.captions is None else [str(dataset.captions[position])]
  return ", ".join(words) or None


def label_name(dataset: Dataset, label: int) -> str:
  """A label in words."""
  name = dataset.label_names[label] if dataset.label_names else str(label)
  return f"label {name}" if name.isdigit() else name


def _check(
  dataset: Dataset, samples: np.ndarray, scores: Scores, *, num_queries: int, top_k: int
) -> None:
  if scores.train_ids.tolist() != dataset.ids.tolist():
    raise ValueError(
      f"The scores are of {len(scores.train_ids)} training images that are not those of data set "
      f"{dataset.name!r} ({len(dataset)} images): compute the scores again for this data set."
    )
  if len(samples) != len(scores.query_ids):
    raise ValueError(f"Got {len(samples)} samples and scores of {len(scores.query_ids)} samples.")
  if num_queries < 1:
    raise ValueError(f"report.num_queries must be at least 1; got {num_queries}.")
  if top_k < 1:
    raise ValueError(f"report.top_k must be at least 1; got {top_k}.")
  if not np.isfinite(scores.replicate_values).all():
    raise ValueError("The scores hold NaN or infinity: raise attribute.damping, then score again.")
