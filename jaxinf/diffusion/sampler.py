"""Samplers of every process, on a grid of times from noise to data. One key a sample.

Each step leads from x_t to x_s with s < t, by the x̂_0 and ε̂ that the network's output implies:

ddpm         draws from q(x_s | x_t, x̂_0) (Ho et al. 2020, Algorithm 2, with the small variance).
             With x_t = (a_t / a_s) x_s + σ z and σ² = b_t² − (a_t / a_s)² b_s², this is
             N((a_s σ² x̂_0 + (a_t / a_s) b_s² x_t) / b_t², σ² b_s² / b_t²).
ddim, euler  x_s = a_s x̂_0 + b_s ε̂ (Song et al. 2021, Eq. 12 with η = 0). It is Euler's step of the
             probability-flow ODE of rectified flow and of EDM as well: with x_t = a_t x̂_0 + b_t ε̂
             it equals x_t + (s − t) (ε̂ − x̂_0) for flow, and x_t + (s − t) ε̂ for EDM. So both names
             stand for one function.

Discrete processes visit evenly spaced timesteps; flow evenly spaced times, shifted as in training;
EDM noise levels whose 7th roots are evenly spaced (Karras et al. 2022, Eq. 5), and then 0.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.augmentation import Constants
from jaxinf.core.checks import checked_count
from jaxinf.core.random import fold_in_each
from jaxinf.core.registry import named
from jaxinf.core.types import ApplyFn, Array, Params, PyTree
from jaxinf.diffusion.noise import network_output
from jaxinf.diffusion.process import Process

CONTINUOUS_STEPS = 100  # where a continuous process is sampled without saying in how many steps
_RHO = 7  # Karras et al. 2022


class Step(NamedTuple):
  """From x_t to x_s; [N] on the host for all steps of a sampler, scalars in one step."""

  t: Array  # int32 or float32
  number: Array  # int32, folded into a sample's key for the noise of the step
  a: Array  # a_t
  b: Array  # b_t
  next_a: Array  # a_s
  next_b: Array  # b_s
  of_image: Array  # the mean of q(x_s | x_t, x̂_0) is of_image · x̂_0 + of_state · x_t
  of_state: Array
  spread: Array  # its standard deviation


def sample(
  apply_fn: ApplyFn,
  params: Params,
  process: Process,
  keys: jax.Array,
  shape: tuple[int, ...],
  *,
  sampler: str = "ddpm",
  num_steps: int | None = None,
  keep_trajectory: bool = False,
  clip: bool = True,
  conditioning: PyTree = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Generates one example for each key.

  Args:
    apply_fn, params: the network.
    process: the one it was trained with.
    keys: [B], one a sample; a sample does not depend on the others.
    shape: of an example, as (H, W, C).
    sampler: one of SAMPLERS.
    num_steps: steps taken; at most T, and T where None, if the process is discrete; where it is
      continuous, any number, and 100 where None.
    keep_trajectory: whether to return the states on the way as well.
    clip: whether x̂_0 is clipped to [-1, 1] in every step.
    conditioning: pytree of arrays [B, …] for a conditional network.

  Returns:
    data [B, …] float32 (in [-1, 1] where clip), and the trajectory [num_steps + 1, B, …] from pure
    noise to the data, or None.
  """
  update = named(SAMPLERS, sampler, "sampler")
  steps = sampler_steps(process, num_steps)
  normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  drawn = lambda number: normal(fold_in_each(keys, jnp.full(keys.shape, number)))
  # Discrete: fold-in numbers 0 … T − 1 make the noise of a timestep, T the start.
  start = drawn(process.num_steps) if process.is_discrete else drawn(0) * steps.b[0]

  def one(x_t, step):
    t = jnp.full(keys.shape, step.t)
    output = network_output(apply_fn, params, *process.inputs(x_t, t), conditioning)
    image, noise = process.clean(x_t, t, output), process.noise(x_t, t, output)
    if clip:  # the ε that leads from the clipped image to x_t
      image = jnp.clip(image, -1, 1)
      noise = (x_t - step.a * image) / step.b
    x_next = update(step, x_t, image, noise, lambda: drawn(step.number))
    return x_next, x_next if keep_trajectory else None

  data, states = jax.lax.scan(one, start, jax.tree.map(jnp.asarray, steps))
  return data, jnp.concatenate([start[None], states]) if keep_trajectory else None


@dataclasses.dataclass(frozen=True)
class Guided:
  """A conditional network under classifier-free guidance (Ho and Salimans 2022).

  apply_fn(params, x, t, conditioning) = u + scale · (c − u), with the network's predictions c given
  the conditioning and u given `null` instead, one row that stands for every example.
  """

  apply_fn: ApplyFn
  scale: float
  null: Constants

  def __call__(self, params: Params, inputs: jax.Array, time: jax.Array, conditioning: PyTree):
    without = jax.tree.map(
      lambda null, row: jnp.broadcast_to(jnp.asarray(null, row.dtype), row.shape),
      self.null.tree,
      conditioning,
    )
    # One call for both: convolutions and products of twice the rows cost less than two calls.
    twice = lambda x, y: jnp.concatenate([x, y])
    both = self.apply_fn(
      params,
      twice(inputs, inputs),
      twice(time, time),
      jax.tree.map(twice, conditioning, without),
    )
    given, plain = jnp.split(both, 2)
    return plain + self.scale * (given - plain)


def ancestral_step(step, x_t, image, noise, drawn):
  """A draw from q(x_s | x_t, x̂_0); `drawn()` gives standard normal numbers."""
  del noise
  return step.of_image * image + step.of_state * x_t + step.spread * drawn()


def deterministic_step(step, x_t, image, noise, drawn):
  """x_s = a_s x̂_0 + b_s ε̂."""
  del x_t, drawn
  return step.next_a * image + step.next_b * noise


def sampler_steps(process: Process, num_steps: int | None = None) -> Step:
  """All steps of a sampler, NumPy arrays [N]; computed in float64.

  Raises:
    ValueError: num_steps is below 1, or above the T of a discrete process.
  """
  times = sampler_times(process, num_steps)
  a, b = process.exact_levels(times)
  a_t, a_s, b_t, b_s = a[:-1], a[1:], b[:-1], b[1:]
  ratios = a_t / a_s
  variances = b_t**2 - (ratios * b_s) ** 2
  of_image, of_state = a_s * variances / b_t**2, ratios * b_s**2 / b_t**2
  floats = a_t, b_t, a_s, b_s, of_image, of_state, np.sqrt(variances) * b_s / b_t
  t = times[:-1] if process.is_discrete else times[:-1].astype(np.float32)
  numbers = t if process.is_discrete else np.arange(1, len(times), dtype=np.int32)
  return Step(t, numbers, *(x.astype(np.float32) for x in floats))


def sampler_times(process: Process, num_steps: int | None = None) -> np.ndarray:
  """Times visited from the noisiest down, [N + 1]: the last is the data's, −1 or 0.0."""
  total = process.num_steps
  default = CONTINUOUS_STEPS if total is None else total
  num_steps = default if num_steps is None else checked_count(num_steps, "num_steps")
  if total is not None:
    if num_steps > total:
      raise ValueError(f"num_steps must lie in 1…{total}; got {num_steps}.")
    visited = np.round(np.linspace(total - 1, 0, num_steps))
    return np.append(visited, -1).astype(np.int32)
  if process.sigma_range is None:
    return process.shifted(np.linspace(1, 0, num_steps + 1))
  smallest, largest = (sigma ** (1 / _RHO) for sigma in process.sigma_range)
  return np.append(np.linspace(largest, smallest, num_steps) ** _RHO, 0.0)


SAMPLERS: dict[str, Callable[..., jax.Array]] = {
  "ddpm": ancestral_step,
  "ddim": deterministic_step,
  "euler": deterministic_step,
}
