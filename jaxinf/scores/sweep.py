"""Scores of the same queries and training examples at several dampings λ."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxinf.core.damping import Damping, RelativeDamping, number_of
from jaxinf.scores.scores import Scores

# Settings that differ between the dampings of a sweep.
OWN = ("damping", "check", "solves", "layer_weights", "temperature")


class Sweep(tuple[Scores, ...]):
  """A tuple of L ≥ 1 scores that differ in damping only, in the order in which they were given.

  A method that has no damping gives a sweep of one.

  Args:
    members: the scores; another sweep too.

  Raises:
    ValueError: there are none, a damping comes twice or is missing, or the scores have other ids,
      replicates of draws or settings (but those of OWN, which are each damping's own).
  """

  __slots__ = ()

  def __new__(cls, members: Iterable[Scores]) -> "Sweep":
    sweep = super().__new__(cls, members)
    if not sweep or not all(isinstance(scores, Scores) for scores in sweep):
      raise ValueError(
        f"A sweep is made of Scores, one or more; got {[type(x).__name__ for x in sweep]}."
      )
    if len(sweep) > 1 and not all("damping" in scores.settings for scores in sweep):
      raise ValueError('Scores of a sweep need settings["damping"]; pass what influence returns.')
    if len(np.unique(sweep.dampings)) < len(sweep):
      raise ValueError(f"A sweep has each damping once; got {sweep.dampings.tolist()}.")
    for scores in sweep[1:]:
      _check_alike(scores, sweep[0])
    return sweep

  @classmethod
  def of_parts(cls, sweeps: Sequence["Sweep"]) -> "Sweep":
    """The sweep of all queries, from sweeps of parts of them, in order."""
    return cls(map(_of_parts, zip(*sweeps, strict=True)))

  @property
  def dampings(self) -> np.ndarray:
    """[L] the λ, or ρ, of the members; NaN of one whose method has none."""
    return np.array([scores.settings.get("damping", np.nan) for scores in self], float)

  @property
  def is_relative(self) -> bool:
    """Whether its dampings are relative to the layers."""
    return "damping_kind" in self[0].settings

  def at(self, damping: Damping) -> Scores:
    """The scores at one damping, to a relative 1e-6; ValueError where there are none.

    A number is one of `dampings`, of whichever kind they are.
    """
    found = np.flatnonzero(np.isclose(self.dampings, number_of(damping), rtol=1e-6, atol=0))
    if not len(found) or (isinstance(damping, RelativeDamping) and not self.is_relative):
      there = ", ".join(f"{x:g}" for x in self.dampings)
      raise ValueError(f"There are no scores at the damping {damping!r}; the sweep has: {there}.")
    return self[found[0]]

  def ascending(self) -> "Sweep":
    """The same scores in ascending order of damping."""
    return Sweep(self[place] for place in np.argsort(self.dampings))

  def __repr__(self) -> str:
    dampings = ", ".join(f"{x:g}" for x in self.dampings)
    return f"Sweep({'ρ' if self.is_relative else 'λ'} = {dampings}; {self[0].size()})"


def _of_parts(parts: Sequence[Scores]) -> Scores:
  """The scores of all queries, from those of parts of them."""
  if len(parts) == 1:
    return parts[0]
  names = ("replicate_values", "query_replicate_values", "model_values")
  joined: dict[str, Any] = {
    name: np.concatenate([getattr(part, name) for part in parts], axis=1)
    for name in names
    if getattr(parts[0], name) is not None
  }
  solves = [part.settings["solves"] for part in parts if "solves" in part.settings]
  of_all = {name: [x for each in solves for x in each[name]] for name in (solves or [{}])[0]}
  settings = {**parts[0].settings, **({"solves": of_all} if solves else {})}
  query_ids = np.concatenate([part.query_ids for part in parts])
  return dataclasses.replace(parts[0], query_ids=query_ids, settings=settings, **joined)


def shared_settings(scores: Scores) -> dict[str, Any]:
  """The settings that scores of a sweep have in common."""
  return {name: value for name, value in scores.settings.items() if name not in OWN}


def _check_alike(scores: Scores, first: Scores) -> None:
  same = {
    "query ids": np.array_equal(scores.query_ids, first.query_ids),
    "training ids": np.array_equal(scores.train_ids, first.train_ids),
    "replicates of draws or models": _shapes(scores) == _shapes(first),
    "settings": shared_settings(scores) == shared_settings(first),
  }
  if not all(same.values()):
    raise ValueError(
      f"Scores of a sweep may differ in damping only; those at {scores.settings['damping']:g} "
      f"have other {', '.join(name for name, alike in same.items() if not alike)} than those at "
      f"{first.settings['damping']:g}. Score all dampings in one call."
    )


def _shapes(scores: Scores) -> list[tuple[int, ...] | None]:
  every = scores.replicate_values, scores.query_replicate_values, scores.model_values
  return [None if values is None else values.shape for values in every]
