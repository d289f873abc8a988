"""The autoencoder of latent diffusion (Rombach et al., 2022), diffusers' `AutoencoderKL`.

The encoder takes an image x [H, W, C] down through the levels and gives the mean μ and the log
variance ln σ² of the normal distribution q(z | x) of its latents z [H/f, W/f, c], where f is
2^(levels − 1). The decoder takes z back up to an image. The levels are those of the U-Net, without
skips and without time. `latents.py` runs the net over many images, and `diffusers.py` reads and
writes diffusers' files.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxinf.core.random import fold_in_each
from jaxinf.networks import modules
from jaxinf.networks.unet import DownBlock, MidBlock

# ln σ² of posteriors is kept within these, as in diffusers, so that σ is a number of float32.
LOGVAR_RANGE = (-30.0, 20.0)


@flax.struct.dataclass
class Posterior:
  """The normal distribution q(z | x) of each image's latents, before scaling and shift.

  Attributes:
    mean: μ [N, h, w, c] float32.
    logvar: ln σ² [N, h, w, c] float32, in [-30, 20].
  """

  mean: Array
  logvar: Array

  def mode(self) -> Array:
    """The likeliest latents, μ [N, h, w, c]."""
    return self.mean

  def sample(self, key: jax.Array) -> jax.Array:
    """Latents z = μ + σ ε [N, h, w, c] with ε standard normal.

    Args:
      key: of jax.random.key: one for all, from which image i draws by fold_in(key, i), or keys [N],
        such as those of examples and draws.

    Raises:
      ValueError: `key` is no such key, or there are not N of them.
    """
    num = self.mean.shape[0]
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (num,)):
      raise ValueError(
        f"Posterior.sample takes one key or {num} keys, of jax.random.key(seed); got an array of "
        f"{key.dtype} and shape {key.shape}."
      )
    keys = key if key.ndim else fold_in_each(key, jnp.arange(num))
    noise = jax.vmap(lambda k: jax.random.normal(k, self.mean.shape[1:], jnp.float32))(keys)
    return self.mean + jnp.exp(0.5 * self.logvar) * noise


class AutoencoderKL(nn.Module):
  """Encodes images to posteriors of latents, and decodes latents to images, all float32.

  The defaults are the autoencoder of Stable Diffusion 1 and 2, of 83,653,863 parameters. Raises
  ValueError where the fields do not fit.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  channels: tuple[int, ...] = (128, 256, 512, 512)  # by level, highest resolution first
  blocks_per_level: int = 2  # residual blocks of a level going down; one more going up
  norm_groups: int = 32
  norm_eps: float = 1e-6
  mid_attention: bool = True
  use_quant_conv: bool = True  # a 1 × 1 convolution after the encoder
  use_post_quant_conv: bool = True  # one before the decoder

  def __post_init__(self):
    _check_fields(self)
    super().__post_init__()

  def setup(self):
    inner = (self.channels, self.norm_groups, self.norm_eps, self.mid_attention)
    self.encoder = Encoder(2 * self.latent_channels, self.blocks_per_level, *inner)
    self.decoder = Decoder(self.out_channels, self.blocks_per_level + 1, *inner)
    if self.use_quant_conv:
      self.quant_conv = modules.conv1x1(2 * self.latent_channels)
    if self.use_post_quant_conv:
      self.post_quant_conv = modules.conv1x1(self.latent_channels)

  @property
  def factor(self) -> int:
    """Pixels along an axis for one latent, f."""
    return 2 ** (len(self.channels) - 1)

  def encode(self, images: Float[Array, "B H W in_channels"]) -> Posterior:
    """The posteriors of images in [-1, 1], whose H and W are multiples of `factor`."""
    check_images(self, images.shape)
    moments = self.encoder(images)
    if self.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

  def decode(self, latents: Float[Array, "B h w latent_channels"]) -> Array:
    """Images [B, f·h, f·w, out_channels], about in [-1, 1], from latents before scaling."""
    check_latents(self, latents.shape)
    if self.use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def __call__(self, images: Float[Array, "B H W in_channels"]) -> Array:
    """Images encoded to the mode of their posteriors and decoded again."""
    return self.decode(self.encode(images).mode())


class Encoder(nn.Module):
  """Images to the numbers that moments of latents are made of: [B, H/f, W/f, out_channels]."""

  out_channels: int
  num_resnets: int  # of a level
  channels: tuple[int, ...]
  norm_groups: int
  norm_eps: float
  mid_attention: bool

  @nn.compact
  def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w out_channels"]:
    resnet, attention = _inner_blocks(self)
    h = modules.conv3x3(self.channels[0], "conv_in")(images)
    for level, width in enumerate(self.channels):
      h, _ = DownBlock(
        features=width,
        num_resnets=self.num_resnets,
        resnet=resnet,
        attention=None,
        downsample_padding=0 if level < len(self.channels) - 1 else None,
        name=f"down_blocks_{level}",
      )(h)
    h = MidBlock(self.channels[-1], resnet, attention, name="mid_block")(h)
    h = modules.silu(modules.group_norm(self.norm_groups, self.norm_eps, "conv_norm_out")(h))
    return modules.conv3x3(self.out_channels, "conv_out")(h)


class Decoder(nn.Module):
  """Latents to images [B, f·h, f·w, out_channels]; the fields are those of `Encoder`."""

  out_channels: int
  num_resnets: int
  channels: tuple[int, ...]
  norm_groups: int
  norm_eps: float
  mid_attention: bool

  @nn.compact
  def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W out_channels"]:
    resnet, attention = _inner_blocks(self)
    h = modules.conv3x3(self.channels[-1], "conv_in")(latents)
    h = MidBlock(self.channels[-1], resnet, attention, name="mid_block")(h)
    for i, width in enumerate(reversed(self.channels)):
      h = DecoderBlock(
        features=width,
        num_resnets=self.num_resnets,
        resnet=resnet,
        upsample=i < len(self.channels) - 1,
        name=f"up_blocks_{i}",
      )(h)
    h = modules.silu(modules.group_norm(self.norm_groups, self.norm_eps, "conv_norm_out")(h))
    return modules.conv3x3(self.out_channels, "conv_out")(h)


class DecoderBlock(nn.Module):
  """The residual blocks of one level going up, then doubles the resolution."""

  features: int
  num_resnets: int
  resnet: Callable[..., nn.Module]
  upsample: bool  # False: the highest level

  @nn.compact
  def __call__(self, h: Float[Array, "B H W C"]) -> Array:
    for i in range(self.num_resnets):
      h = self.resnet(self.features, name=f"resnets_{i}")(h)
    return modules.Upsample(name="upsamplers_0")(h) if self.upsample else h


def _inner_blocks(coder: Encoder | Decoder) -> tuple[Any, Any]:
  """What makes a residual block, and the attention of the middle block or None."""
  groups, eps = coder.norm_groups, coder.norm_eps
  resnet = partial(modules.ResnetBlock, norm_groups=groups, norm_eps=eps)
  attention = partial(modules.Attention, head_dim=None, norm_groups=groups, norm_eps=eps)
  return resnet, attention if coder.mid_attention else None


def check_images(module: AutoencoderKL, shape: tuple[int, ...]) -> None:
  """Raises a ValueError unless images of this shape can be encoded."""
  f, channels = module.factor, module.in_channels
  if len(shape) != 4:
    raise ValueError(
      f"Images to encode are [N, H, W, {channels}]; got shape {shape}. A single image needs a "
      "first axis: image[None]."
    )
  if shape[3] != channels:
    turn = "; turn them with .transpose(0, 2, 3, 1)" if shape[1] == channels else ""
    raise ValueError(
      f"This autoencoder takes images [N, H, W, {channels}]; got {shape[3]} channels, of shape "
      f"{shape}{turn}."
    )
  if shape[1] % f or shape[2] % f or 0 in shape[1:3]:
    raise ValueError(
      f"H and W of images to encode must be multiples of {f}, pixels for one latent; got "
      f"{shape[1]} × {shape[2]}. Crop or resize them."
    )


def check_latents(module: AutoencoderKL, shape: tuple[int, ...]) -> None:
  """Raises a ValueError unless latents of this shape can be decoded."""
  if len(shape) != 4 or shape[3] != module.latent_channels:
    raise ValueError(
      f"Latents to decode are [N, h, w, {module.latent_channels}], as `encode` gives them; got "
      f"shape {shape}."
    )


def _check_fields(module: AutoencoderKL) -> None:
  """Raises a ValueError that names the first field of `module` that cannot be."""
  channels, groups = module.channels, module.norm_groups
  if not channels or min(channels) < 1:
    raise ValueError(f"AutoencoderKL: channels={channels} must hold one positive width a level")
  counts = ("in_channels", "out_channels", "latent_channels", "blocks_per_level", "norm_groups")
  for name in counts:
    if getattr(module, name) < 1:
      raise ValueError(f"AutoencoderKL: {name}={getattr(module, name)} must be at least 1")
  bad = [width for width in channels if width % groups]
  if bad:
    raise ValueError(
      f"AutoencoderKL: norm_groups={groups} must divide every width in channels, not {bad}"
    )
