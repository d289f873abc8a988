"""What the best predictor of retrained models could reach: their own seeds, predicting each other.

Retraining is random: the models of K seeds on one subset differ. One more model is the paper's
oracle, "exact retraining". The mean of infinitely many models would predict best; its LDS, the
ceiling, is estimated from how well single seeds agree.
"""

import dataclasses
import itertools

import numpy as np

from jaxinf.evaluation.lds import LDS, Retrained
from jaxinf.scores import statistics


@dataclasses.dataclass(frozen=True)
class NoiseCeiling:
  """The LDS of a perfect predictor; see `noise_ceiling`.

  Attributes:
    ceiling: estimate of it.
    interval: 95 % bootstrap interval over subsets.
    between_seeds: rank correlation of single seeds, mean over their pairs and queries.
  """

  ceiling: float
  interval: tuple[float, float]
  between_seeds: float


def retraining_lds(retrained: Retrained, *, seed: int = 0, num_resamples: int = 1000) -> LDS:
  """LDS of exact retraining: the model of one seed predicts the mean of the other seeds.

  Each seed in turn predicts, and all numbers are means over the seeds. Only `predicted` and
  `measured` are those of the first one; they are NaN for subsets without a model of it, or of any
  other seed. A seed counts with the subsets that it and another are trained on.

  Args:
    retrained: of K ≥ 2 seeds.
    seed, num_resamples: as of `lds`, for comparison with its results.

  Raises:
    ValueError: no seed shares two subsets with others.
  """
  kept = retrained.kept
  num_queries = retrained.values.shape[2]
  counts = _subset_counts(retrained, seed, num_resamples)
  per_query, resampled, pairs = [], [], []
  for one in range(retrained.values.shape[1]):
    others = np.delete(retrained.trained, one, axis=1)
    both = (retrained.trained[:, one] & others.any(axis=1))[kept]
    if both.sum() < 2:
      continue
    rest = dataclasses.replace(retrained, values=np.delete(retrained.values, one, axis=1))
    pair = np.stack([retrained.values[kept, one], rest.means()[kept]])
    x, y = pair[:, both]
    per_query.append(statistics.spearman(x, y, axis=0))
    resampled.append(statistics.resampled_spearman(x, y, counts[:, both]))
    pairs.append(np.where(both[:, None], pair, np.nan))
  if not pairs:
    raise ValueError("Exact retraining needs two seeds of at least two subsets. Retrain with more.")
  return LDS(
    per_query=np.mean(per_query, axis=0),
    query_ids=np.asarray(retrained.query_ids),
    predicted=pairs[0][0],
    measured=pairs[0][1],
    subset_numbers=kept,
    resampled=np.mean(resampled, axis=0).reshape(num_resamples, num_queries),
    seed=seed,
    measurement=retrained.measurement,
    settings={"method": "retraining"},
  )


def noise_ceiling(
  retrained: Retrained, *, seed: int = 0, num_resamples: int = 1000
) -> NoiseCeiling:
  """The LDS of predicting every subset's mean over infinitely many seeds.

  With r the correlation of two single seeds over subsets, that of the mean of K seeds with as many
  fresh ones is R = K r / (1 + (K − 1) r) (Spearman and Brown), and its correlation with what it
  estimates √R. r is the mean of rank correlations over pairs of seeds and queries. There are two
  approximations. The formulas are of Pearson's correlations, not of ranks (within 0.01 where
  measurements are normal). And √R is concave in r, so that the ceiling is too high where queries
  differ much. Scores are sums over examples: where the effects of removal do not add up, they
  cannot reach the ceiling.

  Args:
    retrained: of K ≥ 2 seeds; K is the harmonic mean over subsets where some lack.
    seed, num_resamples: of the bootstrap.

  Raises:
    ValueError: no two seeds share two subsets.
  """
  kept = retrained.kept
  counts = _subset_counts(retrained, seed, num_resamples)
  found, resampled = [], []
  for one, other in itertools.combinations(range(retrained.values.shape[1]), 2):
    both = retrained.trained[kept][:, [one, other]].all(axis=1)
    if both.sum() >= 2:
      x, y = retrained.values[kept[both]][:, [one, other]].swapaxes(0, 1)
      found.append(statistics.spearman(x, y, axis=0))
      resampled.append(statistics.resampled_spearman(x, y, counts[:, both]))
  if not found:
    raise ValueError("A noise ceiling needs two seeds of at least two subsets. Retrain with more.")
  seeds = 1 / np.mean(1 / retrained.trained[kept].sum(axis=1))
  interval = statistics.subset_interval(np.mean(found, axis=0), np.mean(resampled, axis=0))
  low, mean, high = (_ceiling(float(r), seeds) for r in (interval[0], np.mean(found), interval[1]))
  return NoiseCeiling(mean, (low, high), float(np.mean(found)))


def _ceiling(between_seeds: float, num_seeds: float) -> float:
  """√R of r between seeds; 0 where they don't agree."""
  r = min(max(between_seeds, 0.0), 1.0)
  return float(num_seeds * r / (1 + (num_seeds - 1) * r)) ** 0.5


def _subset_counts(retrained: Retrained, seed: int, num_resamples: int) -> np.ndarray:
  """[B, M] resamples of the subsets that have a model, those of `lds`."""
  shape = len(retrained.kept), retrained.values.shape[2]
  return statistics.resamples(*shape, seed=seed, num_resamples=num_resamples).subsets
