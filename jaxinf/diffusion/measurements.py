"""What is attributed: measurements of an example under the model, larger = fits worse.

A measurement is an average over draws. Each draw makes one input of the network from the example
and a key, and a scalar of the network's output there. Training losses and query measurements are of
this one type, so that both gradients are one kernel, at the speed of an ordinary batch.

`MEASUREMENTS` and `PARAMETERISED`, at the foot, are those with names (paper, Section 4):

  loss                     the model's own training loss, weights and law of t included;
  elbo, elbo_large         the whole negative ELBO, in nats per dimension; see likelihood.py;
  simple_elbo              of it, the weighted squared errors of the steps t ≥ 1 alone: no prior, no
                           decoder and no constant;
  trajectory               negative log-probability of a sampling trajectory, per dimension too;
  square_norm              mean square of the network's output, which D-TRAK measures;
  loss_at_timestep(t)      the loss at one index t, ε drawn;
  loss_at_time(t)          the same of a continuous process, at one t (or σ);
  loss_in_band(low,high)   the loss over the times in [low, high), by the law of t given these;
  masked_loss(FILE.npy)    the loss of a region of the example;
  weighted_loss(elbo)      the squared error of ε̂ with a weight for each t, one of WEIGHTINGS;
  journey_loss(900,500,…)  the loss of data predicted on the way at each of these timesteps;
  trajectory_distance      how far ε̂ along a sampling trajectory is from the attributed model's own.

loss, square_norm, loss_in_band, masked_loss and trajectory_distance are of every process,
loss_at_time of continuous ones, and all others of discrete ones, whatever the network predicts.
`Measurement.check` says so. trajectory_distance is for retrained models: at the attributed model it
is 0 and so is its gradient. `Measurement.check_gradient` says so.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.arrays import as_float
from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.registry import named
from jaxinf.core.types import ApplyFn, Array, Params, PyTree
from jaxinf.data.files import read_array
from jaxinf.diffusion.likelihood import (
  Variances,
  draw_transitions,
  elbo_constant,
  error_weights,
  large_variances,
  small_variances,
  trajectory_constant,
)
from jaxinf.diffusion.noise import (
  Noised,
  draw_augmentations,
  draw_integers,
  draw_noised,
  draw_pairs,
  draw_times_between,
  losses,
  predict,
  squared_errors,
)
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.sampler import sampler_times
from jaxinf.diffusion.weightings import WEIGHTINGS

OF = ("examples", "trajectories", "predictions")
Value = Callable[[Process, jax.Array, Noised], jax.Array]
Weights = Callable[[Process], np.ndarray]
# A band holds at least this share of the times. Uniform numbers in float32 are multiples of 2⁻²⁴
# near 1, so that 4,096 different times are left in it.
_LEAST_SHARE = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The mean over draws of value(output of the network on a pair, pair), of (example, key).

  Attributes:
    draw: (process, data [B, …], keys [B, S], draws, augmentation) → B · S pairs, example-major,
      to which conditioning is added after.
    value: (process, network outputs [B, …], pairs) → [B].
    constant: (process, data) → [B], the part that does not depend on the model; None for none.
    of: "examples", of any shape; or "trajectories" (states of sampling) or
      "predictions" (clean data predicted on the way): then data are [B, K, …], several each.
    name: by which settings of scores know it; None: "custom".
    requires: (process) → None, raising ValueError where a process has no such measurement.
    compares: whether it compares the outputs with the attributed model's on the same pairs, which
      take the place of the targets. Then it is of retrained models, and has no gradient.
  """

  draw: Callable[[Process, jax.Array, jax.Array, Draws, Augmentation], Noised]
  value: Value
  constant: Callable[[Process, jax.Array], jax.Array] | None = None
  of: str = "examples"
  name: str | None = None
  requires: Callable[[Process], None] | None = None
  compares: bool = False

  def __post_init__(self):
    if self.of not in OF:
      raise ValueError(f"A measurement is of one of {', '.join(OF)}; got {self.of!r}.")

  @property
  def axes(self) -> int:
    """Axes of the data that the network does not see: that of the several states of an example."""
    return 0 if self.of == "examples" else 1

  def check(self, process: Process) -> None:
    """Raises ValueError where the process has no such measurement, with what to take instead."""
    if self.requires is not None:
      self.requires(process)

  def check_gradient(self, process: Process) -> None:
    """Raises ValueError where it cannot be differentiated at the attributed model, likewise."""
    self.check(process)
    if self.compares:
      raise ValueError(
        f"{self.name or 'A measurement that compares'} has no influence function: it is least, and "
        "0, at the attributed model, where its gradient is 0. Measure retrained models by it, and "
        "score by square_norm or loss, or by the method das, which predicts squared changes."
      )

  def pairs(
    self,
    process: Process,
    data: jax.Array,
    keys: jax.Array,
    conditioning: PyTree = None,
    draws: Draws = INDEPENDENT,
    augmentation: Augmentation = PLAIN,
  ) -> Noised:
    """The B · S pairs of data [B, …] and keys [B, S], example-major.

    The S draws of an example are one replicate of the design. Each pair carries its example's row
    of the conditioning, a pytree of arrays [B, …].
    """
    self.check(process)
    repeat = lambda rows: jnp.repeat(rows, keys.shape[1], axis=0)
    pairs = self.draw(process, as_float(data), keys, draws, augmentation)
    given = jax.tree.map(repeat, conditioning)
    given = augmentation.conditioning(given, draw_augmentations(keys, draws))
    return pairs._replace(conditioning=given)

  def cotangents(
    self, process: Process, pairs: Noised, size: int, loss_power: float = 1.0
  ) -> Callable[[jax.Array], jax.Array]:
    """Gradient at the network's outputs of each example's measurement, a mean over its draws.

    Args:
      process: the diffusion process.
      pairs: example-major.
      size: draws of an example, S.
      loss_power: p; the S values of an example are weighted by value^(p − 1), see `draw_weights`.
    """
    self.check_gradient(process)

    def total(outputs: jax.Array) -> jax.Array:
      values = self.value(process, outputs, pairs)
      if loss_power == 1:
        return jnp.sum(values)
      return jnp.sum(draw_weights(values.reshape(-1, size), loss_power).reshape(-1) * values)

    return lambda out: jax.grad(total)(out) / size

  def evaluate(
    self,
    apply_fn: ApplyFn,
    params: Params,
    process: Process,
    data: jax.Array,
    keys: jax.Array,
    conditioning: PyTree = None,
    draws: Draws = INDEPENDENT,
    reference: Params | None = None,
  ) -> jax.Array:
    """[B] measurements of data [B, …] with draws from keys [B, S], constants included.

    `reference` are the attributed model's parameters, for measurements that compare.
    """
    pairs = self.pairs(process, data, keys, conditioning, draws)
    pairs = self.compared(pairs, apply_fn, reference)
    values = self.value(process, predict(apply_fn, params, pairs), pairs)
    means = values.reshape(keys.shape).mean(axis=1)
    return means if self.constant is None else means + self.constant(process, as_float(data))

  def compared(self, pairs: Noised, apply_fn: ApplyFn, reference: Params | None) -> Noised:
    """The pairs, with the outputs at the parameters `reference` as targets where it compares."""
    if not self.compares:
      return pairs
    if reference is None:
      raise ValueError(
        f"{self.name or 'This measurement'} compares with the attributed model: give its "
        "parameters as reference."
      )
    return pairs._replace(target=predict(apply_fn, reference, pairs))


def draw_weights(values: jax.Array, loss_power: float) -> jax.Array:
  """Weights w_s ∝ values_s^(p − 1) of S draws, with Σ_s w_s values_s = Σ_s values_s; constants.

  Args:
    values: [B, S], of which none is negative. Those below 1e-12 of their mean count as that much.
    loss_power: p in [0, 1].
  """
  values = jax.lax.stop_gradient(values)
  shares = values / jnp.maximum(values.mean(axis=1, keepdims=True), jnp.finfo(values.dtype).tiny)
  weights = jnp.maximum(shares, 1e-12) ** (loss_power - 1)
  return weights / (weights * shares).mean(axis=1, keepdims=True)


def measurement_named(name: str | Measurement) -> Measurement:
  """The measurement of that name, which may have an argument: "loss_at_timestep(500)".

  A Measurement is its own. Equal ones are one object, and share a compiled kernel. ValueError for
  an unknown name, that lists them, or argument.
  """
  return name if isinstance(name, Measurement) else _named(name)


@functools.lru_cache(maxsize=64)  # equal ones share a compiled kernel
def loss_at_timestep(timestep: int) -> Measurement:
  """The training loss ℓ_t at one t in [0, T), 0-based: the paper's ℓ_{t+1}. Only ε is drawn."""
  name = f"loss_at_timestep({timestep})"

  def requires(process: Process) -> None:
    _check_timesteps(name, process, [timestep])

  def draw(
    process: Process, data: jax.Array, keys: jax.Array, draws: Draws, augmentation: Augmentation
  ) -> Noised:
    requires(process)
    data = jnp.repeat(data, keys.shape[1], axis=0)
    t = jnp.full(len(data), timestep, jnp.int32)
    return draw_noised(process, data, t, keys, draws, augmentation)

  return Measurement(draw, _losses, name=name, requires=requires)


@functools.lru_cache(maxsize=64)
def loss_at_time(time: float) -> Measurement:
  """The training loss of a continuous process at one t, or at one noise level σ of EDM."""
  time = float(time)
  name = f"loss_at_time({time!r})"

  def requires(process: Process) -> None:
    if process.is_discrete:
      raise ValueError(
        f"{name} is of continuous processes; {process} has timesteps. Take loss_at_timestep(t)."
      )
    low, high = (0, 1) if process.name == "flow" else (np.finfo(np.float32).tiny, np.inf)
    if not low <= time <= high or not np.isfinite(time):
      what = "[0, 1]" if process.name == "flow" else "the noise levels σ > 0"
      raise ValueError(f"{name}: times of {process} must lie in {what}.")

  def draw(
    process: Process, data: jax.Array, keys: jax.Array, draws: Draws, augmentation: Augmentation
  ) -> Noised:
    requires(process)
    data = jnp.repeat(data, keys.shape[1], axis=0)
    t = jnp.full(len(data), time, jnp.float32)
    return draw_noised(process, data, t, keys, draws, augmentation)

  return Measurement(draw, _losses, name=name, requires=requires)


@functools.lru_cache(maxsize=64)
def loss_in_band(low: float, high: float) -> Measurement:
  """The training loss over the times in [low, high): E[ℓ | low ≤ t < high], by the law of t.

  Bands that cover all times, each weighted by its probability, add up to the loss.

  Args:
    low, high: timesteps 0 ≤ low < high ≤ T, counted from 0, where the process is discrete; times in
      [0, 1] of flow; noise levels σ of EDM, of which `high` may be infinite.
  """
  low, high = float(low), float(high)
  name = f"loss_in_band({','.join(_shortest(x) for x in (low, high))})"

  def requires(process: Process) -> None:
    most = process.num_steps or (1 if process.name == "flow" else np.inf)
    if not 0 <= low < high <= most:
      raise ValueError(f"{name}: a band of {process} is 0 ≤ low < high ≤ {most}.")
    if process.is_discrete:
      if not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{name}: timesteps of {process} are whole numbers.")
      return
    share = process.probability_below(high) - process.probability_below(low)
    if share < _LEAST_SHARE:
      raise ValueError(
        f"{name} holds a share of {share:.1e} of the times of {process}: too few to draw from. "
        "Widen the band, or take loss_at_time(t)."
      )

  def draw(
    process: Process, data: jax.Array, keys: jax.Array, draws: Draws, augmentation: Augmentation
  ) -> Noised:
    requires(process)
    data = jnp.repeat(data, keys.shape[1], axis=0)
    t = draw_times_between(process, low, high, keys, draws)
    return draw_noised(process, data, t, keys, draws, augmentation)

  return Measurement(draw, _losses, name=name, requires=requires)


def masked_loss(mask: Array) -> Measurement:
  """The training loss of a region: the mean squared error over it, times w_t.

  The mean is Σ_i mask_i e_i² / Σ_i mask_i over the elements i of an example, with the errors e of
  the network's output. Regions that make up the example, each weighted by its share of the
  elements, add up to the loss. Scores say what the model learned this region from: the network
  still sees the whole example.

  Args:
    mask: booleans, or weights that are finite and not negative, of the shape of an example, or of
      that without the last axis (all channels of a pixel count alike).
  """
  weights = np.array(mask, np.float32)
  if not weights.ndim or not np.isfinite(weights).all() or not (weights >= 0).all():
    raise ValueError(
      "A mask must be an array of booleans, or of finite weights that are not negative, of the "
      f"shape of an example; got shape {weights.shape}."
    )
  if not weights.any():
    raise ValueError("The mask is 0 everywhere: no element of the example counts.")
  return _masked(weights.tobytes(), weights.shape)


def weighted_loss(weights: str | Array) -> Measurement:
  """E over t, uniform, of w_t · (mean squared error of ε̂), whatever the network predicts.

  Args:
    weights: w [T], finite and not negative; or the name of one of WEIGHTINGS.
  """
  if isinstance(weights, str):
    weighting = named(WEIGHTINGS, weights, "weighting")
    of = lambda process: weighting(process.schedule) * process.exact_noise_error_scales
    return _weighted(f"weighted_loss({weights})", of)
  table = np.array(weights, np.float64)
  if table.ndim != 1 or not np.isfinite(table).all() or not (table >= 0).all():
    raise ValueError("weights must be a vector [T] of finite numbers that are not negative.")

  def of_table(process: Process) -> np.ndarray:
    if len(table) != process.num_steps:
      raise ValueError(f"There are {process.num_steps} timesteps, but {len(table)} weights.")
    return table * process.exact_noise_error_scales

  digest = hashlib.blake2b(table.tobytes(), digest_size=4).hexdigest()
  return _weighted(f"weighted_loss({digest})", of_table)


def journey_loss(timesteps: Sequence[int]) -> Measurement:
  """The training loss of K predictions, made on the way to a sample, each at its own timestep.

  The sum over k of Journey-TRAK (Georgiev et al. 2023) as a mean: data are [B, K, …], the x̂_0 that
  sampling predicted at the timesteps [K]. A draw takes one k, noises the k-th prediction to the
  k-th timestep, and measures the loss there.
  """
  timesteps = tuple(int(t) for t in timesteps)
  name = f"journey_loss({','.join(map(str, timesteps))})"

  def requires(process: Process) -> None:
    _check_timesteps(name, process, timesteps)

  def draw(
    process: Process, data: jax.Array, keys: jax.Array, draws: Draws, augmentation: Augmentation
  ) -> Noised:
    requires(process)
    if data.ndim < 3 or data.shape[1] != len(timesteps):
      raise ValueError(
        f"journey_loss is of data [B, {len(timesteps)}, …], one prediction for each of its "
        f"timesteps; got {data.shape}."
      )
    k = draw_integers(len(timesteps), keys, draws)
    rows = jnp.repeat(jnp.arange(len(data)), keys.shape[1])
    t = jnp.array(timesteps, jnp.int32)[k]
    return draw_noised(process, data[rows, k], t, keys, draws, augmentation)

  return Measurement(draw, _losses, of="predictions", name=name, requires=requires)


def _losses(process: Process, outputs: jax.Array, pairs: Noised) -> jax.Array:
  del process
  return losses(outputs, pairs)


def _square_norms(process: Process, outputs: jax.Array, pairs: Noised) -> jax.Array:
  del process, pairs
  return jnp.mean(jnp.square(outputs), axis=tuple(range(1, outputs.ndim)))


@functools.lru_cache(maxsize=64)  # equal masks are one measurement and share a compiled kernel
def _masked(content: bytes, shape: tuple[int, ...]) -> Measurement:
  """`masked_loss` of a float32 mask with this content and shape, named by a hash of both."""
  mask = np.frombuffer(content, np.float32).reshape(shape).astype(np.float64)
  name = hashlib.blake2b(content + str(shape).encode(), digest_size=8).hexdigest()

  def value(process: Process, outputs: jax.Array, pairs: Noised) -> jax.Array:
    del process
    own, axes = outputs.shape[1:], tuple(range(1, outputs.ndim))
    if shape not in (own, own[:-1]):
      raise ValueError(
        f"A mask of shape {shape} does not fit examples of shape {own}: give it that shape"
        f"{f', or {own[:-1]}' if len(own) > 1 else ''}."
      )
    whole = np.broadcast_to(mask if shape == own else mask[..., None], own)
    shares = jnp.asarray(whole / whole.mean(), jnp.float32)
    return pairs.weights * jnp.mean(shares * jnp.square(outputs - pairs.target), axis=axes)

  return Measurement(draw_pairs, value, name=f"masked_loss({name})")


def _draw_states(
  process: Process, data: jax.Array, keys: jax.Array, draws: Draws, augmentation: Augmentation
) -> Noised:
  """S of the K steps of each trajectory [B, K + 1, …]: the states that its network was given.

  Nothing else is drawn, so that there are no antithetic pairs: with K stratified draws each step
  comes once. There are no targets yet.
  """
  if data.ndim < 3 or data.shape[1] < 2:
    raise ValueError(
      "trajectory_distance is of trajectories [B, K + 1, …], the states of K sampling steps from "
      f"noise to data; got {data.shape}."
    )
  times = sampler_times(process, data.shape[1] - 1)[:-1]
  draws = dataclasses.replace(draws, antithetic=False)
  k = draw_integers(len(times), keys, draws)
  x_t = data[jnp.repeat(jnp.arange(len(data)), keys.shape[1]), k]
  x_t = augmentation.mirrored(x_t, draw_augmentations(keys, draws))
  t = jnp.asarray(times, jnp.int32 if process.is_discrete else jnp.float32)[k]
  return Noised(*process.inputs(x_t, t), jnp.zeros_like(x_t), process.weights(t), t)


def _noise_errors(process: Process, outputs: jax.Array, pairs: Noised) -> jax.Array:
  """[B] mean over all elements of (ε̂ − ε)², of the ε̂ and ε that outputs and targets imply."""
  return process.noise_error_scale(pairs.t) * squared_errors(outputs, pairs)


def _shortest(number: float) -> str:
  """A number as it is written: 500 and 0.25."""
  return str(int(number)) if number.is_integer() else repr(number)


def _weighted(name: str, weights: Weights, **fields: Any) -> Measurement:
  """The squared errors of the output times weights(process)[t], of a discrete process."""

  def table(process: Process) -> np.ndarray:
    _check_discrete(name, process)
    with np.errstate(invalid="ignore"):
      found = weights(process)
    if not np.isfinite(found).all():
      raise ValueError(
        f"{name} has no finite weight at timestep {int(np.argmin(np.isfinite(found)))} of "
        f"{process}, where little or nothing is left of the data. Take loss, elbo or "
        "weighted_loss(snr)."
      )
    return found

  def value(process: Process, outputs: jax.Array, pairs: Noised) -> jax.Array:
    return jnp.asarray(table(process), jnp.float32)[pairs.t] * squared_errors(outputs, pairs)

  def requires(process: Process) -> None:
    table(process)

  return Measurement(**({"draw": draw_pairs} | fields), value=value, name=name, requires=requires)


def _elbo_weights(process: Process, variances: Variances = small_variances) -> np.ndarray:
  return len(process.exact.a) * error_weights(process, variances)


def _check_discrete(name: str, process: Process) -> None:
  if not process.is_discrete:
    raise ValueError(
      f"The measurement {name} needs discrete timesteps; {process} is continuous. Take loss or "
      "loss_at_time(t)."
    )


def _check_timesteps(name: str, process: Process, timesteps: Sequence[int]) -> None:
  _check_discrete(name, process)
  assert process.num_steps is not None
  if not timesteps or not all(0 <= t < process.num_steps for t in timesteps):
    raise ValueError(
      f"Timesteps must lie in [0, {process.num_steps}), counted from 0; got {list(timesteps)}."
    )


def _named(name: str) -> Measurement:
  if name in MEASUREMENTS:
    return MEASUREMENTS[name]
  call = re.fullmatch(r"(\w+)\(([^()]*)\)", name)
  if call is None or call[1] not in PARAMETERISED:
    names = [*MEASUREMENTS, *(f"{name}(…)" for name in PARAMETERISED)]
    raise ValueError(f"Unknown measurement {name!r}; there are: {', '.join(names)}.")
  return PARAMETERISED[call[1]](call[2])


def _integers(text: str) -> list[int]:
  if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
    raise ValueError(f"A timestep is an integer, counted from 0; got {text!r}.")
  return [int(number) for number in text.split(",")]


def _one_timestep(text: str) -> Measurement:
  timesteps = _integers(text)
  if len(timesteps) > 1:
    raise ValueError(f"loss_at_timestep is of one timestep; got {text!r}.")
  return loss_at_timestep(timesteps[0])


def _one_time(text: str) -> Measurement:
  try:
    return loss_at_time(float(text))
  except ValueError as error:
    raise ValueError(f"loss_at_time is of one time, a number; got {text!r}.") from error


def _one_band(text: str) -> Measurement:
  try:
    low, high = map(float, text.split(","))
  except ValueError as error:
    raise ValueError(f"loss_in_band is of two numbers, low,high; got {text!r}.") from error
  return loss_in_band(low, high)


# The model's own training loss ℓ(θ, x).
LOSS = Measurement(draw_pairs, _losses, name="loss")

MEASUREMENTS = {
  "loss": LOSS,
  "elbo": _weighted("elbo", _elbo_weights, constant=elbo_constant),
  "elbo_large": _weighted(
    "elbo_large",
    functools.partial(_elbo_weights, variances=large_variances),
    constant=functools.partial(elbo_constant, variances=large_variances),
  ),
  "simple_elbo": _weighted("simple_elbo", lambda p: np.append(0.0, _elbo_weights(p)[1:])),
  "trajectory": _weighted(
    "trajectory",
    _elbo_weights,
    draw=draw_transitions,
    constant=trajectory_constant,
    of="trajectories",
  ),
  "square_norm": Measurement(draw_pairs, _square_norms, name="square_norm"),
  "trajectory_distance": Measurement(
    _draw_states, _noise_errors, of="trajectories", name="trajectory_distance", compares=True
  ),
}

# Name → measurement from the text in brackets. Each is cached, but for a mask: its file may change,
# and equal masks are one measurement already. 64 are more than any study measures.
_cached = functools.lru_cache(maxsize=64)

PARAMETERISED: dict[str, Callable[[str], Measurement]] = {
  "loss_at_timestep": _one_timestep,
  "loss_at_time": _one_time,
  "loss_in_band": _one_band,
  "masked_loss": lambda path: masked_loss(read_array(path)),
  "weighted_loss": _cached(weighted_loss),
  "journey_loss": _cached(lambda text: journey_loss(_integers(text))),
}
