"""Methods, and dampings of one method, side by side by their linear datamodelling scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinf.data.subsets import Subsets
from jaxinf.evaluation.lds import (
  LDS,
  Retrained,
  lds,
  p_text,
  percent_range,
  predicted_and_measured,
)
from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import mean_and_error, spearman
from jaxinf.scores.sweep import Sweep


@dataclasses.dataclass(frozen=True, eq=False)
class DampingLDS:
  """LDS of one method at L dampings; see `damping_lds`.

  Attributes:
    dampings: [L] λ in ascending order.
    per_query: [L, Q] rank correlations over subsets.
    default_damping: the one of them that was chosen without the benchmark.
    default: LDS there: what a user without retrained models can have.
    best_on_benchmark: the highest LDS: its damping is picked on the very numbers that are reported.
  """

  dampings: np.ndarray
  per_query: np.ndarray
  default_damping: float
  default: LDS
  best_on_benchmark: LDS

  @property
  def means(self) -> np.ndarray:
    """[L] means over queries."""
    return self.per_query.mean(axis=1)

  @property
  def std_errors(self) -> np.ndarray:
    """[L] std(ddof=1) / √Q over queries; NaN for one."""
    return mean_and_error(self.per_query)[1]

  @property
  def best_damping(self) -> float:
    """The damping picked on the benchmark."""
    return float(self.dampings[self.means.argmax()])

  def table(self) -> str:
    """A row a damping, with what marks the default and the best on the benchmark."""
    lines = [f"{'damping':>10}{'LDS (%)':>14}"]
    rows = zip(self.dampings.tolist(), self.means, self.std_errors, strict=True)
    for damping, mean, error in rows:
      marks = ("default",) * (damping == self.default_damping)
      marks += ("best on benchmark",) * (damping == self.best_damping)
      mark = f"  ← {', '.join(marks)}" if marks else ""
      lines.append(f"{damping:>10.3g}{_score(mean, error):>14}{mark}")
    return "\n".join(lines)


def damping_lds(
  sweep: Sequence[Scores],
  subsets: Subsets,
  retrained: Retrained,
  *,
  default: float,
  negative_weight: float = 1.0,
  seed: int = 0,
  num_resamples: int = 1000,
) -> DampingLDS:
  """The LDS at every damping of a sweep; bootstrap intervals at the default and the best alone.

  Args:
    sweep: scores at several dampings.
    default: one of these dampings, chosen without looking at the benchmark.
    subsets, retrained, negative_weight, seed, num_resamples: as of `lds`.

  Raises:
    ValueError: the default is none of the dampings, the scores are no `Sweep`, or as of `lds`.
  """
  sweep = Sweep(sweep).ascending()
  place = list(sweep).index(sweep.at(default))
  pair = lambda scores: predicted_and_measured(scores, subsets, retrained, negative_weight)
  per_query = np.stack([spearman(*pair(scores), axis=0) for scores in sweep])
  best = int(per_query.mean(axis=1).argmax())
  options: dict[str, Any] = dict(
    negative_weight=negative_weight, seed=seed, num_resamples=num_resamples
  )
  whole = {i: lds(sweep[i], subsets, retrained, **options) for i in {place, best}}
  chosen = float(sweep.dampings[place])
  return DampingLDS(sweep.dampings, per_query, chosen, whole[place], whole[best])


def compare(ldses: Mapping[str, LDS], *, against: str | None = None) -> str:
  """Methods side by side as aligned text, in %.

  A row has the LDS ± its standard error over queries, its 95 % intervals over subsets and over
  subsets and queries, and the p-value of `LDS.against` the method `against`.

  Args:
    ldses: LDS by name of the method, all of the same queries, subsets and resamples.
    against: one of the names; None: that of the highest LDS, which is then chosen by the same
      numbers it is tested with, so that p-values are too small. No p-value is corrected for the
      number of rows.
  """
  if not all(isinstance(found, LDS) for found in ldses.values()):
    raise ValueError("compare takes LDS by name: compare({name: jaxinf.lds(scores, …), …}).")
  if not ldses or (against is not None and against not in ldses):
    raise ValueError(f"Expected one of the methods {', '.join(ldses) or '(none)'}; got {against}.")
  reference = max(ldses, key=lambda name: ldses[name].mean) if against is None else against
  width = max(len("method"), *map(len, ldses))
  head = f"{'method':<{width}}{'LDS (%)':>14}{'over subsets':>18}{'and queries':>18}"
  lines = [f"{head}  p against {reference}"]
  for name, found in ldses.items():
    cell = p_text(None if name == reference else found.against(ldses[reference]).p_value)
    intervals = (f"{percent_range(x):>18}" for x in (found.interval, found.interval_both))
    lines.append(
      f"{name:<{width}}{_score(found.mean, found.std_error):>14}{''.join(intervals)}  {cell}"
    )
  return "\n".join(lines)


def _score(mean: float, error: float) -> str:
  return f"{100 * mean:.1f} ± {100 * error:.1f}"
