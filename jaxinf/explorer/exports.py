"""Views as files to keep: CSV, JSON and PNG."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinf.core.arrays import read_rows
from jaxinf.explorer.findings import Findings
from jaxinf.explorer.views import (
  Choice,
  Filter,
  View,
  about,
  entry,
  number,
  of_sample,
  positions_of,
)
from jaxinf.report.attribution_figure import attribution_figure
from jaxinf.report.canvas import png
from jaxinf.report.pictures import picture_of
from jaxinf.report.rows import TITLES, Neighbour, Row, common_unit
from jaxinf.scores.scores import Scores

_MOST_IN_FIGURE = 12  # pictures in each of its groups


def table_of(findings: Findings, scores: Scores, only: Filter) -> list[View]:
  """A row for every training image that matches, in their order, of scores [1, N]."""
  positions = positions_of(findings, scores.train_ids)
  matching = np.append(findings.matching(only.label, only.text), only == Filter())
  arrays = scores.values[0], scores.std_errors[0], scores.model_std_errors[0]
  rows = []
  for column in np.flatnonzero(matching[positions]):
    shown = entry(findings, int(positions[column]), str(scores.train_ids[column]))
    score, error, between = (number(array[column]) for array in arrays)
    rows.append(
      {name: shown[name] for name in ("id", "label", "caption")}
      | {"score": score, "std_error": error, "model_std_error": between}
    )
  return rows


def sample_table(
  findings: Findings, identity: str, choice: Choice, only: Filter
) -> tuple[View, list[View]]:
  """What the scores of a sample are, and all of them."""
  scores = of_sample(findings, identity, choice)
  return {"sample": identity, **about(findings, choice)}, table_of(findings, scores, only)


def csv_bytes(rows: Sequence[View]) -> bytes:
  """A table with a line of names, in UTF-8; what is not known is empty.

  Texts are written as they are: a spreadsheet may take an id that begins with = for a formula.
  """
  text = io.StringIO()
  names = list(rows[0]) if rows else ["id"]
  writer = csv.DictWriter(text, names)
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


def json_bytes(head: View, rows: Sequence[View]) -> bytes:
  """What the rows are of, and the rows."""
  return json.dumps({**head, "rows": list(rows)}, ensure_ascii=False, indent=1).encode()


def figure(findings: Findings, scores: Scores, picture: Any, identity: str, k: int) -> bytes:
  """PNG of a query with its most supporting, opposing and neutral training images.

  Args:
    findings: of the run.
    scores: [1, N] of the query.
    picture: the query, as an example.
    identity: its id.
    k: images in each group, at most _MOST_IN_FIGURE.
  """
  k = min(k, _MOST_IN_FIGURE, len(scores.train_ids))
  rankings = {
    "supporting": scores.top(k), "opposing": scores.bottom(k), "neutral": scores.neutral(k)
  }  # fmt: skip
  positions = positions_of(findings, scores.train_ids)

  def neighbours(name: str) -> list[Neighbour]:
    ranking = rankings[name]
    columns = zip(ranking.positions[0], ranking.values[0], ranking.std_errors[0], strict=True)
    return [
      Neighbour(
        _picture(findings, int(positions[column])),
        str(scores.train_ids[column]),
        None,
        float(score),
        float(error),
      )
      for column, score, error in columns
    ]

  groups = {name: neighbours(name) for name in TITLES}
  rows = [Row(picture_of(picture), identity, groups, np.sort(scores.values[0]))]
  return png(attribution_figure(rows, common_unit(rows)))


def _picture(findings: Findings, position: int) -> np.ndarray | None:
  if position < 0:
    return None
  return picture_of(read_rows(findings.dataset.images, np.array([position]))[0])


def plain(rows: Sequence[View]) -> list[View]:
  """Rows of a view without positions, which are the explorer's own."""
  return [{name: value for name, value in row.items() if name != "position"} for row in rows]
