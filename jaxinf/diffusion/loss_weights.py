"""Weights w_t of a process's training loss, w_t · (mean squared error of what is predicted).

With SNR_t = a_t² / b_t² of x_t = a_t x_0 + b_t ε:

  a number   w_t = w;
  MinSNR(γ)  min(SNR_t, γ) times the squared error of x̂_0 (Hang et al. 2023): so w_t is
             min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v, and min(SNR, γ) for x_0;
  P2(k, γ)   (k + SNR_t)^−γ, a factor of whatever is predicted (Choi et al. 2022);
  Table(w)   any w [T] of a discrete process.

Each is a small value that can be compared and hashed, so that compiled kernels can be shared.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.registry import named


@dataclasses.dataclass(frozen=True)
class Constant:
  """w_t = value."""

  value: float

  def __post_init__(self):
    if not (np.isfinite(self.value) and self.value > 0):
      raise ValueError(f"A constant loss weight must be positive and finite; got {self.value}.")

  def of(self, a: Any, b: Any, determinant: Any) -> Any:
    del a, b, determinant
    return self.value


@dataclasses.dataclass(frozen=True)
class MinSNR:
  """w_t such that the squared error of x̂_0 counts min(SNR_t, gamma)."""

  gamma: float = 5.0

  def __post_init__(self):
    if not (np.isfinite(self.gamma) and self.gamma > 0):
      raise ValueError(f"gamma of min_snr must be positive and finite; got {self.gamma}.")

  def of(self, a: Any, b: Any, determinant: Any) -> Any:
    # The squared error of x̂_0 is (b / determinant)² times that of the output.
    return _minimum(a**2, self.gamma * b**2) / determinant**2


@dataclasses.dataclass(frozen=True)
class P2:
  """w_t = (k + SNR_t)^−gamma."""

  k: float = 1.0
  gamma: float = 1.0

  def __post_init__(self):
    if not (np.isfinite([self.k, self.gamma]).all() and self.k > 0 and self.gamma >= 0):
      raise ValueError(f"p2 needs k > 0 and gamma ≥ 0; got k={self.k}, gamma={self.gamma}.")

  def of(self, a: Any, b: Any, determinant: Any) -> Any:
    del determinant
    return (b**2 / (self.k * b**2 + a**2)) ** self.gamma


@dataclasses.dataclass(frozen=True)
class Table:
  """w_t = values[t]."""

  values: tuple[float, ...]

  def __post_init__(self):
    object.__setattr__(self, "values", tuple(np.asarray(self.values, np.float64).tolist()))
    table = np.array(self.values)
    if table.ndim != 1 or not (np.isfinite(table) & (table >= 0)).all() or not table.any():
      raise ValueError(
        "A table of loss weights must be a vector [T] of finite numbers that are not negative, and "
        "not all of them 0."
      )

  def of(self, a: Any, b: Any, determinant: Any) -> Any:
    del a, b, determinant
    return np.array(self.values)


Weight = Constant | MinSNR | P2 | Table


def weight_of(weight: Any) -> Weight | None:
  """The weight that a number, a name of WEIGHTS, a vector [T] or a weight itself stands for."""
  if weight is None or isinstance(weight, Weight):
    return weight
  if isinstance(weight, str):
    return named(WEIGHTS, weight, "loss weight")()
  if np.ndim(weight) == 0:
    return Constant(float(weight))
  return Table(weight)


def weight_settings(weight: Weight | None) -> dict[str, Any] | None:
  """The weight as JSON."""
  if weight is None:
    return None
  names = {kind: name for name, kind in _KINDS.items()}
  return {"name": names[type(weight)]} | dataclasses.asdict(weight)


def weight_of_settings(settings: Mapping[str, Any] | None) -> Weight | None:
  """The weight whose `weight_settings` these are."""
  if settings is None:
    return None
  fields = {k: v for k, v in settings.items() if k != "name"}
  return named(_KINDS, settings.get("name"), "loss weight")(**fields)


def _minimum(first: Any, second: Any) -> Any:
  """The smaller of two arrays: float64 on the host, JAX's where a process is continuous."""
  return (jnp if isinstance(first, jax.Array) else np).minimum(first, second)


WEIGHTS: dict[str, type[MinSNR] | type[P2]] = {"min_snr": MinSNR, "p2": P2}
_KINDS: dict[str, type[Any]] = {**WEIGHTS, "constant": Constant, "table": Table}
