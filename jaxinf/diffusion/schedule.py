"""Noise schedules of discrete forward processes (paper, Section 2.1 and Appendix A).

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), with ᾱ_t = Π_{s≤t} (1 − β_s) and 0-based t: the paper's
index t is one more.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxinf.core.checks import checked_count
from jaxinf.core.registry import named


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Schedule:
  """The variances of a discrete diffusion process; made by the constructors below.

  Schedules are equal where their float64 tables are. Tables are NumPy's and read-only: a function
  that closes over a schedule may be compiled. Under `jit`, index `jnp.asarray(schedule.signal)`.

  Attributes:
    exact_betas: β [T] float64, the variance added in each step.
    exact_alpha_bars: ᾱ [T] float64, the share of the data's variance left after each step.
    settings: how it was made, as JSON for `from_settings`.

  Examples:
    >>> schedule = Schedule.linear(1000, 1e-4, 0.02)
    >>> schedule
    Schedule.linear(num_steps=1000, beta_start=0.0001, beta_end=0.02)
    >>> [round(float(schedule.exact_alpha_bars[t]), 3) for t in (0, 250, 500)]
    [1.0, 0.521, 0.078]
    >>> schedule.with_zero_terminal_snr().has_zero_terminal_snr
    True
  """

  exact_betas: np.ndarray
  exact_alpha_bars: np.ndarray
  settings: Mapping[str, Any]

  @property
  def num_steps(self) -> int:
    """T, the number of timesteps."""
    return len(self.exact_betas)

  @property
  def has_zero_terminal_snr(self) -> bool:
    """Whether the last step leaves nothing of the data: ᾱ_{T−1} = 0."""
    return bool(self.exact_alpha_bars[-1] == 0)

  @functools.cached_property
  def betas(self) -> np.ndarray:
    """β [T] float32."""
    return _frozen(self.exact_betas, np.float32)

  @functools.cached_property
  def alpha_bars(self) -> np.ndarray:
    """ᾱ [T] float32."""
    return _frozen(self.exact_alpha_bars, np.float32)

  @functools.cached_property
  def signal(self) -> np.ndarray:
    """√ᾱ [T] float32."""
    return _frozen(np.sqrt(self.exact_alpha_bars), np.float32)

  @functools.cached_property
  def noise(self) -> np.ndarray:
    """√(1 − ᾱ) [T] float32."""
    return _frozen(np.sqrt(1 - self.exact_alpha_bars), np.float32)

  @classmethod
  def linear(cls, num_steps: int, beta_start: float, beta_end: float) -> "Schedule":
    """β rises linearly from beta_start to beta_end (DDPM: 1000, 1e-4, 0.02)."""
    num_steps = checked_count(num_steps, "num_steps")
    betas = np.linspace(beta_start, beta_end, num_steps)
    return _of_betas(betas, _recipe("linear", num_steps, beta_start, beta_end))

  @classmethod
  def scaled_linear(cls, num_steps: int, beta_start: float, beta_end: float) -> "Schedule":
    """√β rises linearly (latent diffusion: 1000, 8.5e-4, 0.012)."""
    num_steps = checked_count(num_steps, "num_steps")
    betas = np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_steps) ** 2
    return _of_betas(betas, _recipe("scaled_linear", num_steps, beta_start, beta_end))

  @classmethod
  def cosine(cls, num_steps: int, max_beta: float = 0.999) -> "Schedule":
    """ᾱ falls as cos²((t/T + 0.008) / 1.008 · π/2), with β at most max_beta.

    (Nichol and Dhariwal 2021; squaredcos_cap_v2 in diffusers.)
    """
    num_steps = checked_count(num_steps, "num_steps")
    times = np.arange(num_steps + 1) / num_steps
    shares = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - shares[1:] / shares[:-1], max_beta)
    settings = {"name": "cosine", "num_steps": num_steps, "max_beta": float(max_beta)}
    return _of_betas(betas, settings)

  @classmethod
  def sigmoid(cls, num_steps: int, beta_start: float, beta_end: float) -> "Schedule":
    """β rises from beta_start to beta_end along the logistic function on [-6, 6] (diffusers)."""
    num_steps = checked_count(num_steps, "num_steps")
    shares = 1 / (1 + np.exp(-np.linspace(-6, 6, num_steps)))
    betas = shares * (beta_end - beta_start) + beta_start
    return _of_betas(betas, _recipe("sigmoid", num_steps, beta_start, beta_end))

  @classmethod
  def from_betas(cls, betas: Any) -> "Schedule":
    """The schedule with the variances β [T], each in (0, 1); the last may be 1."""
    betas = np.array(betas, np.float64)
    return _of_betas(betas, {"name": "betas", "betas": betas.tolist()})

  @classmethod
  def from_alpha_bars(cls, alpha_bars: Any) -> "Schedule":
    """The schedule with the shares ᾱ [T], which fall from below 1; the last may be 0."""
    alpha_bars = np.array(alpha_bars, np.float64)
    _check_alpha_bars(alpha_bars)
    return _of_alpha_bars(alpha_bars, {"name": "alpha_bars", "alpha_bars": alpha_bars.tolist()})

  def with_zero_terminal_snr(self) -> "Schedule":
    """Moved and scaled so that the last step leaves nothing of the data (Lin et al. 2023).

    √ᾱ is changed affinely: its first number stays, its last becomes 0. A network that predicts ε
    cannot use the last step; see Process.v and Process.sample.
    """
    if self.num_steps < 2:
      raise ValueError("A zero terminal signal-to-noise ratio needs at least 2 timesteps; got 1.")
    roots = np.sqrt(self.exact_alpha_bars)
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return _of_alpha_bars(roots**2, {**self.settings, "zero_terminal_snr": True})

  @classmethod
  def from_settings(cls, settings: Mapping[str, Any]) -> "Schedule":
    """The schedule whose `settings` these are."""
    fields = {k: v for k, v in settings.items() if k not in ("name", "zero_terminal_snr")}
    schedule = named(_RECIPES, settings.get("name"), "schedule")(**fields)
    return schedule.with_zero_terminal_snr() if settings.get("zero_terminal_snr") else schedule

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Schedule) and self._tables == other._tables

  def __hash__(self) -> int:
    return hash(self._tables)

  def __repr__(self) -> str:
    given = (f"{k}={v}" for k, v in self.settings.items() if k != "name" and np.ndim(v) == 0)
    return f"Schedule.{self.settings['name']}({', '.join(given) or f'{self.num_steps} timesteps'})"

  @functools.cached_property
  def _tables(self) -> tuple[bytes, bytes]:
    return self.exact_betas.tobytes(), self.exact_alpha_bars.tobytes()


def _recipe(name: str, num_steps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
  ends = {"beta_start": float(beta_start), "beta_end": float(beta_end)}
  return {"name": name, "num_steps": num_steps} | ends


def _of_betas(betas: np.ndarray, settings: dict[str, Any]) -> Schedule:
  inner, last = betas[..., :-1], betas[..., -1:]
  if betas.ndim != 1 or not betas.size or not ((inner > 0) & (inner < 1)).all():
    raise ValueError(
      "betas must be a non-empty vector of numbers strictly between 0 and 1, of which the last may "
      f"be 1; got {betas}."
    )
  if not ((last > 0) & (last <= 1)).all():
    raise ValueError(f"The last of betas must lie in (0, 1]; got {last}.")
  return Schedule(_frozen(betas), _frozen(np.cumprod(1 - betas)), settings)


def _of_alpha_bars(alpha_bars: np.ndarray, settings: dict[str, Any]) -> Schedule:
  betas = 1 - alpha_bars / np.append(1.0, alpha_bars[:-1])
  return Schedule(_frozen(betas), _frozen(alpha_bars), settings)


def _check_alpha_bars(alpha_bars: np.ndarray) -> None:
  falling = alpha_bars.ndim == 1 and alpha_bars.size and (np.diff(alpha_bars, prepend=1) < 0).all()
  if not falling or not (alpha_bars[:-1] > 0).all() or not alpha_bars[-1] >= 0:
    raise ValueError(
      "alpha_bars must be a non-empty vector that falls from a number below 1 to a last one of at "
      f"least 0; got {alpha_bars}."
    )


def _frozen(table: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
  table = table.astype(dtype)  # a copy
  table.flags.writeable = False
  return table


def _cosine(num_steps: int, beta_start: float | None = None, beta_end: float | None = None):
  """Schedule.cosine, which has no use for the ends that the others take."""
  del beta_start, beta_end
  return Schedule.cosine(num_steps)


# Each is called with (num_steps, beta_start, beta_end).
SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "linear": Schedule.linear,
  "scaled_linear": Schedule.scaled_linear,
  "cosine": _cosine,
  "sigmoid": Schedule.sigmoid,
}

_RECIPES: dict[str, Callable[..., Schedule]] = {
  **SCHEDULES,
  "cosine": Schedule.cosine,
  "betas": Schedule.from_betas,
  "alpha_bars": Schedule.from_alpha_bars,
}
