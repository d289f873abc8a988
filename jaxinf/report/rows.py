"""What page and figure both show: for each query, its training images in three groups.

Numbers of one report share a power of ten and a number of decimals, so that they compare at sight.
"""

import dataclasses
import math

import numpy as np

from jaxinf.data.dataset import Dataset
from jaxinf.scores.scores import Ranking, Scores


@dataclasses.dataclass(frozen=True)
class Neighbour:
  """One training image beside a query.

  Attributes:
    image: [H, W, C] as the data set holds it.
    id: its id.
    label: name of its label, or None.
    score: its score for the query.
    std_error: of the score; NaN where unknown.
  """

  image: np.ndarray
  id: str
  label: str | None
  score: float
  std_error: float


@dataclasses.dataclass(frozen=True)
class Row:
  """One query and its top_k training images of each kind, best first.

  Attributes:
    image: [H, W, C] float32 in [-1, 1], the sample.
    id: its id.
    groups: "supporting", "opposing" and "neutral" → training images.
    values: [N] all scores, ascending.
  """

  image: np.ndarray
  id: str
  groups: dict[str, list[Neighbour]]
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unit:
  """How scores are written: as multiples of 10^exponent, with `decimals` decimals."""

  exponent: int
  decimals: int

  def number(self, value: float, *, signed: bool = True) -> str:
    """The value with a typographic minus, and a plus where `signed`; nothing before a zero."""
    text = f"{value / 10.0**self.exponent:+.{self.decimals}f}"
    if float(text) == 0 or (not signed and text[0] == "+"):
      text = text[1:]
    return text.replace("-", "−")

  def error(self, std_error: float) -> str:
    """`± 0.12`, or nothing where the error is NaN."""
    return "" if math.isnan(std_error) else f"± {self.number(std_error, signed=False)}"

  def with_error(self, value: float, std_error: float) -> str:
    return f"{self.number(value)} {self.error(std_error)}".rstrip()


def explained_rows(
  dataset: Dataset, *, samples: np.ndarray, scores: Scores, num_queries: int, top_k: int
) -> list[Row]:
  """Rows of the first `num_queries` samples, or of all where there are fewer.

  Args:
    dataset: the training images.
    samples: [Q, H, W, C] float32 in [-1, 1].
    scores: of these samples and this data set, in their order.
    num_queries: 1 or more.
    top_k: training images in each group, 1 to N.

  Raises:
    ValueError: the scores belong to other samples or data, or a number is out of range.
  """
  _check(dataset, samples, scores, num_queries=num_queries, top_k=top_k)
  rankings = {
    "supporting": scores.top(top_k),
    "opposing": scores.bottom(top_k),
    "neutral": scores.neutral(top_k),
  }
  values = np.sort(scores.values, axis=1)
  return [
    Row(
      image=samples[q],
      id=str(scores.query_ids[q]),
      groups={name: _neighbours(dataset, ranking, q) for name, ranking in rankings.items()},
      values=values[q],
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
      dataset.images[n], str(dataset.ids[n]), _label(dataset, n), float(score), float(error)
    )
    for n, score, error in zip(
      ranking.positions[query], ranking.values[query], ranking.std_errors[query], strict=True
    )
  ]


def _label(dataset: Dataset, position: int) -> str | None:
  if dataset.labels is None:
    return None
  label = int(dataset.labels[position])
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
  if not 1 <= top_k <= len(dataset):
    raise ValueError(
      f"report.top_k must lie in 1…{len(dataset)}, the number of training images; got {top_k}."
    )
  if not np.isfinite(scores.group_values).all():
    raise ValueError("The scores hold NaN or infinity: raise attribute.damping, then score again.")
