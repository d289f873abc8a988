"""The DDPM U-Net (Ho et al., 2020), layer for layer the net that diffusers calls `UNet2DModel`.

The image goes down through the levels, highest resolution first, through a middle block, and up
again. Every residual block and down-sampler on the way down leaves its output on a stack of skips;
every residual block on the way up takes the latest skip off the stack, beside its own input.
See `modules.py` for the layers and `diffusers.py` for reading and writing diffusers' files.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num, UInt

from jaxinf.networks import modules


class UNet(nn.Module):
  """Predicts from noised images: [B, H, W, C] float32 in, [B, H, W, out_channels] out.

  H and W must be multiples of 2^(levels − 1). Raises ValueError where the fields do not fit. The
  defaults are the network of 38.3 M parameters that the paper trains on CIFAR-10.
  """

  out_channels: int
  channels: tuple[int, ...] = (128, 256, 256, 256)  # by level, highest resolution first
  blocks_per_level: int = 2  # residual blocks of a level going down; one more going up
  # By level: attention after each residual block, down and up.
  attention_levels: tuple[bool, ...] = (False, True, False, False)
  norm_groups: int = 32  # of GroupNorm; every number of channels is a multiple of it
  norm_eps: float = 1e-6  # that GroupNorm adds to variances
  scale_shift: bool = True  # time scales and shifts a norm's output; False: added before the norm
  sin_first: bool = True  # order of the sinusoidal time features
  freq_shift: float = 1.0  # see modules.timestep_embedding
  dropout: float = 0.1  # share of activations dropped in training
  downsample_padding: int = 0  # 1: on every side; 0: bottom and right only
  mid_attention: bool = True  # whether the middle block has attention
  head_dim: int | None = None  # channels of an attention head; None: a single head
  num_classes: int | None = None  # of labels; None: there are none

  def __post_init__(self):
    _check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x_t: Float[Array, "B H W C"],
    t: Num[Array, " B"],
    conditioning: Mapping[str, Array] | None = None,
    *,
    dropout_ids: UInt[Array, " B"] | None = None,
  ) -> Float[Array, "B H W out_channels"]:
    """Returns what the process says is predicted, such as ε.

    Args:
      x_t: noised images.
      t: timesteps from 0, or times of a continuous process in thousandths.
      conditioning: labels and text embeddings; see modules.ConditioningEmbedding. None: neither.
      dropout_ids: None turns dropout off. Otherwise dropout is on, and the masks of an example
        follow from the "dropout" key and its id alone, wherever it stands in the batch.
    """
    _check_inputs(self, x_t, t)
    resnet, level_attention, mid_attention = _inner_blocks(self)
    last = len(self.channels) - 1

    # 1. Time.
    features = modules.timestep_embedding(
      t, self.channels[0], sin_first=self.sin_first, freq_shift=self.freq_shift
    )
    time = modules.TimeEmbedding(4 * self.channels[0], name="time_embedding")(features)
    if conditioning is not None:
      embedding = modules.ConditioningEmbedding(
        4 * self.channels[0], self.num_classes, name="conditioning"
      )
      time = time + embedding(conditioning)

    # 2. Down.
    h = modules.conv3x3(self.channels[0], "conv_in")(x_t)
    skips = [h]
    for level, width in enumerate(self.channels):
      h, outputs = DownBlock(
        features=width,
        num_resnets=self.blocks_per_level,
        resnet=resnet,
        attention=level_attention[level],
        downsample_padding=None if level == last else self.downsample_padding,
        name=f"down_blocks_{level}",
      )(h, time, dropout_ids)
      skips += outputs

    # 3. Middle.
    h = MidBlock(self.channels[-1], resnet, mid_attention, name="mid_block")(h, time, dropout_ids)

    # 4. Up: block i works on level `last - i`.
    for i, level in enumerate(reversed(range(last + 1))):
      taken = [skips.pop() for _ in range(self.blocks_per_level + 1)]
      h = UpBlock(
        features=self.channels[level],
        resnet=resnet,
        attention=level_attention[level],
        upsample=level > 0,
        name=f"up_blocks_{i}",
      )(h, taken, time, dropout_ids)

    # 5. Out.
    h = modules.silu(modules.group_norm(self.norm_groups, self.norm_eps, "conv_norm_out")(h))
    return modules.conv3x3(self.out_channels, "conv_out")(h)


def _inner_blocks(model: UNet) -> tuple[Any, list[Any], Any]:
  """What makes a residual block, the attention of each level, and that of the middle block."""
  resnet = partial(
    modules.ResnetBlock,
    norm_groups=model.norm_groups,
    norm_eps=model.norm_eps,
    scale_shift=model.scale_shift,
    dropout=model.dropout,
  )
  attention = partial(modules.Attention, head_dim=model.head_dim, norm_eps=model.norm_eps)
  normed = partial(attention, norm_groups=model.norm_groups)
  # diffusers leaves out the GroupNorm of the middle attention under scale_shift.
  middle = partial(attention, norm_groups=None) if model.scale_shift else normed
  levels = [normed if used else None for used in model.attention_levels]
  return resnet, levels, middle if model.mid_attention else None


class DownBlock(nn.Module):
  """The residual blocks of one level going down, then halves the resolution."""

  features: int
  num_resnets: int
  resnet: Callable[..., nn.Module]
  attention: Callable[..., nn.Module] | None
  downsample_padding: int | None  # None: the lowest level, which keeps its resolution

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "B H W C"],
    time: Float[Array, "B E"] | None = None,
    dropout_ids: UInt[Array, " B"] | None = None,
  ) -> tuple[Array, list[Array]]:
    """Returns the output and the skips, earliest first."""
    skips = []
    for i in range(self.num_resnets):
      h = self.resnet(self.features, name=f"resnets_{i}")(h, time, dropout_ids)
      if self.attention is not None:
        h = self.attention(name=f"attentions_{i}")(h)
      skips.append(h)
    if self.downsample_padding is not None:
      h = modules.Downsample(self.downsample_padding, name="downsamplers_0")(h)
      skips.append(h)
    return h, skips


class MidBlock(nn.Module):
  """Residual block, attention, residual block at the lowest resolution."""

  features: int
  resnet: Callable[..., nn.Module]
  attention: Callable[..., nn.Module] | None

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "B H W C"],
    time: Float[Array, "B E"] | None = None,
    dropout_ids: UInt[Array, " B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    h = self.resnet(self.features, name="resnets_0")(h, time, dropout_ids)
    if self.attention is not None:
      h = self.attention(name="attentions_0")(h)
    return self.resnet(self.features, name="resnets_1")(h, time, dropout_ids)


class UpBlock(nn.Module):
  """One residual block a skip at one level going up, then doubles the resolution."""

  features: int
  resnet: Callable[..., nn.Module]
  attention: Callable[..., nn.Module] | None
  upsample: bool  # False: the highest level

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "B H W C"],
    skips: list[Array],
    time: Float[Array, "B E"],
    dropout_ids: UInt[Array, " B"] | None,
  ) -> Array:
    for i, skip in enumerate(skips):
      h = jnp.concatenate([h, skip], axis=-1)
      h = self.resnet(self.features, name=f"resnets_{i}")(h, time, dropout_ids)
      if self.attention is not None:
        h = self.attention(name=f"attentions_{i}")(h)
    return modules.Upsample(name="upsamplers_0")(h) if self.upsample else h


def _check_fields(model: UNet) -> None:
  """Raises a ValueError that names the first field of `model` that cannot be."""
  channels, groups, head_dim = model.channels, model.norm_groups, model.head_dim
  if not channels or min(channels) < 1:
    raise ValueError(f"UNet: channels={channels} must hold one positive width a level")
  if len(model.attention_levels) != len(channels):
    raise ValueError(
      f"UNet: attention_levels={model.attention_levels} must hold one entry a level, and "
      f"channels={channels} has {len(channels)}"
    )
  for name in ("out_channels", "blocks_per_level", "norm_groups"):
    if getattr(model, name) < 1:
      raise ValueError(f"UNet: {name}={getattr(model, name)} must be at least 1")
  bad = [width for width in channels if width % groups]
  if bad:
    raise ValueError(f"UNet: norm_groups={groups} must divide every width in channels, not {bad}")
  attended = [width for width, used in zip(channels, model.attention_levels, strict=True) if used]
  if model.mid_attention:
    attended.append(channels[-1])
  if head_dim is not None and (head_dim < 1 or any(width % head_dim for width in attended)):
    raise ValueError(
      f"UNet: head_dim={head_dim} must divide the widths that have attention, {attended}; "
      "None is a single head"
    )
  if channels[0] // 2 <= model.freq_shift:
    raise ValueError(
      f"UNet: freq_shift={model.freq_shift} must be below half of channels[0]={channels[0]}"
    )
  if not 0 <= model.dropout < 1:
    raise ValueError(f"UNet: dropout={model.dropout} must be in [0, 1)")
  if model.downsample_padding not in (0, 1):
    raise ValueError(
      f"UNet: downsample_padding={model.downsample_padding} must be 1 (every side) or 0 (bottom "
      "and right only)"
    )


def _check_inputs(model: UNet, x_t: Array, t: Array) -> None:
  """Raises a ValueError where the shapes of the images and timesteps do not fit."""
  factor = 2 ** (len(model.channels) - 1)
  if x_t.ndim != 4 or x_t.shape[1] % factor or x_t.shape[2] % factor:
    raise ValueError(
      f"UNet: x_t must be [B, H, W, C] with H and W divisible by {factor} "
      f"({len(model.channels)} levels), not of shape {x_t.shape}"
    )
  if t.shape != x_t.shape[:1]:
    raise ValueError(
      f"UNet: t must have shape {x_t.shape[:1]}, one timestep an image, not {t.shape}"
    )
