"""Counts, seeds and dampings as they come from users."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def checked_count(value: Any, name: str, least: int = 1) -> int:
  """A whole number of at least `least` as an int; ValueError that calls it `name` otherwise."""
  number = _whole(value)
  if number is None:
    raise ValueError(f"{name} must be a whole number; got {value!r}.")
  if number < least:
    raise ValueError(f"{name} must be at least {least}; got {number}.")
  return number


def checked_seed(value: Any, name: str = "seed") -> int:
  """A seed in [0, 2³²) as an int; ValueError otherwise.

  Random keys hold 32 bits of a seed: larger ones would repeat the draws of smaller ones.
  """
  number = _whole(value)
  if number is None or not 0 <= number < 2**32:
    raise ValueError(f"{name} must be a whole number in [0, 2**32); got {value!r}.")
  return number


def checked_damping(damping: float) -> None:
  """Raises ValueError unless λ > 0."""
  if not damping > 0:
    raise ValueError(f"damping must be positive (the curvature is singular); got {damping}.")


def checked_dampings(dampings: Sequence[float]) -> tuple[float, ...]:
  """Several dampings as floats; ValueError unless there are any, all positive and different."""
  if np.ndim(dampings) != 1 or not np.size(dampings):
    raise ValueError(f"dampings must be a non-empty sequence of numbers; got {dampings!r}.")
  found = tuple(map(float, dampings))
  for value in found:
    checked_damping(value)
  if len(set(found)) < len(found):
    raise ValueError(f"Each damping must be given once; got {list(found)}.")
  return found


def _whole(value: Any) -> int | None:
  """The value as an int, where it is a whole number and no boolean."""
  if isinstance(value, bool | np.bool_):
    return None
  try:
    return operator.index(value)
  except TypeError:
    return None
