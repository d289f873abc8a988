"""A denoiser of dense layers only: small enough for experiments in seconds and exact curvature."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num, UInt

from jaxinf.networks import modules


class MLP(nn.Module):
  """Maps all numbers of x_t and sinusoidal features of t to as many outputs.

  Raises ValueError where a width is not positive.
  """

  hidden: tuple[int, ...]  # widths of the hidden layers; () is a linear net
  time_features: int
  num_classes: int | None = None  # of labels; None: there are none

  def __post_init__(self):
    if any(width < 1 for width in self.hidden):
      raise ValueError(f"MLP: hidden={self.hidden} must hold positive widths")
    if self.time_features < 2:
      raise ValueError(f"MLP: time_features={self.time_features} must be at least 2")
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, "B ..."],
    t: Num[Array, " B"],
    conditioning: Mapping[str, Array] | None = None,
    *,
    dropout_ids: UInt[Array, " B"] | None = None,
  ) -> Float[Array, "B ..."]:
    """Returns what the process says is predicted, in the shape of x_t; `dropout_ids` does nothing.

    Args:
      x_t: noised examples of any shape.
      t: timesteps from 0, or times of a continuous process in thousandths.
      conditioning: labels and text embeddings; see modules.ConditioningEmbedding. None: neither.
      dropout_ids: there is no dropout.
    """
    del dropout_ids
    time = modules.timestep_embedding(t, self.time_features, sin_first=True, freq_shift=0.0)
    features = [x_t.reshape(x_t.shape[0], -1), time]
    if conditioning is not None:
      embedding = modules.ConditioningEmbedding(
        self.time_features, self.num_classes, name="conditioning"
      )
      features.append(embedding(conditioning))
    h = jnp.concatenate(features, axis=-1)
    for i, width in enumerate(self.hidden):
      h = modules.silu(modules.dense(width, f"hidden_{i}")(h))
    return modules.dense(math.prod(x_t.shape[1:]), "out")(h).reshape(x_t.shape)
