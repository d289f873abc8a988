"""Damping: one λ for all layers, or for each layer a share of its mean eigenvalue.

Settings of scores say it as a number, "damping"; where that is a share, "damping_kind" says so.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxinf.core.registry import named
from jaxinf.core.types import Array

_FLOOR = float(np.finfo(np.float32).tiny)  # of λ where a layer has no curvature: it can be inverted


@dataclasses.dataclass(frozen=True)
class RelativeDamping:
  """λ_l = ρ · mean(Λ_l), for each layer l its own, with Λ_l its eigenvalues.

  The eigenvalues of layers differ by orders of magnitude: one λ for all damps some layers away and
  leaves others as they are. A layer whose gradients are all zero has λ_l > 0 as well.

  Attributes:
    rho: ρ > 0, without a unit.

  Raises:
    ValueError: ρ is not a positive, finite number.
  """

  rho: float

  def __post_init__(self):
    if not isinstance(self.rho, numbers.Real) or not 0 < self.rho < math.inf:
      raise ValueError(f"rho must be a positive, finite number; got {self.rho!r}.")
    object.__setattr__(self, "rho", float(self.rho))


Damping = float | RelativeDamping


def damping_named(kind: str, value: float) -> Damping:
  """Of a kind of `DAMPINGS`; an unknown one is a ValueError that lists them."""
  return named(DAMPINGS, kind, "kind of damping")(value)


def number_of(damping: Damping) -> float:
  """λ, or ρ of a relative damping."""
  return damping.rho if isinstance(damping, RelativeDamping) else damping


def symbol_of(damping: Damping) -> str:
  """What its number is called: λ or ρ."""
  return "ρ" if isinstance(damping, RelativeDamping) else "λ"


def of_layer(damping: Damping, eigenvalues: Array) -> float:
  """λ of the layer with these eigenvalues [(groups,) d_out, d_in]."""
  if not isinstance(damping, RelativeDamping):
    return damping
  return max(damping.rho * float(np.asarray(eigenvalues, np.float64).mean()), _FLOOR)


def kind_settings(damping: Damping) -> dict[str, Any]:
  """{"damping_kind": "relative"} of a relative damping, and nothing of a λ."""
  return {"damping_kind": "relative"} if isinstance(damping, RelativeDamping) else {}


def damping_settings(damping: Damping) -> dict[str, Any]:
  """A damping as JSON, which `damping_of` understands."""
  return {"damping": number_of(damping), **kind_settings(damping)}


def damping_of(settings: Mapping[str, Any]) -> Damping:
  """The damping that settings of scores name."""
  return damping_named(settings.get("damping_kind", "absolute"), settings["damping"])


DAMPINGS: dict[str, Callable[[float], Damping]] = {"absolute": float, "relative": RelativeDamping}
