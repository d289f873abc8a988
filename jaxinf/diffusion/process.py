"""The forward process and the training objective of a model: one form for all of them.

  x_t    = a_t x_0 + b_t ε           ε standard normal
  target = c_t ε + d_t x_0           what the network predicts
  loss   = w_t · mean over all elements of (output − target)²,   t ~ p(t)

The network is called with (s_t x_t, τ_t). `KINDS`, at the foot, has a row for each objective:

  epsilon  discrete; target ε;
  sample   discrete; target x_0;
  v        discrete; target √ᾱ ε − √(1 − ᾱ) x_0 (Salimans and Ho 2022);
  flow     a = 1 − t, b = t for t in [0, 1]; target ε − x_0 (rectified flow);
  edm      a = 1, b = t = σ; target (x_0 − c_skip x_σ) / c_out, input c_in x_σ, τ = ¼ ln σ
           (Karras et al. 2022, Table 1); edm_raw: the network is the denoiser D(x_σ, σ) itself.

Both unknowns follow from x_t and the output: with the determinant a c − b d,
x̂_0 = (c x_t − b output) / determinant and ε̂ = (a output − d x_t) / determinant.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.registry import named
from jaxinf.diffusion.loss_weights import (
  P2,
  MinSNR,
  Table,
  Weight,
  weight_of,
  weight_of_settings,
  weight_settings,
)
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.times import Law, LogNormal, flow_law, law_of_settings, law_settings


class Coefficients(NamedTuple):
  """Of x_t = a x_0 + b ε and target = c ε + d x_0; arrays of one shape, or numbers for all t."""

  a: Any
  b: Any
  c: Any
  d: Any
  determinant: Any  # a c − b d


@dataclasses.dataclass(frozen=True)
class Process:
  """How data are noised, what the network predicts, and how its loss is weighted.

  Made by `Process.epsilon`, `.sample`, `.v`, `.flow` and `.edm`. Processes are compared and hashed
  by value. A function that closes over one may be compiled: its tables are constants.

  Times t [B] are int32 indices in [0, T) where the process is discrete, and float32 otherwise.
  Data, noise and outputs are [B, …] of any shape.

  Attributes:
    name: which prediction: a key of PROCESSES.
    schedule: of a discrete process; None for a continuous one.
    weight: w_t, a factor of the loss; None for the objective's own.
    law: of t, where it is continuous. Discrete times are uniform.
    shift: s of t → s t / (1 + (s − 1) t), applied to the times of flow (Esser et al. 2024).
    sigma_data: standard deviation of the data, of EDM.
    sigma_range: smallest and largest noise level that samplers of EDM visit.
    raw: whether the network of EDM is the denoiser D(x, σ) itself.

  Examples:
    >>> schedule = Schedule.scaled_linear(1000, 8.5e-4, 0.012)
    >>> Process.v(schedule, weight="min_snr").num_steps
    1000
    >>> Process.flow("logit_normal", shift=3.0).is_discrete
    False
    >>> Process.epsilon(schedule.with_zero_terminal_snr())
    Traceback (most recent call last):
      ...
    ValueError: Process.epsilon cannot have a schedule with a zero terminal ...
  """

  name: str
  schedule: Schedule | None = None
  weight: Weight | None = None
  law: Law | None = None
  shift: float = 1.0
  sigma_data: float = 1.0
  sigma_range: tuple[float, float] | None = None
  raw: bool = False

  def __post_init__(self):
    self._check_numbers()
    if isinstance(self.weight, Table):
      if self.schedule is None:
        raise ValueError(
          f"A table of loss weights needs discrete timesteps; {self} is continuous. Take a number "
          "or min_snr."
        )
      if len(self.weight.values) != self.num_steps:
        raise ValueError(
          f"There are {self.num_steps} timesteps, but {len(self.weight.values)} loss weights."
        )
    if isinstance(self.weight, MinSNR | P2) and self.name == "edm":
      raise ValueError(
        f"The loss weight {self.weight} is of the signal-to-noise ratio of scaled data; EDM has "
        "weights of its own, by sigma_data. Leave weight out, or give a number."
      )
    if self.name == "epsilon" and self.schedule and self.schedule.has_zero_terminal_snr:
      raise ValueError(
        "Process.epsilon cannot have a schedule with a zero terminal signal-to-noise ratio: at its "
        "last timestep the noise says nothing about the data, so that no sampler can start there. "
        "Take Process.v or Process.sample."
      )

  @classmethod
  def epsilon(cls, schedule: Schedule, weight: Any = None) -> "Process":
    """The network predicts the noise ε.

    Args:
      schedule: the variances.
      weight: of the loss: a number, "min_snr" or "p2", a vector [T], a weight of loss_weights.py,
        or None for 1.
    """
    return cls("epsilon", _checked_schedule(schedule), weight_of(weight))

  @classmethod
  def sample(cls, schedule: Schedule, weight: Any = None) -> "Process":
    """The network predicts the clean data x_0; arguments as of `epsilon`."""
    return cls("sample", _checked_schedule(schedule), weight_of(weight))

  @classmethod
  def v(cls, schedule: Schedule, weight: Any = None) -> "Process":
    """The network predicts v = √ᾱ ε − √(1 − ᾱ) x_0; arguments as of `epsilon`."""
    return cls("v", _checked_schedule(schedule), weight_of(weight))

  @classmethod
  def flow(
    cls, time: str | Law = "uniform", *, shift: float = 1.0, weight: Any = None
  ) -> "Process":
    """Rectified flow: x_t = (1 − t) x_0 + t ε, and the network predicts ε − x_0.

    Args:
      time: the law of t: "uniform", "logit_normal" or LogitNormal(mean, std).
      shift: s > 0, which moves times to s t / (1 + (s − 1) t), in training and sampling (SD3: 3).
      weight: of the loss: a number, "min_snr" or "p2", or None for 1.
    """
    return cls("flow", None, weight_of(weight), flow_law(time), float(shift))

  @classmethod
  def edm(
    cls,
    sigma_data: float = 0.5,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    *,
    raw: bool = False,
    weight: float | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
  ) -> "Process":
    """EDM: x_σ = x_0 + σ ε with ln σ ~ N(p_mean, p_std²); the loss of D(x_σ, σ) counts 1 / c_out².

    The defaults are those of Karras et al. 2022, Table 1.

    Args:
      sigma_data: standard deviation of the data.
      p_mean, p_std: of ln σ in training.
      raw: the network is D, called with (x_σ, σ); otherwise it is the F of
        D = c_skip x_σ + c_out F(c_in x_σ, ¼ ln σ), whose own squared error counts 1.
      weight: a further constant factor of the loss.
      sigma_min, sigma_max: noise levels that samplers visit.
    """
    levels = float(sigma_min), float(sigma_max)
    return cls(
      "edm",
      weight=weight_of(weight),
      law=LogNormal(float(p_mean), float(p_std)),
      sigma_data=float(sigma_data),
      sigma_range=levels,
      raw=bool(raw),
    )

  @property
  def is_discrete(self) -> bool:
    """Whether t is one of T indices."""
    return self.schedule is not None

  @property
  def num_steps(self) -> int | None:
    """T, or None where t is continuous."""
    return None if self.schedule is None else self.schedule.num_steps

  def __repr__(self) -> str:
    what = f"{self.schedule}" if self.schedule else f"{self.law}"
    what += f", shift={self.shift}" * (self.shift != 1) + ", raw=True" * self.raw
    return f"Process.{self.name}({what}{f', weight={self.weight}' if self.weight else ''})"

  def times(self, u: jax.Array) -> jax.Array:
    """t [B] of uniform numbers u [B] in [0, 1), by the inverse of the law's distribution."""
    if self.schedule is not None:
      return index_of(u, self.schedule.num_steps)
    assert self.law is not None
    return self.shifted(self.law.times(u))

  def probability_below(self, t: float) -> float:
    """That a time of a continuous process is below t, in float64: the inverse of `times`."""
    assert self.law is not None, "discrete times are uniform"
    return self.law.below(t / (self.shift - (self.shift - 1) * t) if self.shift != 1 else t)

  def shifted(self, t: Any) -> Any:
    """s t / (1 + (s − 1) t): times of flow as they are trained and sampled."""
    return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

  def levels(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a_t, b_t), each [B] float32."""
    a, b = self._levels(t)
    return a + jnp.zeros_like(b), b

  def noised(self, data: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t = a_t data + b_t noise."""
    a, b = self._levels(t)
    return _combination(a, data, b, noise)

  def inputs(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(s_t x_t [B, …], τ_t [B]): what the network is given; τ is int32 where t is."""
    scale = self._kind.scale(*self._levels(t), self.sigma_data)
    return x_t if _is(scale, 1) else _column(scale, x_t) * x_t, self._kind.time(t)

  def target(self, data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """c_t noise + d_t data, which the network predicts."""
    of = self._coefficients(t)
    return _combination(of.c, noise, of.d, data)

  def weights(self, t: jax.Array) -> jax.Array:
    """w_t [B] float32."""
    if self.schedule is not None:
      return self._looked_up(self.exact_weights, t)
    return jnp.ones_like(t) * self._weights(self._coefficients(t))

  def clean(self, x_t: jax.Array, t: jax.Array, output: jax.Array) -> jax.Array:
    """x̂_0 [B, …], the clean data that x_t and the network's output imply."""
    of = self._coefficients(t)
    if _is(of.c, 0):
      return _quotient(output, of.d)
    return _quotient(_combination(of.c, x_t, -of.b, output), of.determinant)

  def noise(self, x_t: jax.Array, t: jax.Array, output: jax.Array) -> jax.Array:
    """ε̂ [B, …], the noise that x_t and the network's output imply."""
    of = self._coefficients(t)
    if _is(of.d, 0):
      return _quotient(output, of.c)
    return _quotient(_combination(of.a, output, -of.d, x_t), of.determinant)

  def noise_error_scale(self, t: jax.Array) -> jax.Array:
    """(a / determinant)² [B] float32: the squared error of ε̂ over that of the output."""
    if self.schedule is not None:
      return self._looked_up(self.exact_noise_error_scales, t)
    of = self._coefficients(t)
    return jnp.ones_like(t) * jnp.square(of.a / of.determinant)

  @functools.cached_property
  def exact(self) -> Coefficients:
    """The coefficients at all T timesteps, [T] float64 on the host; ValueError if continuous."""
    if self.schedule is None:
      raise ValueError(f"{self} is continuous: it has no table of timesteps.")
    a, b = self.exact_levels(np.arange(self.schedule.num_steps))
    every = (np.broadcast_to(x, a.shape) for x in self._kind.target(a, b, self.sigma_data))
    return Coefficients(a, b, *every)

  @property
  def exact_weights(self) -> np.ndarray:
    """w [T] float64 of a discrete process."""
    return np.broadcast_to(self._weights(self.exact), self.exact.a.shape)

  @property
  def exact_noise_error_scales(self) -> np.ndarray:
    """`noise_error_scale` [T] float64 of a discrete process."""
    return np.square(self.exact.a / self.exact.determinant)

  @property
  def exact_clean_error_scales(self) -> np.ndarray:
    """(b / determinant)² [T] float64: the squared error of x̂_0 over that of the output."""
    return np.square(self.exact.b / self.exact.determinant)

  def exact_levels(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a_t, b_t) float64 on the host; (1, 0) at t = −1 where discrete, which is the data."""
    t = np.asarray(t)
    if self.schedule is not None:
      alpha_bars = np.where(t < 0, 1.0, self.schedule.exact_alpha_bars[t])
      return np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
    a, b = self._levels(t.astype(np.float64))
    return np.broadcast_to(a, t.shape), b

  @property
  def settings(self) -> dict[str, Any]:
    """The process as JSON, for manifests and fingerprints."""
    found: dict[str, Any] = {"name": self.name, "weight": weight_settings(self.weight)}
    if self.schedule is not None:
      return found | {"schedule": dict(self.schedule.settings)}
    if self.name == "flow":
      assert self.law is not None
      return found | {"time": law_settings(self.law), "shift": self.shift}
    assert isinstance(self.law, LogNormal) and self.sigma_range is not None
    smallest, largest = self.sigma_range
    return found | {
      "sigma_data": self.sigma_data,
      "p_mean": self.law.mean,
      "p_std": self.law.std,
      "raw": self.raw,
      "sigma_min": smallest,
      "sigma_max": largest,
    }

  @classmethod
  def from_settings(cls, settings: Mapping[str, Any]) -> "Process":
    """The process whose `settings` these are."""
    fields = {k: v for k, v in settings.items() if k != "name"}
    fields["weight"] = weight_of_settings(fields.get("weight"))
    if "schedule" in fields:
      fields["schedule"] = Schedule.from_settings(fields["schedule"])
    if "time" in fields:
      fields["time"] = law_of_settings(fields["time"])
    return named(PROCESSES, settings.get("name"), "process")(**fields)

  @property
  def _kind(self) -> "Kind":
    return KINDS[self.name + "_raw" * self.raw]

  def _levels(self, t: Any) -> tuple[Any, Any]:
    """(a, b) at times of JAX or of NumPy; a is a number where it is one for all t."""
    if self.schedule is None:
      assert self._kind.levels is not None
      return self._kind.levels(t)
    return self._looked_up(self.schedule.signal, t), self._looked_up(self.schedule.noise, t)

  def _coefficients(self, t: jax.Array) -> Coefficients:
    a, b = self._levels(t)
    return Coefficients(a, b, *self._kind.target(a, b, self.sigma_data))

  def _weights(self, of: Coefficients) -> Any:
    own = self._kind.weight(of.a, of.b, self.sigma_data)
    return own if self.weight is None else own * self.weight.of(of.a, of.b, of.determinant)

  @staticmethod
  def _looked_up(table: np.ndarray, t: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32)[t]

  def _check_numbers(self) -> None:
    positive = {"shift": self.shift, "sigma_data": self.sigma_data}
    if self.sigma_range is not None:
      positive |= dict(zip(("sigma_min", "sigma_max"), self.sigma_range, strict=True))
    for name, value in positive.items():
      if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite; got {value}.")
    if self.sigma_range is not None and not self.sigma_range[0] < self.sigma_range[1]:
      raise ValueError(f"sigma_min must be below sigma_max; got {self.sigma_range}.")


def index_of(u: jax.Array, num: int) -> jax.Array:
  """Int32 in [0, num) of uniform numbers u in [0, 1), which may have rounded up to 1."""
  return jnp.minimum((u * num).astype(jnp.int32), num - 1)


class Kind(NamedTuple):
  """A row: functions of the levels a and b (and of sigma_data), for arrays of NumPy or of JAX."""

  target: Callable[[Any, Any, float], tuple[Any, Any, Any]]  # (c, d, determinant)
  levels: Callable[[Any], tuple[Any, Any]] | None = None  # (a, b) of t; None: the schedule's
  scale: Callable[[Any, Any, float], Any] = lambda a, b, s: 1.0
  time: Callable[[jax.Array], jax.Array] = lambda t: t
  weight: Callable[[Any, Any, float], Any] = lambda a, b, s: 1.0  # before Process.weight


def _edm_target(a: Any, b: Any, s: float) -> tuple[Any, Any, Any]:
  """With c_skip = s² / (σ² + s²), c_out = σ s / √(σ² + s²) and x_σ = x_0 + σ ε written out."""
  del a
  norm = (b**2 + s**2) ** 0.5
  return -s / norm, b / (s * norm), -norm / s


def _checked_schedule(schedule: Any) -> Schedule:
  if not isinstance(schedule, Schedule):
    raise ValueError(
      "schedule must be a jaxinf.Schedule, such as Schedule.linear(1000, 1e-4, 0.02); got "
      f"{type(schedule).__name__}."
    )
  return schedule


def _is(coefficient: Any, value: int) -> bool:
  """Whether the coefficient is that number at all times."""
  return isinstance(coefficient, float) and coefficient == value


def _column(coefficient: Any, like: jax.Array) -> Any:
  """A coefficient [B] or [] with the axes of `like` [B, …]."""
  shape = jnp.shape(coefficient)
  return jnp.reshape(coefficient, shape + (1,) * (like.ndim - len(shape))) if shape else coefficient


def _combination(p: Any, x: jax.Array, q: Any, y: jax.Array) -> jax.Array:
  """p x + q y, without the terms and factors that are 0 or 1 at all times."""
  parts = [z if _is(k, 1) else _column(k, z) * z for k, z in ((p, x), (q, y)) if not _is(k, 0)]
  return functools.reduce(lambda first, second: first + second, parts)


def _quotient(value: jax.Array, divisor: Any) -> jax.Array:
  return value if _is(divisor, 1) else value / _column(divisor, value)


_edm_levels = lambda t: (1.0, t)

KINDS: dict[str, Kind] = {
  "epsilon": Kind(lambda a, b, s: (1.0, 0.0, a)),
  "sample": Kind(lambda a, b, s: (0.0, 1.0, -b)),
  "v": Kind(lambda a, b, s: (a, -b, 1.0)),
  "flow": Kind(lambda a, b, s: (1.0, -1.0, 1.0), lambda t: (1.0 - t, t)),
  "edm": Kind(
    _edm_target,
    _edm_levels,
    scale=lambda a, b, s: (b**2 + s**2) ** -0.5,
    time=lambda t: jnp.log(t) / 4,
  ),
  "edm_raw": Kind(
    lambda a, b, s: (0.0, 1.0, -b),
    _edm_levels,
    weight=lambda a, b, s: (b**2 + s**2) / (b * s) ** 2,
  ),
}

PROCESSES: dict[str, Callable[..., Process]] = {
  "epsilon": Process.epsilon,
  "sample": Process.sample,
  "v": Process.v,
  "flow": Process.flow,
  "edm": Process.edm,
}
