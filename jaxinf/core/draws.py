"""Draws of (t, ε): how many, in how many independent replicates, by which design.

A gradient or a loss is a mean over draws. They come in replicates of equal size. One replicate is
one complete design: its draws together have t by the process's law and ε standard normal, however
they depend on each other. So replicates are independent of each other, and their spread is the
noise of the mean. diffusion/noise.py makes the draws.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.core.checks import checked_count, checked_seed
from jaxinf.core.registry import named

TIMESTEPS = {
  "stratified": "draw s of S lies in the s-th of S equally probable parts of the times",
  "uniform": "each draw's time is independent (the paper)",
}

# Replicates at most, where none are asked for. A standard error from n of them is itself right to
# 1 / √(2 (n − 1)): a third, of 5. Replicates of queries have rows in memory, so that there are 2.
_TRAIN_REPLICATES, _QUERY_REPLICATES = 5, 2


@dataclasses.dataclass(frozen=True)
class Stopping:
  """When rounds of draws are enough: halves of them agree on the top of the order.

  Each half has half of the draws. Therefore all draws together agree better with fresh ones than
  the halves do with each other.

  Attributes:
    top_k: how far down the order is to be stable; at most half of the training examples count.
    agreement: share of the top k that the halves have in common, a mean over queries, in (0, 1].
    most: draws of a training example after which it stops all the same, and says so.
  """

  top_k: int = 10
  agreement: float = 0.8
  most: int = 1024

  def __post_init__(self):
    if not 0 < self.agreement <= 1:
      raise ValueError(f"agreement must lie in (0, 1]; got {self.agreement}.")
    for name in ("top_k", "most"):
      object.__setattr__(self, name, checked_count(getattr(self, name), name))


@dataclasses.dataclass(frozen=True)
class Draws:
  """Draws of (t, ε) of every example.

  Attributes:
    num: draws of an example.
    replicates: independent complete designs that these are split into, whose spread gives standard
      errors; divides num. None: as many as leave whole antithetic pairs, or else as many as divide
      num, up to 5 for training examples and up to 2 for queries, whose replicates take memory.
    timesteps: "stratified" (draw s of a replicate lies in the s-th part of the times) or "uniform"
      (independent, the paper).
    antithetic: draws come in pairs (t, ε) and (t, −ε), which share a part of the times; the last of
      an odd number stands alone.
    shared: all examples have the same draws (common random numbers). Their scores are then compared
      on equal terms, but a sum of scores over examples is no less noisy than its terms. Otherwise
      each example has its own draws.
    seed: of the draws, in [0, 2³²).
    loss_power: p in [0, 1], by which draws count in a gradient: each one's loss ℓ has the weight
      ℓ^(p − 1), so that the few draws with much noise left to guess do not drown the others. The
      weights of a replicate are scaled such that its mean loss stays what it is. 1: all count
      alike; ½: as in the gradient of √ℓ; 0: of log ℓ. None: the default of what draws are for, 1
      but for training gradients of influence.
    stop: when rounds of `num` draws are enough; None for one round. See `until_stable`.

  The default design orders scikit-learn's digits better than any other with as many draws;
  `make bench-draws` has the figures.

  Raises:
    ValueError: a field is out of range, or num does not split into the replicates.

  Examples:
    >>> draws = Draws(250, replicates=5)
    >>> draws.size
    50
    >>> draws.of_queries(None).replicates  # of as many draws for a query
    2
    >>> Draws(250, replicates=4)
    Traceback (most recent call last):
      ...
    ValueError: 250 draws do not split into 4 equal replicates; ...
  """

  num: int = 250
  replicates: int | None = None
  timesteps: str = "stratified"
  antithetic: bool = True
  shared: bool = True
  seed: int = 0
  stop: Stopping | None = None
  loss_power: float | None = None

  def __post_init__(self):
    set_field = lambda name, value: object.__setattr__(self, name, value)
    set_field("num", checked_count(self.num, "the number of draws"))
    set_field("seed", checked_seed(self.seed))
    named(TIMESTEPS, self.timesteps, "timesteps")
    if self.loss_power is not None and not 0 <= self.loss_power <= 1:
      raise ValueError(
        f"loss_power must lie in [0, 1]: 1 for the loss itself, 0 for its logarithm; got "
        f"{self.loss_power}."
      )
    if self.replicates is not None:
      set_field("replicates", checked_count(self.replicates, "replicates"))
      if self.num % self.replicates:
        divisors = [g for g in range(1, self.num + 1) if self.num % g == 0][:8]
        raise ValueError(
          f"{self.num} draws do not split into {self.replicates} equal replicates; replicates must "
          f"divide the number of draws (as {', '.join(map(str, divisors))} do)."
        )
    if self.stop is not None and self.num > self.stop.most:
      raise ValueError(
        f"A round has {self.num} draws, more than the most, {self.stop.most}: allow more draws, or "
        "take fewer or smaller replicates."
      )

  @classmethod
  def until_stable(
    cls,
    *,
    top_k: int = 10,
    agreement: float = 0.8,
    most: int = 1024,
    replicates: int = 4,
    size: int = 8,
    seed: int = 0,
  ) -> "Draws":
    """Rounds of replicates · size draws, until the top of the queries' orders is stable.

    Args:
      top_k, agreement, most: see `Stopping`.
      replicates: in a round, at least 2, because halves of them are compared; 4 have three splits.
      size: draws in a replicate. They are spread over as many parts of the times, and antithetic
        pairs over half as many, so that fewer draws are less even.
      seed: of the draws.
    """
    checked_count(replicates, "replicates", 2)
    stop = Stopping(top_k, agreement, most)
    return cls(replicates * checked_count(size, "size"), replicates, seed=seed, stop=stop)

  @property
  def size(self) -> int:
    """Draws in a replicate, where the replicates are known."""
    assert self.replicates is not None, "split() or of_queries() fills the replicates in"
    return self.num // self.replicates

  def split(self, most: int = _TRAIN_REPLICATES) -> "Draws":
    """With the replicates filled in, at most so many, where none are asked for."""
    if self.replicates is not None:
      return self
    even = lambda groups: self.num // groups % 2 == 0
    splits = [groups for groups in range(1, most + 1) if self.num % groups == 0]
    best = max(splits, key=lambda groups: (groups > 1, even(groups), groups))
    return dataclasses.replace(self, replicates=best)

  def of_queries(self, asked: "Draws | None") -> "Draws":
    """The draws of queries: those asked for, or as many by the same design, in one round.

    A query is scored by all rounds of training draws, so that its own draws are taken once, before
    the number of rounds is known. Where these draws go on until they are stable, a query has 256:
    as many as eight rounds of `until_stable` by default.
    """
    if asked is not None and asked.stop is not None:
      raise ValueError("Draws of queries are taken once: give query_draws a fixed number of draws.")
    if asked is None:
      num = self.num if self.stop is None else 256
      asked = dataclasses.replace(self, num=num, replicates=None, stop=None, loss_power=None)
    return asked.split(_QUERY_REPLICATES)

  def numbers(self, ids: jax.Array) -> jax.Array:
    """Example numbers [B] that the keys of examples `ids` [B] are made from."""
    return jnp.zeros_like(ids) if self.shared else ids

  @property
  def power(self) -> float:
    """The loss_power, 1 where none is given."""
    return 1.0 if self.loss_power is None else float(self.loss_power)

  def of_power(self, default: float) -> "Draws":
    """With loss_power filled in where none is given."""
    return self if self.loss_power is not None else dataclasses.replace(self, loss_power=default)

  def check_plain(self, what: str) -> None:
    """Raises ValueError where a loss_power is given to what weights no draws."""
    if self.power != 1:
      raise ValueError(
        f"{what} is of the loss itself: give its draws no loss_power; got {self.loss_power}."
      )

  @property
  def design(self) -> dict[str, Any]:
    """How the draws of a replicate depend on each other, as JSON."""
    return {name: getattr(self, name) for name in ("timesteps", "antithetic", "shared")}

  def settings(self, asked: "Draws") -> dict[str, Any]:
    """How training examples and queries, `asked`, are drawn, as JSON."""
    return {
      "draws": self.num,
      "replicates": self.replicates,
      "query_draws": asked.num,
      "query_replicates": asked.replicates,
      "seed": self.seed,
      "query_seed": asked.seed,
      "design": self.design,
      "query_design": asked.design,
      "loss_power": self.power,
      "query_loss_power": asked.power,
    }


# The paper's design: every draw by itself, each example's own.
INDEPENDENT = Draws(1, timesteps="uniform", antithetic=False, shared=False)
