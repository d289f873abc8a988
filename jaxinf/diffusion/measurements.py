"""What is attributed: measurements of an image under the model, larger = fits worse.

A measurement is an average over draws. Each draw makes one input of the network from the image and
a key, and a scalar of the network's output there. Training losses and query measurements are of
this one type, so that both gradients are one kernel, at the speed of an ordinary batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinf.diffusion.draws import UNIFORM, DrawDesign, draw_pairs
from jaxinf.diffusion.objective import Noised, float_images, predict, squared_errors
from jaxinf.diffusion.schedule import Schedule
from jaxinf.types import ApplyFn, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The mean over draws of value(ε_θ(x_t, t), pair), with the pair from (image, key).

  Attributes:
    draw: (schedule, images [B, H, W, C], keys [B, S], design) → B · S pairs, image-major, to which
      conditioning is added after.
    value: (network outputs [B, H, W, C], pairs) → [B].
  """

  draw: Callable[[Schedule, jax.Array, jax.Array, DrawDesign], Noised]
  value: Callable[[jax.Array, Noised], jax.Array]

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

  def cotangents(self, pairs: Noised, draws: int) -> Callable[[jax.Array], jax.Array]:
    """Gradient at the network's outputs of each image's measurement, a mean over `draws` pairs."""
    return lambda out: jax.grad(lambda y: jnp.sum(self.value(y, pairs)))(out) / draws

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
    """[B] measurements of images [B, H, W, C] with draws from keys [B, S]."""
    pairs = self.pairs(schedule, images, keys, conditioning, design)
    values = self.value(predict(apply_fn, params, pairs), pairs)
    return values.reshape(keys.shape).mean(axis=1)


def measurement_named(name: str) -> Measurement:
  """The measurement of that name; an unknown one is a ValueError that lists them."""
  if name not in MEASUREMENTS:
    raise ValueError(f"Unknown measurement {name!r}; there are: {', '.join(MEASUREMENTS)}.")
  return MEASUREMENTS[name]


# The training loss ℓ(θ, x): mean squared error of ε over pixels and channels, t uniform.
LOSS = Measurement(draw=draw_pairs, value=squared_errors)

MEASUREMENTS = {"loss": LOSS}
