"""Counts, seeds and dampings as they come from users."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinf.core.damping import Damping, RelativeDamping


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


def checked_damping(damping: Damping) -> float:
  """The damping, which must be a number λ > 0; ValueError otherwise."""
  if isinstance(damping, RelativeDamping):
    raise ValueError(
      f"damping must be a number here; got {damping}. That is relative to the eigenvalues of a "
      "layer, which KFAC, EKFAC, Shampoo, Diagonal and Identity have, but neither the exact GGN "
      "nor TRAK and its kin."
    )
  if not damping > 0:
    raise ValueError(f"damping must be positive (the curvature is singular); got {damping}.")
  return damping


def checked_dampings(dampings: Sequence[float]) -> tuple[float, ...]:
  """Several λ as floats; ValueError unless there are any, all positive and different."""
  return tuple(map(checked_damping, _several(dampings)))


def checked_layer_dampings(dampings: Sequence[Damping]) -> tuple[Damping, ...]:
  """The same, or several RelativeDamping where there are layers to be relative to; not both."""
  found = _several(dampings)
  num_relative = sum(isinstance(value, RelativeDamping) for value in found)
  if num_relative == 0:
    return tuple(map(checked_damping, found))
  if num_relative < len(found):
    raise ValueError(
      f"dampings must be all numbers or all RelativeDamping, to be compared; got {list(found)}. "
      "Score each kind in a call of its own."
    )
  return found


def _several(dampings: Sequence[Damping]) -> tuple[Damping, ...]:
  """Numbers as floats; ValueError where there are none or one comes twice."""
  if np.ndim(dampings) != 1 or not np.size(dampings):  # type: ignore[arg-type]
    raise ValueError(f"dampings must be a non-empty sequence of numbers; got {dampings!r}.")
  found = tuple(x if isinstance(x, RelativeDamping) else float(x) for x in dampings)
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
