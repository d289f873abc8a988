"""Laws of the time t of continuous processes, each by its inverse distribution function.

A law maps a uniform number u in [0, 1) to t. So stratified uniforms give stratified times, in parts
of equal probability. `below` is the distribution function itself, in float64 on the host.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from jaxinf.core.registry import named


@dataclasses.dataclass(frozen=True)
class Uniform:
  """t uniform on [0, 1)."""

  def times(self, u: jax.Array) -> jax.Array:
    return u

  def below(self, t: float) -> float:
    return float(np.clip(t, 0, 1))


@dataclasses.dataclass(frozen=True)
class LogitNormal:
  """t = 1 / (1 + exp(−z)) with z ~ N(mean, std²) (Esser et al. 2024)."""

  mean: float = 0.0
  std: float = 1.0

  def __post_init__(self):
    _check_normal(self)

  def times(self, u: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(_normal(self, u))

  def below(self, t: float) -> float:
    return _normal_below(self, float(special.logit(np.clip(t, 0, 1))))


@dataclasses.dataclass(frozen=True)
class LogNormal:
  """t = exp(z) with z ~ N(mean, std²): the noise levels σ of EDM (Karras et al. 2022)."""

  mean: float = -1.2
  std: float = 1.2

  def __post_init__(self):
    _check_normal(self)

  def times(self, u: jax.Array) -> jax.Array:
    return jnp.exp(_normal(self, u))

  def below(self, t: float) -> float:
    return _normal_below(self, float(np.log(t)) if t > 0 else -np.inf)


Law = Uniform | LogitNormal | LogNormal


def flow_law(time: "str | Law") -> Law:
  """The law of that name, or the law itself; ValueError for one that leaves [0, 1]."""
  law = named(FLOW_LAWS, time, "law of time")() if isinstance(time, str) else time
  if not isinstance(law, Uniform | LogitNormal):
    raise ValueError(f"time must be one of {', '.join(FLOW_LAWS)}, or LogitNormal(…); got {time}.")
  return law


def law_settings(law: Law) -> dict[str, Any]:
  """The law as JSON."""
  names: dict[type, str] = {kind: name for name, kind in FLOW_LAWS.items()}
  return {"name": names[type(law)]} | dataclasses.asdict(law)


def law_of_settings(settings: dict[str, Any]) -> Law:
  """The law whose `law_settings` these are."""
  fields = {k: v for k, v in settings.items() if k != "name"}
  return named(FLOW_LAWS, settings.get("name"), "law of time")(**fields)


def _normal(law: LogitNormal | LogNormal, u: jax.Array) -> jax.Array:
  # Float32 uniforms are multiples of 2⁻²³. Zero stands for the middle of the first part, and a
  # stratified number that rounded to one for that of the last: both stay finite.
  half = np.float32(2.0**-24)
  u = jnp.clip(u, half, 1 - half)
  return law.mean + law.std * jax.scipy.special.ndtri(u)


def _normal_below(law: LogitNormal | LogNormal, z: float) -> float:
  return float(special.ndtr((z - law.mean) / law.std))


def _check_normal(law: LogitNormal | LogNormal) -> None:
  if not (np.isfinite(law.mean) and np.isfinite(law.std) and law.std > 0):
    raise ValueError(f"A law of time needs a finite mean and a positive, finite std; got {law}.")


FLOW_LAWS: dict[str, type[Uniform] | type[LogitNormal]] = {
  "uniform": Uniform,
  "logit_normal": LogitNormal,
}
