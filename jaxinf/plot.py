"""Figures of scores, for notebooks and papers: matplotlib's, without pyplot."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxinf.core.arrays import read_rows
from jaxinf.core.checks import checked_count
from jaxinf.core.examples import Examples
from jaxinf.data.dataset import Dataset
from jaxinf.report.attribution_figure import attribution_figure
from jaxinf.report.pictures import is_image
from jaxinf.report.rows import common_unit, explained_rows
from jaxinf.scores.scores import Scores


def attributions(
  scores: Scores, queries: Any, train: Any, k: int = 8, num_queries: int = 12
) -> Figure:
  """A line for each query: its picture, then its most supporting, opposing and neutral examples.

  Below each training example is its score, ± its standard error where draws have replicates. Series
  and vectors are drawn as lines, and what has no picture is named by its id. Notebooks show the
  figure; `figure.savefig(path)` writes it.

  Args:
    scores: of these queries and training examples.
    queries: what is shown of the Q queries, `Examples` or an array [Q, …]: images [H, W, C] as
      uint8 or floats in [-1, 1]. Of a model of latents give the decoded images.
    train: of the N training examples, likewise.
    k: training examples in each of the three groups; all N where it is more.
    num_queries: the first of them are shown; all Q where it is more.

  Raises:
    ValueError: examples of other ids or numbers than the scores', or a number below 1.
  """
  checked_count(k, "k")
  checked_count(num_queries, "num_queries")
  if isinstance(queries, Examples) and queries.ids.tolist() != scores.query_ids.tolist():
    raise ValueError(
      f"The scores are of {len(scores.query_ids)} queries that are not these {len(queries)}: pass "
      "those that were scored, in their order."
    )
  if isinstance(train, Examples) and train.ids.tolist() != scores.train_ids.tolist():
    raise ValueError(
      f"The scores are of {len(scores.train_ids)} training examples that are not these "
      f"{len(train)}: pass those that were scored, in their order."
    )
  images, pictures = _shown(queries), _shown(train)
  if (len(images), len(pictures)) != (len(scores.query_ids), len(scores.train_ids)):
    raise ValueError(
      f"The scores are of {len(scores.query_ids)} queries and {len(scores.train_ids)} training "
      f"examples; got {len(images)} and {len(pictures)} to show."
    )
  first = read_rows(images, np.arange(min(num_queries, len(images))))
  names = np.array([str(name) for name in scores.train_ids])
  few = scores.with_values(
    lambda values: values[..., : len(first), :],
    query_ids=scores.query_ids[: len(first)],
    train_ids=names,
  )
  dataset = Dataset("train", pictures, names)
  rows = explained_rows(dataset, samples=first, scores=few, num_queries=num_queries, top_k=k)
  noun = "image" if is_image(np.asarray(first[0])) else "example"
  return attribution_figure(rows, common_unit(rows), noun)


def _shown(examples: Any) -> Any:
  """The data of examples, to be drawn."""
  return examples.data if isinstance(examples, Examples) else examples
