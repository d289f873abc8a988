"""How many draws: a fixed number, or rounds of them until the top of the order is stable."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from jaxinf.scores.scores import Scores
from jaxinf.scores.stability import top_overlap

_LOG = logging.getLogger("jaxinf")


@dataclasses.dataclass(frozen=True)
class AutoDraws:
  """Rounds of draws that stop when two halves of them agree on the top of the queries' orders.

  The halves have half of the draws each, so that all draws together agree better than they do with
  fresh ones.

  Attributes:
    top_k: how far down the order is to be stable; of N / 2 examples at most.
    agreement: share of the top k that the halves have in common, a mean over queries; in (0, 1].
    num_groups: groups of draws in a round, at least 2.
    group_size: draws in a group; few leave little to stratify.
    max_draws: for each training image, after which it stops all the same, and says so.

  Raises:
    ValueError: a number is out of range.
  """

  top_k: int = 10
  agreement: float = 0.8
  num_groups: int = 4
  group_size: int = 8
  max_draws: int = 1024

  def __post_init__(self):
    if not 0 < self.agreement <= 1:
      raise ValueError(f"agreement must lie in (0, 1]; got {self.agreement}.")
    for name, least in (("top_k", 1), ("num_groups", 2), ("group_size", 1), ("max_draws", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class DrawPlan:
  """How the draws of training images and queries are split into groups.

  Attributes:
    group_size: draws of a training image in a group.
    draw_groups: groups in a round.
    query_draws: draws of a query.
    query_groups: groups these are split into.
    auto: when to stop; None for one round.
  """

  group_size: int
  draw_groups: int
  query_draws: int
  query_groups: int
  auto: AutoDraws | None


def merged_rounds(
  scored_round: Callable[[int], np.ndarray],
  scores_of: Callable[[np.ndarray, int], tuple[Scores, ...]],
  plan: DrawPlan,
) -> tuple[np.ndarray, int]:
  """Scores one round after another; group g of the result is the mean of all rounds' groups g.

  Args:
    scored_round: number of a round → its scores, any array.
    scores_of: (mean of the rounds, draws of an image in them) → Scores of each damping.
    plan: of the rounds.

  Returns:
    The mean, and the draws of each training image in it.
  """
  a_round = plan.draw_groups * plan.group_size
  total = np.asarray(scored_round(0))
  if plan.auto is None:
    return total, a_round
  rounds, auto = 1, plan.auto
  while True:
    mean, draws = total / rounds, rounds * a_round
    found = scores_of(mean, draws)
    k = min(auto.top_k, max(1, len(found[0].train_ids) // 2))
    overlap = min(float(top_overlap(scores, k).mean()) for scores in found)
    enough, last = overlap >= auto.agreement, draws + a_round > auto.max_draws
    _LOG.info(
      "attribute: after %d draws, halves of them share %.0f %% of the top %d%s", draws,
      100 * overlap, k, "" if enough or not last else f": stopped short of {auto.agreement:.0%}",
    )  # fmt: skip
    if last and not enough and min(_without_queries(found, k)) >= auto.agreement:
      _LOG.info("attribute: what is missing are draws of the queries: raise query_draws")
    if enough or last:
      return mean, draws
    total = total + scored_round(rounds)
    rounds += 1


def _without_queries(found: Sequence[Scores], k: int) -> list[float]:
  """The overlaps of halves of the training draws alone."""
  alone = [dataclasses.replace(scores, query_group_values=None) for scores in found]
  return [float(top_overlap(scores, k).mean()) for scores in alone]
