"""Rounds of draws: one of a fixed number, or more until the top of the order is stable."""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from jaxinf.core.draws import Draws, Stopping
from jaxinf.scores.stability import top_overlap
from jaxinf.scores.sweep import Sweep

_LOG = logging.getLogger("jaxinf")


def merged_rounds(
  scored_round: Callable[[int], np.ndarray],
  sweep_of: Callable[[np.ndarray, int], Sweep],
  draws: Draws,
) -> Sweep:
  """Scores one round after another; replicate g of the result is the mean of the rounds' g-th.

  Args:
    scored_round: number of a round → its scores, any array.
    sweep_of: (mean of the rounds, draws of an example in them) → scores at each damping.
    draws: of a round, with the rule that says when rounds are enough.
  """
  return sweep_of(*mean_of_rounds(scored_round, sweep_of, draws))


def mean_of_rounds(
  scored_round: Callable[[int], np.ndarray],
  sweep_of: Callable[[np.ndarray, int], Sweep],
  draws: Draws,
) -> tuple[np.ndarray, int]:
  """The mean of as many rounds as are enough, and the draws of an example in them.

  Args: as of `merged_rounds`; the sweep is what tells whether rounds are enough.
  """
  total, rounds = np.asarray(scored_round(0)), 1
  while True:
    mean, num = total / rounds, rounds * draws.num
    if draws.stop is None or _is_enough(sweep_of(mean, num), num, draws, draws.stop):
      return mean, num
    total = total + scored_round(rounds)
    rounds += 1


def _is_enough(found: Sweep, num: int, draws: Draws, stop: Stopping) -> bool:
  """Whether halves of the draws agree, or there may be no more; says so."""
  k = min(stop.top_k, max(1, len(found[0].train_ids) // 2))
  overlap = _overlap(found, k)
  enough, last = overlap >= stop.agreement, num + draws.num > stop.most
  _LOG.info(
    "attribute: after %d draws, halves of them share %.0f %% of the top %d%s",
    num,
    100 * overlap,
    k,
    "" if enough or not last else f": stopped short of {stop.agreement:.0%}",
  )
  if last and not enough:
    alone = Sweep(tuple(dataclasses.replace(s, query_replicate_values=None) for s in found))
    if _overlap(alone, k) >= stop.agreement:
      _LOG.info("attribute: what is missing are draws of the queries: raise query_draws")
  return enough or last


def _overlap(sweep: Sweep, k: int) -> float:
  """The least mean overlap over dampings."""
  return min(float(top_overlap(scores, k).mean()) for scores in sweep)
