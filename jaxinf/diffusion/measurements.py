"""What is attributed: measurements of an image under the model, larger = fits worse.

A measurement is an average over draws. Each draw makes one input of the network from the image and
a key, and a scalar of the network's output there. Training losses and query measurements are of
this one type, so that both gradients are one kernel, at the speed of an ordinary batch.

`MEASUREMENTS` and `PARAMETERISED`, at the foot, are those with names (paper, Section 4):

  loss                     the training loss: mean squared error of ε, t uniform;
  elbo, elbo_large         the whole negative ELBO, in nats per dimension; see likelihood.py;
  simple_elbo              of it, the weighted squared errors of the steps t ≥ 1 alone: no prior, no
                           decoder and no constant;
  trajectory               negative log-probability of a sampling trajectory, per dimension too;
  square_norm              mean square of the network's output, which D-TRAK measures;
  loss_at_timestep(t)      the loss at one t, ε drawn;
  weighted_loss(elbo)      the loss with a weight for each t, one of weightings.WEIGHTINGS;
  journey_loss(900,500,…)  the loss of an image predicted on the way at each of these timesteps.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import ApplyFn, Array, Params, PyTree
from jaxinf.diffusion.likelihood import (
  draw_transitions,
  elbo_constant,
  large_variances,
  trajectory_constant,
)
from jaxinf.diffusion.noise import UNIFORM, DrawDesign, draw_noised, draw_pairs, draw_timesteps
from jaxinf.diffusion.objective import Noised, float_images, predict, squared_errors
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.weightings import WEIGHTINGS, elbo, elbo_large, simple_elbo

OF = ("images", "trajectories", "predictions")
Value = Callable[[Schedule, jax.Array, Noised], jax.Array]


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The mean over draws of value(ε_θ(x_t, t), pair), with the pair from (image, key).

  Attributes:
    draw: (schedule, images [B, H, W, C], keys [B, S], design) → B · S pairs, image-major, to which
      conditioning is added after.
    value: (schedule, network outputs [B, H, W, C], pairs) → [B].
    constant: (schedule, images) → [B], the part that does not depend on the model; None for none.
    of: "images"; or "trajectories" (states of sampling) or "predictions" (clean images predicted on
      the way): then images are [B, K, H, W, C] float32, several each.
    name: by which settings of scores know it; None: "custom".
  """

  draw: Callable[[Schedule, jax.Array, jax.Array, DrawDesign], Noised]
  value: Value
  constant: Callable[[Schedule, jax.Array], jax.Array] | None = None
  of: str = "images"
  name: str | None = None

  def __post_init__(self):
    if self.of not in OF:
      raise ValueError(f"A measurement is of one of {', '.join(OF)}; got {self.of!r}.")

  def pairs(
    self,
    schedule: Schedule,
    images: jax.Array,
    keys: jax.Array,
    conditioning: PyTree = None,
    design: DrawDesign = UNIFORM,
  ) -> Noised:
    """The B · S pairs of images [B, H, W, C] (or uint8) and keys [B, S], image-major.

    The S draws of an image are one group of the design. Each pair carries its image's row of the
    conditioning, a pytree of arrays [B, …].
    """
    repeat = lambda rows: jnp.repeat(rows, keys.shape[1], axis=0)
    pairs = self.draw(schedule, float_images(images), keys, design)
    return pairs._replace(conditioning=jax.tree.map(repeat, conditioning))

  def cotangents(
    self, schedule: Schedule, pairs: Noised, draws: int
  ) -> Callable[[jax.Array], jax.Array]:
    """Gradient at the network's outputs of each image's measurement, a mean over `draws` pairs."""
    return lambda out: jax.grad(lambda y: jnp.sum(self.value(schedule, y, pairs)))(out) / draws

  def evaluate(
    self,
    apply_fn: ApplyFn,
    params: Params,
    schedule: Schedule,
    images: jax.Array,
    keys: jax.Array,
    conditioning: PyTree = None,
    design: DrawDesign = UNIFORM,
  ) -> jax.Array:
    """[B] measurements of images [B, H, W, C] with draws from keys [B, S], constants included."""
    pairs = self.pairs(schedule, images, keys, conditioning, design)
    values = self.value(schedule, predict(apply_fn, params, pairs), pairs)
    means = values.reshape(keys.shape).mean(axis=1)
    if self.constant is None:
      return means
    return means + self.constant(schedule, float_images(images))


def measurement_named(name: str | Measurement) -> Measurement:
  """The measurement of that name, which may have an argument: "loss_at_timestep(500)".

  A Measurement is its own. ValueError for an unknown name, that lists them, or argument.
  """
  return name if isinstance(name, Measurement) else _named(name)


def loss_at_timestep(timestep: int) -> Measurement:
  """The loss ℓ_t at one t in [0, T), 0-based: the paper's ℓ_{t+1}. Only ε is drawn."""

  def draw(schedule: Schedule, images: jax.Array, keys: jax.Array, design: DrawDesign) -> Noised:
    _check_timesteps(schedule, [timestep])
    images = jnp.repeat(images, keys.shape[1], axis=0)
    return draw_noised(schedule, images, jnp.full(len(images), timestep), keys, design)

  return Measurement(draw, _squared_errors, name=f"loss_at_timestep({timestep})")


def weighted_loss(weights: str | Array) -> Measurement:
  """E over t, uniform, of w_t · (mean squared error of ε).

  Args:
    weights: w [T], finite and not negative; or the name of one of WEIGHTINGS.
  """
  if isinstance(weights, str):
    if weights not in WEIGHTINGS:
      raise ValueError(f"Unknown weighting {weights!r}; there are: {', '.join(WEIGHTINGS)}.")
    return Measurement(draw_pairs, _weighted(WEIGHTINGS[weights]), name=f"weighted_loss({weights})")
  table = np.array(weights, np.float64)
  if table.ndim != 1 or not np.isfinite(table).all() or not (table >= 0).all():
    raise ValueError("weights must be a vector [T] of finite numbers that are not negative.")

  def weights_of(schedule: Schedule) -> np.ndarray:
    if len(table) != schedule.num_steps:
      raise ValueError(f"There are {schedule.num_steps} timesteps, but {len(table)} weights.")
    return table

  digest = hashlib.blake2b(table.tobytes(), digest_size=4).hexdigest()
  return Measurement(draw_pairs, _weighted(weights_of), name=f"weighted_loss({digest})")


def journey_loss(timesteps: Sequence[int]) -> Measurement:
  """The loss of K images, predicted on the way to a sample, each at its own timestep.

  The sum over k of Journey-TRAK (Georgiev et al. 2023) as a mean: images are [B, K, H, W, C], the
  x̂_0 that sampling predicted at the timesteps [K]. A draw takes one k, noises the k-th image to the
  k-th timestep, and measures the squared error of ε there.
  """
  timesteps = tuple(int(t) for t in timesteps)

  def draw(schedule: Schedule, images: jax.Array, keys: jax.Array, design: DrawDesign) -> Noised:
    _check_timesteps(schedule, timesteps)
    if images.ndim != 5 or images.shape[1] != len(timesteps):
      raise ValueError(
        f"journey_loss is of images [B, {len(timesteps)}, H, W, C], one for each of its timesteps; "
        f"got {images.shape}."
      )
    k = draw_timesteps(len(timesteps), keys, design)
    rows = jnp.repeat(jnp.arange(len(images)), keys.shape[1])
    return draw_noised(schedule, images[rows, k], jnp.array(timesteps)[k], keys, design)

  name = f"journey_loss({','.join(map(str, timesteps))})"
  return Measurement(draw, _squared_errors, of="predictions", name=name)


def _squared_errors(schedule: Schedule, outputs: jax.Array, pairs: Noised) -> jax.Array:
  del schedule
  return squared_errors(outputs, pairs)


def _square_norms(schedule: Schedule, outputs: jax.Array, pairs: Noised) -> jax.Array:
  del schedule, pairs
  return jnp.mean(jnp.square(outputs), axis=(1, 2, 3))


def _weighted(weights: Callable[[Schedule], np.ndarray]) -> Value:
  """The squared errors of ε times weights(schedule)[t]."""

  def value(schedule: Schedule, outputs: jax.Array, pairs: Noised) -> jax.Array:
    return jnp.asarray(weights(schedule), jnp.float32)[pairs.t] * squared_errors(outputs, pairs)

  return value


def _check_timesteps(schedule: Schedule, timesteps: Sequence[int]) -> None:
  if not timesteps or not all(0 <= t < schedule.num_steps for t in timesteps):
    raise ValueError(
      f"Timesteps must lie in [0, {schedule.num_steps}), counted from 0; got {list(timesteps)}."
    )


@functools.lru_cache(maxsize=64)  # so that equal names share a compiled kernel
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


# The training loss ℓ(θ, x): mean squared error of ε over pixels and channels, t uniform.
LOSS = Measurement(draw_pairs, _squared_errors, name="loss")

MEASUREMENTS = {
  "loss": LOSS,
  "elbo": Measurement(draw_pairs, _weighted(elbo), elbo_constant, name="elbo"),
  "elbo_large": Measurement(
    draw_pairs,
    _weighted(elbo_large),
    functools.partial(elbo_constant, variances=large_variances),
    name="elbo_large",
  ),
  "simple_elbo": Measurement(draw_pairs, _weighted(simple_elbo), name="simple_elbo"),
  "trajectory": Measurement(
    draw_transitions, _weighted(elbo), trajectory_constant, of="trajectories", name="trajectory"
  ),
  "square_norm": Measurement(draw_pairs, _square_norms, name="square_norm"),
}

# Name → measurement from the text in brackets.
PARAMETERISED: dict[str, Callable[[str], Measurement]] = {
  "loss_at_timestep": _one_timestep,
  "weighted_loss": weighted_loss,
  "journey_loss": lambda text: journey_loss(_integers(text)),
}
