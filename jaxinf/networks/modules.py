"""The layers of the DDPM U-Net and of autoencoders, channels last, as diffusers computes them.

Every weight sits in a plain `nn.Conv` or `nn.Dense` that is called once, in float32, and none of
these calls is compiled on its own: curvature is fitted by matching them in the traced graph.

Names of submodules are diffusers' names, so that a flax path is diffusers' dotted path with "_" for
the "." before a digit (`attentions.0.to_out.0` is `attentions_0/to_out_0`). Weights start as in
PyTorch, U(±1/sqrt(fan_in)), and biases at zero.

Shapes: B examples, H × W pixels, C channels, E channels of the time embedding.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num, UInt

KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x · σ(x), from primitives: `jax.nn.silu` would put a compiled call into the traced graph."""
  return x * jax.lax.logistic(x)


def timestep_embedding(
  t: Num[Array, " B"], size: int, *, sin_first: bool, freq_shift: float
) -> Float[Array, "B size"]:
  """Returns [sin(t·f_i), cos(t·f_i)] with f_i = 10000^(−i / (h − freq_shift)), i < h = size // 2.

  Args:
    t: timesteps from 0, or times of a continuous process in thousandths.
    size: width of the result; an odd width ends in a zero.
    sin_first: the sines come before the cosines; False puts the cosines first.
    freq_shift: 1 makes the last frequency exactly 1/10000, 0 stops short of it.
  """
  half = size // 2
  # The frequencies are rounded to float32 in diffusers' order of operations: at t near 1000 another
  # rounding of f_i moves the phase by up to 6e-5.
  exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
  freqs = np.exp(exponent / np.float32(half - freq_shift))
  phase = t.astype(jnp.float32)[:, None] * freqs[None, :]
  parts = [jnp.sin(phase), jnp.cos(phase)]
  if not sin_first:
    parts.reverse()
  if size % 2:
    parts.append(jnp.zeros((t.shape[0], 1), jnp.float32))
  return jnp.concatenate(parts, axis=-1)


def conv3x3(features: int, name: str, *, stride: int = 1, padding: tuple[int, int] = (1, 1)):
  """A 3 × 3 convolution; `padding` is zeros (before, after) along both image axes."""
  return nn.Conv(
    features, (3, 3), strides=stride, padding=(padding, padding), kernel_init=KERNEL_INIT, name=name
  )


def conv1x1(features: int, name: str | None = None):
  """A 1 × 1 convolution."""
  return nn.Conv(features, (1, 1), kernel_init=KERNEL_INIT, name=name)


def dense(features: int, name: str):
  """A dense layer with bias."""
  return nn.Dense(features, kernel_init=KERNEL_INIT, name=name)


def group_norm(groups: int, eps: float, name: str):
  """GroupNorm with scale and bias; the variance is two-pass, as E[x²] − E[x]² loses digits."""
  return nn.GroupNorm(num_groups=groups, epsilon=eps, use_fast_variance=False, name=name)


class Dropout(nn.Module):
  """Zeroes each entry with probability `rate` and divides the others by 1 − rate.

  The mask of an example is drawn from fold_in(key of this layer, dropout id of the example) and so
  does not depend on the example's place in the batch or on how the batch is split over devices.
  """

  rate: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], dropout_ids: UInt[Array, " B"] | None
  ) -> Float[Array, "B H W C"]:
    """Returns x with dropout, or x itself where `dropout_ids` is None or the rate is 0."""
    if dropout_ids is None or self.rate == 0:
      return x
    layer_key = self.make_rng("dropout")

    def mask(dropout_id):
      return jax.random.bernoulli(
        jax.random.fold_in(layer_key, dropout_id), 1 - self.rate, x.shape[1:]
      )

    return jnp.where(jax.vmap(mask)(dropout_ids), x / (1 - self.rate), 0.0)


class TimeEmbedding(nn.Module):
  """Two dense layers with a SiLU between: sinusoidal features [B, F] → embedding [B, E]."""

  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B E"]:
    x = dense(self.features, "linear_1")(x)
    return dense(self.features, "linear_2")(silu(x))


class ConditioningEmbedding(nn.Module):
  """What a model is given beside time, as a vector to be added to the time embedding.

  The sum of a row of a table for class labels, whose last row stands for labels left out, and of a
  dense layer of text embeddings, of which the mean over tokens counts. Attention to single tokens
  is for networks with cross-attention.
  """

  features: int
  num_classes: int | None

  @nn.compact
  def __call__(self, conditioning: Mapping[str, Array]) -> Float[Array, "B E"]:
    """The embedding of {"labels": [B] integers, "text": [B, L, D] or [B, D]}, or of one of both.

    Labels lie in 0…num_classes; ValueError for other entries, or labels where num_classes is None.
    """
    if not isinstance(conditioning, Mapping) or not set(conditioning) <= {"labels", "text"}:
      names = list(conditioning) if isinstance(conditioning, Mapping) else type(conditioning)
      raise ValueError(f'conditioning must be a dict of "labels", "text" or both; got {names}')
    parts = []
    if "labels" in conditioning:
      if self.num_classes is None:
        raise ValueError("the network was built without num_classes: it takes no labels")
      table = nn.Embed(self.num_classes + 1, self.features, name="class_embedding")
      parts.append(table(conditioning["labels"]))
    if "text" in conditioning:
      text = conditioning["text"].astype(jnp.float32)
      pooled = text.mean(axis=1) if text.ndim == 3 else text
      parts.append(dense(self.features, "text_embedding")(pooled))
    return sum(parts[1:], start=parts[0])


class ResnetBlock(nn.Module):
  """GroupNorm → SiLU → conv, twice, plus the input; conditioned on time where there is one.

  With scale_shift the second norm's output h becomes h · (1 + scale) + shift, (scale, shift) being
  a dense layer of SiLU(time embedding); otherwise that layer's output is added before the norm.
  Without a time embedding that layer is left out. The input passes a 1 × 1 convolution where the
  number of channels changes.
  """

  features: int
  norm_groups: int
  norm_eps: float
  scale_shift: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    time: Float[Array, "B E"] | None = None,
    dropout_ids: UInt[Array, " B"] | None = None,
  ) -> Float[Array, "B H W features"]:
    h = silu(group_norm(self.norm_groups, self.norm_eps, "norm1")(x))
    h = conv3x3(self.features, "conv1")(h)
    norm2 = group_norm(self.norm_groups, self.norm_eps, "norm2")
    if time is None:
      h = norm2(h)
    else:
      width = 2 * self.features if self.scale_shift else self.features
      time = dense(width, "time_emb_proj")(silu(time))[:, None, None, :]
      if self.scale_shift:
        h = norm2(h) * (1 + time[..., : self.features]) + time[..., self.features :]
      else:
        h = norm2(h + time)
    h = Dropout(self.dropout, name="dropout")(silu(h), dropout_ids)
    h = conv3x3(self.features, "conv2")(h)
    if x.shape[-1] != self.features:
      x = conv1x1(self.features, "conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Self-attention over the pixels of an image, plus the input.

  softmax(Q Kᵀ / sqrt(head_dim)) V in C / head_dim heads; Q, K, V and the output projection are
  dense layers on [B, H·W, C].
  """

  head_dim: int | None  # None: one head of all channels
  norm_groups: int | None  # None: no GroupNorm before the projections
  norm_eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    channels = x.shape[-1]
    h = x
    if self.norm_groups is not None:
      h = group_norm(self.norm_groups, self.norm_eps, "group_norm")(h)
    h = h.reshape(h.shape[0], -1, channels)  # [B, L, C], L = H·W
    head_dim = self.head_dim or channels
    heads = (*h.shape[:2], channels // head_dim, head_dim)  # [B, L, heads, head_dim]
    query = dense(channels, "to_q")(h).reshape(heads)
    key = dense(channels, "to_k")(h).reshape(heads)
    value = dense(channels, "to_v")(h).reshape(heads)
    logits = jnp.einsum("blhd,bmhd->bhlm", query, key) / math.sqrt(head_dim)
    weights = jax.nn.softmax(logits, axis=-1)
    h = jnp.einsum("bhlm,bmhd->blhd", weights, value).reshape(h.shape)
    return x + dense(channels, "to_out_0")(h).reshape(x.shape)


class Downsample(nn.Module):
  """A 3 × 3 convolution of stride 2: [B, H, W, C] → [B, H/2, W/2, C].

  Padding 1 puts one row of zeros on every side; padding 0 puts it at the bottom and right only.
  """

  padding: int

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    padding = (0, 1) if self.padding == 0 else (self.padding, self.padding)
    return conv3x3(x.shape[-1], "conv", stride=2, padding=padding)(x)


class Upsample(nn.Module):
  """Doubles every pixel along both axes, then a 3 × 3 convolution: → [B, 2H, 2W, C]."""

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return conv3x3(channels, "conv")(x.reshape(batch, 2 * height, 2 * width, channels))
