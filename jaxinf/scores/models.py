"""Scores of several models that are the same but for the seed of their training.

The scores of one model carry the noise of its training run, which no number of draws takes away.
The mean over K models carries less, and what is left shows in how far the models differ.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinf.scores.scores import Scores

# Settings that say which scores they are; others (compression, how many draws were enough) may
# differ from model to model.
_SAME = ("method", "measurement", "damping")


def mean_scores(scores: Sequence[Scores]) -> Scores:
  """The mean over K models, which remembers each of them.

  Replicates of draws are averaged one by one, so that the standard errors are those over draws of
  the mean, whether or not the models share draws. `model_values` are the scores of each model, and
  `model_std_errors` how far they differ. Settings that differ are left out; of several checks of
  compression the worst is kept.

  Args:
    scores: of each model, of the same queries and training examples in whatever order. The result
      has the order of the first. Those of one model are given back.

  Raises:
    ValueError: there are none, one is itself a mean, or they differ in queries, training examples,
      groups, numbers of replicates, N, method, measurement or damping.
  """
  scores = list(scores)
  if not scores or not all(isinstance(x, Scores) for x in scores):
    raise ValueError(
      f"A mean is of Scores of models, one or more; got {[type(x).__name__ for x in scores]}."
    )
  if len(scores) == 1:
    return scores[0]
  first, *others = scores
  matched = [first, *(_in_order_of(first, other, i + 1) for i, other in enumerate(others))]
  mean = lambda name: np.stack([getattr(x, name) for x in matched]).mean(axis=0)
  return Scores(
    replicate_values=mean("replicate_values"),
    query_ids=first.query_ids,
    train_ids=first.train_ids,
    settings=_shared([x.settings for x in scores]) | {"num_models": len(scores)},
    query_replicate_values=(
      None if first.query_replicate_values is None else mean("query_replicate_values")
    ),
    train_groups=first.train_groups,
    num_examples=first.num_examples,
    model_values=np.stack([x.values for x in matched]),
  )


def shared_top(scores: Scores, k: int) -> np.ndarray:
  """[Q, K] |top-k of the mean ∩ top-k of a model| / k, of scores of K models.

  Raises:
    ValueError: the scores are of one model, or k is not in 1…N.
  """
  if scores.model_values is None:
    raise ValueError("These scores are of one model: pass what mean_scores gives of several.")
  best = scores.top(k).positions
  own = np.argsort(-scores.model_values, axis=2, kind="stable")[:, :, :k]
  shared = (best[None, :, :, None] == own[:, :, None]).any(axis=3)
  return shared.mean(axis=2).T


def _in_order_of(first: Scores, other: Scores, number: int) -> Scores:
  """`other` with queries and training examples as in `first`; ValueError where they differ."""
  pairs = zip(_nature(first).items(), _nature(other).values(), strict=True)
  different = [name for (name, one), two in pairs if one != two]
  if different or first.model_values is not None:
    raise ValueError(
      f"Scores of models must differ in nothing but the model; those of model {number} and of the "
      f"first have other {', '.join(different) or 'models (both are means)'}. Score each model "
      "alike: the same queries, training examples, draws and method."
    )
  rows = _positions(other.query_ids, first.query_ids)
  columns = _positions(other.train_ids, first.train_ids)
  groups = None if other.train_groups is None else other.train_groups[columns]
  if groups is not None and not np.array_equal(groups, np.asarray(first.train_groups)):
    raise ValueError(
      f"Scores of models must be of the same training examples; in those of model {number} some "
      "belong to other groups than in the first."
    )
  return other.with_values(
    lambda values: values[:, rows][..., columns],
    query_ids=first.query_ids,
    train_ids=first.train_ids,
    train_groups=groups,
  )


def _nature(scores: Scores) -> dict[str, Any]:
  """What scores of several models have in common, by the words for it."""
  ids = lambda values: sorted(np.asarray(values).tolist(), key=repr)
  both = scores.replicate_values, scores.query_replicate_values
  num = scores.num_examples
  return {
    "query ids": ids(scores.query_ids),
    "training ids": ids(scores.train_ids),
    "numbers of replicates": [None if values is None else len(values) for values in both],
    "number of training examples N": len(scores.train_ids) if num is None else num,
    "groups of training examples": scores.train_groups is None,
    "models (one of them is a mean)": scores.model_values is not None,
    **{name: scores.settings.get(name) for name in _SAME},
  }


def _positions(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Where among the ids `given` those `wanted` are."""
  position_of = {identity: i for i, identity in enumerate(given.tolist())}
  return np.array([position_of[identity] for identity in wanted.tolist()], int)


def _shared(settings: Sequence[Any]) -> dict[str, Any]:
  """What all settings have in common, and the worst check of compression."""
  first, *others = settings
  found = {k: v for k, v in first.items() if all(k in s and s[k] == v for s in others)}
  checks = [check for s in settings if (check := s.get("check")) and check["spearman"] is not None]
  worst = min(checks, key=lambda check: check["least_spearman"]) if checks else None
  return found | ({"check": worst} if "check" in first else {})
