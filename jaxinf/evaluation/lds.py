"""The linear datamodelling score (LDS): do scores predict what retraining does? (paper, Eq. 23)

M models are retrained on subsets of the training examples, with K seeds each, and measured on Q
queries. Scores predict that removing the set I changes the measurement of query q by
Σ_{n∈I} w(scores[q, n]) · scores[q, n] / N, where w = 1, or less for negative scores. The LDS of a
query is Spearman's rank correlation over the M subsets of the prediction and the mean measurement
over seeds; that of a method is the mean over queries.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinf.data.subsets import Subsets
from jaxinf.scores import statistics
from jaxinf.scores.scores import Scores, negative_weights
from jaxinf.scores.statistics import PairedTest


@dataclasses.dataclass(frozen=True, eq=False)
class Retrained:
  """True measurements of Q queries by models retrained on M subsets with K seeds.

  Attributes:
    values: [M, K, Q] the measurement of query q by the model trained on subset m with seed k; all
      NaN where that model is not trained yet.
    query_ids: [Q] unique ids of the queries.
    measurement: what was measured.

  Raises:
    ValueError: values do not fit the ids or are not finite, or fewer than two subsets are trained.
  """

  values: np.ndarray
  query_ids: np.ndarray
  measurement: str

  def __post_init__(self):
    ids = np.asarray(self.query_ids)
    if np.ndim(self.values) != 3 or not np.size(self.values) or np.isinf(self.values).any():
      raise ValueError(
        "values must be finite numbers [M, K, Q] of M subsets, K seeds and Q queries, NaN for a "
        f"model not trained yet; got shape {np.shape(self.values)}."
      )
    if ids.shape != self.values.shape[2:] or len(np.unique(ids)) < len(ids):
      raise ValueError(
        f"query_ids must be {self.values.shape[2]} different ids, one a query; got {ids.shape}."
      )
    partly = np.argwhere(np.isnan(self.values).any(axis=2) & self.trained)
    if len(partly):
      raise ValueError(
        f"Subset {partly[0, 0]} with seed {partly[0, 1]} lacks the measurements of some queries: "
        "measure all queries of a model, or none."
      )
    if len(self.kept) < 2:
      raise ValueError("Rank correlations need models of at least two subsets. Retrain more.")

  @property
  def trained(self) -> np.ndarray:
    """[M, K] bool: which models there are."""
    return ~np.isnan(self.values).all(axis=2)

  @property
  def kept(self) -> np.ndarray:
    """Numbers of the subsets that have any model, ascending."""
    return np.flatnonzero(self.trained.any(axis=1))

  def means(self) -> np.ndarray:
    """[M, Q] means over seeds, NaN for subsets without a model.

    All models of a seed have the same initial weights and random stream, so that a seed moves all
    its measurements alike. Where some subsets lack a seed, value = subset + seed is fitted by least
    squares, and the means are the subsets' part: which seeds a subset has does not move it.
    """
    trained, values = self.trained.astype(float), self.values.astype(float)
    counts = trained.sum(axis=1, keepdims=True)
    counts[counts == 0] = np.nan
    shares = trained / counts
    means = np.nansum(values, axis=1) / counts
    if self.trained[self.kept].all():
      return means
    residuals = np.nansum(values - means[:, None], axis=0)  # [K, Q]
    normal = np.diag(trained.sum(axis=0)) - trained.T @ np.nan_to_num(shares)
    return means - shares @ (np.linalg.pinv(normal, hermitian=True) @ residuals)


@dataclasses.dataclass(frozen=True, eq=False)
class LDS:
  """How well one method predicts the measurements of retrained models.

  Attributes:
    per_query: [Q] rank correlations over subsets; 0 where all predictions or measurements agree.
    query_ids: [Q] ids of the queries.
    predicted: [M, Q] predicted changes, of the M subsets that have a model.
    measured: [M, Q] mean measurements over seeds.
    subset_numbers: [M] the numbers of these subsets.
    resampled: [B, Q] float32, per_query in bootstrap resamples of subsets.
    seed: of the resamples.
    measurement: what was measured of the retrained models.
    settings: what the scores were computed with, and "negative_weight" of the predictions.
  """

  per_query: np.ndarray
  query_ids: np.ndarray
  predicted: np.ndarray
  measured: np.ndarray
  subset_numbers: np.ndarray
  resampled: np.ndarray
  seed: int
  measurement: str
  settings: Mapping[str, Any]

  @property
  def mean(self) -> float:
    """The LDS: mean over queries."""
    return float(self.per_query.mean())

  @property
  def std_error(self) -> float:
    """std(ddof=1) / √Q over queries, as the paper's; other subsets are not accounted for."""
    return float(statistics.mean_and_error(self.per_query)[1])

  @functools.cached_property
  def interval(self) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of these queries over subsets."""
    return statistics.subset_interval(self.per_query, self.resampled)

  @functools.cached_property
  def interval_both(self) -> tuple[float, float]:
    """95 % interval of the mean, over subsets and queries both."""
    return statistics.two_way_interval(self.per_query, self.resampled, self._samples())

  def against(self, other: "LDS") -> PairedTest:
    """Self less other on the same resamples; see `statistics.paired_test` for the null hypothesis.

    Raises:
      ValueError: they are not of the same queries, subsets, resamples and measurement.
    """
    same = {
      "queries": np.array_equal(self.query_ids, other.query_ids),
      "subsets": np.array_equal(self.subset_numbers, other.subset_numbers),
      "resamples": (self.seed, len(self.resampled)) == (other.seed, len(other.resampled)),
      "measurement": self.measurement == other.measurement,
    }
    if not all(same.values()):
      raise ValueError(
        f"LDS of other {', '.join(name for name, alike in same.items() if not alike)} cannot be "
        "compared: compute both with one `retrained`, seed and num_resamples."
      )
    mine, theirs = ((x.per_query, x.resampled) for x in (self, other))
    return statistics.paired_test(mine, theirs, self._samples())

  def summary(self) -> str:
    """One line: the score, its standard error over queries and its intervals."""
    num_subsets, num_queries = self.predicted.shape
    line = (
      f"LDS {100 * self.mean:.1f} ± {100 * self.std_error:.1f} % ({self.measurement}; "
      f"{num_queries} queries, {num_subsets} subsets); 95 % interval "
      f"{percent_range(self.interval)} over subsets, {percent_range(self.interval_both)} over both"
    )
    weight = self.settings.get("negative_weight", 1)
    if weight != 1:
      line += f"; negative scores × {weight:g}"
    ordered = (self.predicted != self.predicted[:1]).any(axis=0)
    if not ordered.all():
      line += f"; {(~ordered).sum()} queries with equal predictions for all subsets count as 0"
    return line

  def _samples(self) -> statistics.Resamples:
    shape = len(self.subset_numbers), len(self.query_ids)
    return statistics.resamples(*shape, seed=self.seed, num_resamples=len(self.resampled))


def lds(
  scores: Scores,
  subsets: Subsets,
  retrained: Retrained,
  *,
  negative_weight: float = 1.0,
  seed: int = 0,
  num_resamples: int = 1000,
) -> LDS:
  """The LDS of scores; ids of queries and training examples may come in any order.

  Args:
    scores: of the queries of `retrained` for the training examples of `subsets`.
    subsets: what the models were trained on.
    retrained: their measurements; subsets without any model are left out.
    negative_weight: of negative scores in the predictions, as of `Scores.predicted_change`; 1: the
      scores as they are, which is the LDS of the literature.
    seed: of the bootstrap resamples; the same for methods that are compared.
    num_resamples: B.

  Raises:
    ValueError: ids or numbers of subsets differ, scores are not finite, or the weight is not in
      [0, 1].

  Examples:
    >>> from jaxinf.data.subsets import random_subsets
    >>> effects = np.array([[3, -1, 2, 0.5]], np.float32)  # what leaving each out does, times N
    >>> subsets = random_subsets(np.arange(4), 6, share=0.5, seed=0)
    >>> measured = ~subsets.membership @ effects[0] / 4
    >>> retrained = Retrained(measured[:, None, None], np.array(["sample"]), "loss")
    >>> scores = Scores(effects[None], np.array(["sample"]), np.arange(4), {})
    >>> round(lds(scores, subsets, retrained).mean, 6)
    1.0
  """
  predicted = ordered_predictions(scores, subsets, retrained, negative_weight)
  settings = {**scores.settings, "negative_weight": negative_weight}
  return lds_of_predictions(
    predicted, retrained, settings=settings, seed=seed, num_resamples=num_resamples
  )


def lds_of_predictions(
  predicted: np.ndarray,
  retrained: Retrained,
  *,
  settings: Mapping[str, Any],
  seed: int = 0,
  num_resamples: int = 1000,
) -> LDS:
  """The LDS of predictions, however they were made.

  Args:
    predicted: [M, Q] changes of all subsets of `retrained`, queries in its order.
    retrained: the measurements; subsets without any model are left out.
    settings: of the method.
    seed, num_resamples: as of `lds`.

  Raises:
    ValueError: there are not as many predictions as measurements, or some are not finite.
  """
  shape = len(retrained.values), len(retrained.query_ids)
  if np.shape(predicted) != shape or not np.isfinite(predicted).all():
    raise ValueError(
      f"predicted must be finite numbers {shape}, of {shape[0]} subsets and {shape[1]} queries; "
      f"got shape {np.shape(predicted)}."
    )
  kept, measured = retrained.kept, retrained.means()[retrained.kept]
  counts = statistics.resamples(*measured.shape, seed=seed, num_resamples=num_resamples).subsets
  return LDS(
    per_query=statistics.spearman(predicted[kept], measured, axis=0),
    query_ids=np.asarray(retrained.query_ids),
    predicted=predicted[kept],
    measured=measured,
    subset_numbers=kept,
    resampled=statistics.resampled_spearman(predicted[kept], measured, counts),
    seed=seed,
    measurement=retrained.measurement,
    settings=settings,
  )


def predicted_and_measured(
  scores: Scores, subsets: Subsets, retrained: Retrained, negative_weight: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
  """[M, Q] predicted changes and mean measurements, of the M subsets that have a model."""
  kept = retrained.kept
  predicted = ordered_predictions(scores, subsets, retrained, negative_weight)
  return predicted[kept], retrained.means()[kept]


def ordered_predictions(
  scores: Scores, subsets: Subsets, retrained: Retrained, negative_weight: float = 1.0
) -> np.ndarray:
  """[M, Q] predicted changes of all subsets, queries in the order of `retrained`."""
  if len(subsets) != len(retrained.values):
    raise ValueError(
      f"There are {len(subsets)} subsets but measurements of {len(retrained.values)}: pass the "
      "subsets that the models were trained on."
    )
  columns = _matched(scores.query_ids, retrained.query_ids, "queries", "the retrained models'")
  return predictions(scores, subsets, negative_weight)[:, columns]


def predictions(scores: Scores, subsets: Subsets, negative_weight: float = 1.0) -> np.ndarray:
  """[M, Q] predicted changes of the queries' measurements, of models trained on the subsets only.

  Those of `Scores.predicted_change` for removing what subset m lacks, of all subsets at once:
  Σ_{n∉subset m} w(scores[q, n]) · scores[q, n] / N in float64, queries in the order of the scores.
  """
  columns = _matched(scores.train_ids, subsets.train_ids, "training examples", "the subsets'")
  values = scores.values
  infinite = np.argwhere(~np.isfinite(values))
  if len(infinite):
    query, example = infinite[0]
    raise ValueError(
      f"Some scores are not finite and predict nothing: {len(infinite)} of {values.size}, such as "
      f"that of training example {scores.train_ids[example]} for query {scores.query_ids[query]}. "
      "Score these again."
    )
  weighted = values * negative_weights(values, negative_weight)
  return (~subsets.membership).astype(float) @ weighted[:, columns].T / len(columns)


def _matched(given: np.ndarray, wanted: np.ndarray, what: str, whose: str) -> np.ndarray:
  """Positions among the ids `given` of the ids `wanted`; ValueError unless they are the same."""
  position_of = {identity: i for i, identity in enumerate(np.asarray(given).tolist())}
  asked = dict.fromkeys(np.asarray(wanted).tolist())
  lacking = [i for i in asked if i not in position_of]
  more = [i for i in position_of if i not in asked]
  if lacking or more:
    raise ValueError(
      f"The scores' {what} are not {whose}: {len(lacking)} of {len(asked)} are missing "
      f"({_some(lacking)}) and {len(more)} are others ({_some(more)}). Score exactly those."
    )
  return np.array([position_of[i] for i in asked])


def _some(ids: list) -> str:
  return ", ".join(map(repr, ids[:3])) + ", …" * (len(ids) > 3) if ids else "none"


def percent_range(interval: tuple[float, float]) -> str:
  """An interval in %, as 20.1 … 22.9."""
  return "{:.1f} … {:.1f}".format(*(100 * x for x in interval))


def p_text(p_value: float | None) -> str:
  """A p-value of three digits; a dash where there is none."""
  return "–" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
