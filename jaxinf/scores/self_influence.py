"""Self-influence of training examples, from products of gradients in different replicates of draws.

s_n = ⟨g_n, (H + λI)⁻¹ g_n⟩ with the expected gradient g_n of example n. Replicate a of the draws
gives g_n + noise_a. Let Z_ab be the product of replicates a and b. The noises of two replicates are
independent, so that the mean over a ≠ b is s_n without bias. The mean over a = b, of squares, is
too large by the noise's own size, which is often many times s_n.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.scores.scores import Ranking
from jaxinf.scores.statistics import jackknife_error, mean_and_error


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence:
  """How much each training example is learned from itself alone.

  s_n / N is by how much the example's own training loss grows where it is left out, to first order.
  Large: nothing else in the training set teaches the example (rare, mislabelled, damaged, or
  memorised). Near 0: others teach it as well. An s_n is not negative, but its estimate may be.

  Attributes:
    values: [N] s_n.
    std_errors: [N] over draws; NaN where there are fewer than 3 replicates.
    ids: [N] of the training examples.
    settings: what they were computed with, as JSON; "biased" says whether the values are means of
      squares of one replicate, which its noise makes too large.
  """

  values: np.ndarray
  std_errors: np.ndarray
  ids: np.ndarray
  settings: Mapping[str, Any]

  @classmethod
  def of_products(
    cls, products: np.ndarray, ids: np.ndarray, settings: Mapping[str, Any]
  ) -> "SelfInfluence":
    """From products [N, 2, A]: Σ over b ≠ a of Z_ab, and Z_aa, of each of A replicates a.

    The standard error is jackknifed: the mean over pairs is made anew without each replicate in
    turn. For such a mean it is too large rather than too small (Efron and Stein 1981).
    """
    crossed, own = np.moveaxis(np.asarray(products, np.float64), 1, 0)
    num = crossed.shape[1]
    settings = {**settings, "biased": num == 1}
    if num == 1:
      values, errors = mean_and_error(own, axis=1)
    else:
      total = crossed.sum(axis=1)
      values, errors = total / (num * (num - 1)), np.full(len(total), np.nan)
      if num > 2:  # without replicate a: both rows of its products are gone
        left_out = (total[:, None] - 2 * crossed) / ((num - 1) * (num - 2))
        errors = jackknife_error(left_out, axis=1)
    return cls(values.astype(np.float32), errors.astype(np.float32), np.asarray(ids), settings)

  def top(self, k: int) -> Ranking:
    """The k examples of the largest self-influence, best first; arrays [k]."""
    if checked_count(k, "k") > len(self.ids):
      raise ValueError(f"k must lie in 1…{len(self.ids)}, the training examples; got {k}.")
    first = np.argsort(-self.values, kind="stable")[:k]
    return Ranking(
      ids=self.ids[first],
      values=self.values[first],
      std_errors=self.std_errors[first],
      model_std_errors=np.full(k, np.nan, np.float32),
      positions=first,
    )

  def __repr__(self) -> str:
    return f"SelfInfluence({len(self.ids)} training examples; λ = {self.settings['damping']:g})"
