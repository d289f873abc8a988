"""Scores of training examples for queries, and rankings made of them."""

import csv
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.damping import damping_of, number_of, symbol_of
from jaxinf.data.files import read_npz, write_npz
from jaxinf.scores.statistics import mean_and_error

if TYPE_CHECKING:
  import pandas

# What a negative score counts in predictions. It says that the model would fit the query better
# without the example; models trained anew without examples seldom do. Chosen on the benchmark
# configs/digits_mlp.py (LDS for the loss: 88.0 % at 1, 88.8 at ½, 88.5 at ¼, 87.4 at 0), so that
# only the figures of other benchmarks say what it brings.
NEGATIVE_WEIGHT = 0.5

# Of what is saved.
_OPTIONAL = ("query_replicate_values", "train_groups", "num_examples", "model_values")


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Predicted changes of Q queries' measurements where training examples are removed.

  Attributes:
    changes: [Q]; positive: the model will fit the query worse.
    std_errors: [Q] standard errors over draws; NaN where draws are one replicate.
    model_std_errors: [Q] standard errors between models of other training runs; NaN of one model.
  """

  changes: np.ndarray
  std_errors: np.ndarray
  model_std_errors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ranking:
  """The highest scoring training examples of each query, best first.

  Attributes:
    ids: [Q, k] ids of training examples.
    values: [Q, k] their scores.
    std_errors: [Q, k] standard errors of the scores over draws.
    model_std_errors: [Q, k] standard errors of the scores between models; NaN of one model.
    positions: [Q, k] their rows in the training set.
  """

  ids: np.ndarray
  values: np.ndarray
  std_errors: np.ndarray
  model_std_errors: np.ndarray
  positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scores:
  """Influence of every training example on every query.

  scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Positive: example n supports query q, so that removing
  n makes the model fit q worse. The change of m_q for removing a set I of examples is
  Σ_{n∈I} scores[q, n] / N to first order; `predicted_change` counts negative scores less.

  Attributes:
    replicate_values: [G, Q, N] float32, scores from G independent replicates of training draws.
    query_ids: [Q] ids of the queries.
    train_ids: [N] ids of the training examples.
    settings: what the scores were computed with (measurement, damping, draws, …).
    query_replicate_values: [A, Q, N] float32, scores from A replicates of query draws. Each of
      them has the mean over all training draws, and each of the G above the mean over all
      query draws. None: query draws have one replicate.
    train_groups: [N] what the examples belong to (an artist, a class); None: not given.
    num_examples: the N that a removal divides by; None: as many as there are train_ids. It is
      larger where a column is a sum over examples.
    model_values: [K, Q, N] float32, scores of each of K models trained with seeds of their own,
      whose mean these scores are; see `mean_scores`. None: of one model.

  Raises:
    ValueError: the shapes of the values and the numbers of ids or groups do not agree.

  Examples:
    >>> of_draws = np.array([[[3, -1, 0]], [[5, -1, 2]]], np.float32)  # two replicates
    >>> scores = Scores(of_draws, np.array(["sample"]), np.array(["cat", "dog", "fox"]), {})
    >>> scores.values.tolist()
    [[4.0, -1.0, 1.0]]
    >>> scores.std_errors.round(6).tolist()
    [[1.0, 0.0, 1.0]]
    >>> scores.top(2).ids.tolist()
    [['cat', 'fox']]
  """

  replicate_values: np.ndarray
  query_ids: np.ndarray
  train_ids: np.ndarray
  settings: Mapping[str, Any]
  query_replicate_values: np.ndarray | None = None
  train_groups: np.ndarray | None = None
  num_examples: int | None = None
  model_values: np.ndarray | None = None

  def __post_init__(self):
    shape = np.shape(self.replicate_values)
    if len(shape) != 3 or not shape[0]:
      raise ValueError(
        "replicate_values must be scores [G, Q, N] of G ≥ 1 replicates of draws, Q queries and N "
        f"training examples; got shape {shape}."
      )
    lengths = {"query_ids": shape[1], "train_ids": shape[2], "train_groups": shape[2]}
    for name, length in lengths.items():
      values = getattr(self, name)
      if values is not None and np.shape(values) != (length,):
        raise ValueError(
          f"{name} must be {length}, as replicate_values {shape} has them; got {np.shape(values)}."
        )
    for name, number in {"query_replicate_values": "A", "model_values": "K"}.items():
      values = getattr(self, name)
      if values is not None and (np.ndim(values) != 3 or values.shape[1:] != shape[1:]):
        raise ValueError(
          f"{name} must be scores [{number}, {shape[1]}, {shape[2]}], of the same queries and "
          f"training examples as replicate_values; got shape {np.shape(values)}."
        )

  @property
  def values(self) -> np.ndarray:
    """[Q, N] scores: the mean over replicates of draws."""
    return self.replicate_values.mean(axis=0)

  @property
  def std_errors(self) -> np.ndarray:
    """[Q, N] float32 standard errors over draws, of training examples and of queries.

    A score is bilinear in two averages over draws, the query's gradient and the example's, whose
    noises are independent. To first order they add:

      Var(score) = Var over training replicates / G + Var over query replicates / A.

    The product of the two noises, which is of second order, is counted twice: errors that are large
    beside the scores are overestimated. Without replicates of query draws (None or A = 1) the
    errors are over training draws alone; NaN where G = 1.
    """
    return _errors(self.replicate_values, self.query_replicate_values)

  @property
  def model_std_errors(self) -> np.ndarray:
    """[Q, N] float32 standard errors between models: std(ddof=1) / √K over the K of model_values.

    What another training run would move, noise of draws included where models have draws of their
    own. NaN of one model.
    """
    return _errors(self.values[None] if self.model_values is None else self.model_values, None)

  def discounted(self, negative_weight: float = NEGATIVE_WEIGHT) -> "Scores":
    """The same scores, with the negative ones multiplied by a weight.

    A score's sign is that of its mean over replicates and models, and all of them are multiplied.

    Raises:
      ValueError: the weight is not in [0, 1].
    """
    weights = negative_weights(self.values, negative_weight).astype(np.float32)
    return self.with_values(lambda values: values * weights)

  def by_group(self) -> "Scores":
    """Scores of the M groups of training examples: sums over the examples of each.

    The groups become the train_ids, in ascending order. Replicates of draws stay apart, so that the
    standard errors are those of the sums: examples share their draws, and their noise with them.
    The sums are of the scores as they are: positive and negative ones cancel. To count negative
    scores of examples less, sum `discounted` scores, and predict with negative_weight=1.

    Raises:
      ValueError: the scores have no train_groups.
    """
    if self.train_groups is None:
      raise ValueError("Scores summed over groups need train_groups, whose each example is.")
    groups, members = np.unique(self.train_groups, return_inverse=True)
    return self.with_values(
      lambda values: _sums(values, members, len(groups)),
      train_ids=groups,
      train_groups=None,
      num_examples=self._num_examples,
    )

  def of_query_set(self, weights: Mapping[Any, float] | np.ndarray) -> "Scores":
    """Scores of one query, whose measurement is Σ_q w_q m_q over these queries.

    Influence is linear in the measurement, so that they are Σ_q w_q scores[q, n]. Weights 1 / Q ask
    for the mean of a set, returns or ratings for what made the good ones good, and 1 and −1 for a
    difference: positive scores then support the first more than the second.

    Replicates of draws stay apart, so that the standard errors are those of the sum: queries share
    the draws of training examples, and their noise with them.

    Args:
      weights: query id → w_q, 0 for queries that are left out; or w [Q], of every query in order.

    Raises:
      ValueError: an id is of no query, there are not Q weights, or they are not finite or all 0.
    """
    w = self._query_weights(weights)
    return self.with_values(
      lambda values: np.einsum("q,gqn->gn", w, values).astype(np.float32)[:, None],
      query_ids=np.array(["query set"]),
      settings={**self.settings, "query_weights": w.tolist()},
    )

  def predicted_change(
    self, removed: Iterable, negative_weight: float = NEGATIVE_WEIGHT
  ) -> Prediction:
    """Predicted change of each query's measurement where these training examples are removed.

    Σ w(scores[q, n]) · scores[q, n] / N over the removed examples n, with w = negative_weight where
    the mean over replicates and models is negative, and 1 elsewhere. Of scores `by_group`, ids are
    groups, N still counts examples, and w is that of a group's sum. Positive: the model will fit
    the query worse. Errors are those of the sum, since examples share draws and models.

    Args:
      removed: of train_ids; one that comes twice counts once.
      negative_weight: in [0, 1]; 1: scores as they are.

    Raises:
      ValueError: an id is none of train_ids, or the weight is not in [0, 1].
    """
    asked = set(np.asarray(list(removed)).tolist())
    known = np.asarray(self.train_ids).tolist()
    unknown = sorted(map(repr, asked - set(known)))
    if unknown:
      raise ValueError(
        f"{len(unknown)} ids are of no training example: {', '.join(unknown[:3])}"
        f"{', …' if len(unknown) > 3 else ''}. There are {len(known)}, such as {known[:3]}."
      )
    columns = np.array([identity in asked for identity in known])
    weights = negative_weights(self.values, negative_weight)[:, columns]
    change = lambda values: (values[..., columns] * weights).sum(axis=-1) / self._num_examples
    of = lambda values: None if values is None else change(values)
    replicates, models = change(self.replicate_values), of(self.model_values)
    changes = replicates.mean(axis=0)
    return Prediction(
      changes=changes,
      std_errors=_errors(replicates, of(self.query_replicate_values)),
      model_std_errors=_errors(changes[None] if models is None else models, None),
    )

  def with_values(self, change: Callable[[np.ndarray], np.ndarray], **fields: Any) -> "Scores":
    """The scores with `change` made to all arrays [..., Q, N] of values, and other fields."""
    names = ("replicate_values", "query_replicate_values", "model_values")
    given = {name: values for name in names if (values := getattr(self, name)) is not None}
    changed: dict[str, Any] = {name: change(values) for name, values in given.items()}
    return dataclasses.replace(self, **changed, **fields)

  def size(self) -> str:
    """How many queries, training examples and replicates of draws there are, in words."""
    num_replicates, num_queries, num_train = self.replicate_values.shape
    text = (
      f"{num_queries} queries × {num_train} training examples, {num_replicates} replicates of draws"
    )
    if self.query_replicate_values is not None:
      text += f", {len(self.query_replicate_values)} of query draws"
    return text if self.model_values is None else f"{text}, {len(self.model_values)} models"

  def summary(self) -> str:
    """One line: their number, what they are of, and how large they are beside their errors."""
    names = ("method", "measurement", "damping", "damping_kind")
    said = [f"{name} {self.settings[name]}" for name in names if name in self.settings]
    values, errors = self.values, self.std_errors
    scale = float(np.sqrt(np.mean(np.square(values, dtype=float)))) if values.size else 0.0
    said.append(f"root mean square {scale:.3g}")
    if values.size and not np.isnan(errors).all():
      said.append(f"standard errors {float(np.sqrt(np.mean(np.square(errors, dtype=float)))):.3g}")
    return f"{self.size()}; {', '.join(said)}"

  def __repr__(self) -> str:
    if "damping" not in self.settings:
      return f"Scores({self.size()})"
    damping = damping_of(self.settings)
    return f"Scores({self.size()}; {symbol_of(damping)} = {number_of(damping):g})"

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the scores as an .npz file, which `Scores.load` reads.

    Its arrays are `values` [Q, N], or `replicate_values` [G, Q, N] where draws have G > 1
    replicates; `query_ids` [Q], `train_ids` [N] and `settings`, a JSON text; and, where the scores
    have them, `query_replicate_values` [A, Q, N], `model_values` [K, Q, N], `train_groups` [N] and
    `num_examples` [].

    Raises:
      ValueError: the path is no .npz file's, ids are objects, or the settings are not JSON's kinds.
    """
    one = len(self.replicate_values) == 1
    arrays = {"values": self.values} if one else {"replicate_values": self.replicate_values}
    for name in ("query_ids", "train_ids", *_OPTIONAL):
      if (value := getattr(self, name)) is not None:
        arrays[name] = np.asarray(value)
    try:
      arrays["settings"] = np.array(json.dumps(dict(self.settings)))
    except TypeError as error:
      raise ValueError(f"settings must be numbers, strings, lists and dicts: {error}.") from error
    write_npz(path, arrays)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Scores":
    """Reads scores that `save` wrote, or that anyone wrote as an .npz file of the same arrays.

    Three are enough: `values`, `query_ids` and `train_ids`. Settings are then empty.

    Raises:
      ValueError: there is no such file, or its arrays are not those.
    """
    path = pathlib.Path(path).expanduser()
    contents = read_npz(path, holds="values=..., query_ids=..., train_ids=...")
    values = [name for name in ("values", "replicate_values") if name in contents]
    lacking = {"query_ids", "train_ids"} - set(contents)
    unknown = set(contents) - {*values, "query_ids", "train_ids", "settings", *_OPTIONAL}
    if len(values) != 1 or lacking or unknown:
      raise ValueError(
        f"{path}: expected the arrays values [queries, training examples] (or replicate_values "
        f"with replicates first), query_ids and train_ids, and maybe settings and "
        f"{', '.join(_OPTIONAL)}; got {', '.join(contents) or 'none'}. Rename, add or drop some."
      )
    found = contents[values[0]]
    if found.dtype.kind not in "fiu" or found.ndim != (2 if values[0] == "values" else 3):
      raise ValueError(
        f"{path}: expected {values[0]} as numbers [{'' if values[0] == 'values' else 'G, '}Q, N]; "
        f"got shape {found.shape} of type {found.dtype}."
      )
    try:
      return cls(
        found if found.ndim == 3 else found[None],
        contents["query_ids"],
        contents["train_ids"],
        json.loads(str(contents.get("settings", "{}"))),
        contents.get("query_replicate_values"),
        contents.get("train_groups"),
        int(contents["num_examples"]) if "num_examples" in contents else None,
        contents.get("model_values"),
      )
    except (TypeError, ValueError) as error:
      raise ValueError(f"{path}: {error}") from error

  def to_frame(self) -> "pandas.DataFrame":
    """The scores as a pandas DataFrame of Q · N rows, query by query.

    Its columns are query, train, score and std_error, which is NaN where draws are one replicate;
    then model_std_error where the scores are of several models, and group where there are
    train_groups.

    Raises:
      ImportError: pandas is not installed.
    """
    try:
      import pandas
    except ImportError as error:
      raise ImportError(
        f"to_frame needs pandas, as of `pip install 'jaxinf[pandas]'`: {error}. Or write the same "
        "table with to_csv."
      ) from error
    num_queries, num_train = self.values.shape
    columns = {
      "query": np.repeat(self.query_ids, num_train),
      "train": np.tile(self.train_ids, num_queries),
    }
    columns |= {name: values.ravel() for name, values in self._columns().items()}
    if self.train_groups is not None:
      columns["group"] = np.tile(self.train_groups, num_queries)
    return pandas.DataFrame(columns)

  def to_csv(self, path: str | pathlib.Path) -> None:
    """Writes the table of `to_frame` as a CSV file, with nothing where a number is NaN.

    Numbers have as many digits as tell float32 apart.
    """
    columns = self._columns()
    groups = () if self.train_groups is None else (np.asarray(self.train_groups).tolist(),)
    cells = lambda row: ["" if np.isnan(x) else str(x) for x in row]
    with pathlib.Path(path).expanduser().open("w", newline="", encoding="utf-8") as file:
      rows = csv.writer(file, lineterminator="\n")
      rows.writerow(["query", "train", *columns, *["group"] * len(groups)])
      for q, query in enumerate(np.asarray(self.query_ids).tolist()):
        numbers = (cells(values[q]) for values in columns.values())
        names = itertools.repeat(query, len(self.train_ids))
        rows.writerows(zip(names, self.train_ids.tolist(), *numbers, *groups, strict=True))

  def _columns(self) -> dict[str, np.ndarray]:
    """The numbers [Q, N] of the table by name."""
    columns = {"score": self.values, "std_error": self.std_errors}
    return columns | (
      {} if self.model_values is None else {"model_std_error": self.model_std_errors}
    )

  def top(self, k: int) -> Ranking:
    """The k most supporting training examples of each query."""
    return self._ranked(k, -self.values)

  def bottom(self, k: int) -> Ranking:
    """The k most opposing training examples of each query (lowest scores first)."""
    return self._ranked(k, self.values)

  def neutral(self, k: int) -> Ranking:
    """The k training examples of each query whose scores are nearest to zero."""
    return self._ranked(k, np.abs(self.values))

  @property
  def _num_examples(self) -> int:
    return len(self.train_ids) if self.num_examples is None else self.num_examples

  def _query_weights(self, weights: Mapping[Any, float] | np.ndarray) -> np.ndarray:
    """[Q] float64 weights of the queries; see `of_query_set`."""
    known = np.asarray(self.query_ids).tolist()
    if isinstance(weights, Mapping):
      given = {np.asarray(key).item(): value for key, value in weights.items()}
      if unknown := sorted(map(repr, given.keys() - set(known))):
        raise ValueError(
          f"{len(unknown)} ids are of no query, such as {unknown[0]}. There are {len(known)}, such "
          f"as {known[:3]}."
        )
      weights = np.array([given.get(identity, 0.0) for identity in known], np.float64)
    w = np.asarray(weights, np.float64)
    if w.shape != (len(known),):
      raise ValueError(
        f"weights must be {len(known)} numbers, one a query, or a mapping from query ids; got "
        f"shape {w.shape}."
      )
    if not np.isfinite(w).all() or not w.any():
      raise ValueError("weights must be finite, and not all 0: otherwise no query is asked about.")
    return w

  def _ranked(self, k: int, order_by: np.ndarray) -> Ranking:
    num_train = order_by.shape[1]
    if checked_count(k, "k") > num_train:
      raise ValueError(f"k must lie in 1…{num_train}, the number of training examples; got {k}.")
    positions = np.argsort(order_by, axis=1, kind="stable")[:, :k]
    pick = lambda array: np.take_along_axis(array, positions, axis=1)
    return Ranking(
      ids=self.train_ids[positions],
      values=pick(self.values),
      std_errors=pick(self.std_errors),
      model_std_errors=pick(self.model_std_errors),
      positions=positions,
    )


def negative_weights(values: np.ndarray, negative_weight: float) -> np.ndarray:
  """Float64 weights of scores of any shape: `negative_weight` of negative ones, 1 of the others.

  Raises:
    ValueError: the weight is not in [0, 1].
  """
  if not 0 <= negative_weight <= 1:
    raise ValueError(
      f"negative_weight must lie in [0, 1]: 1 takes scores as they are, 0 drops the negative ones; "
      f"got {negative_weight}."
    )
  return np.where(values < 0, float(negative_weight), 1.0)


def _errors(replicates: np.ndarray, query_replicates: np.ndarray | None) -> np.ndarray:
  """Standard errors of numbers [G, …] and [A, …] over replicates; see `Scores.std_errors`."""
  _, errors = mean_and_error(replicates, axis=0)
  if query_replicates is None or len(query_replicates) < 2:
    return errors
  return np.hypot(errors, mean_and_error(query_replicates, axis=0)[1])


def _sums(values: np.ndarray, members: np.ndarray, num_groups: int) -> np.ndarray:
  """[…, M] float32 sums of values [..., N] over the examples of each group, made in float64."""
  order = np.argsort(members, kind="stable")
  begins = np.searchsorted(members[order], np.arange(num_groups))
  return np.add.reduceat(values[..., order], begins, axis=-1, dtype=np.float64).astype(np.float32)
