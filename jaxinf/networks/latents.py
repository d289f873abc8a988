"""Images to latents and back, through the frozen autoencoder of a latent diffusion model.

The diffusion model lives on scaled latents (z − shift) · scaling, of about unit variance, and the
autoencoder on z itself. `encode` and `decode` give and take z; `scaled` and `unscaled` go between.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from jaxinf.core.arrays import as_array, as_float, blocks, fingerprint, is_floating
from jaxinf.core.examples import checked_data
from jaxinf.core.types import Array, Batch, Params
from jaxinf.engine import Rows, map_batches
from jaxinf.networks.autoencoder import AutoencoderKL, Posterior, check_images, check_latents
from jaxinf.networks.tiles import decode_tiles

# Decoded images overshoot [-1, 1] by some percent, and may be encoded again. Numbers beyond this
# are pixels in 0…255, or images that were normalised otherwise.
_MOST_OF_A_PIXEL = 2.0


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Autoencoder:
  """An autoencoder with its parameters, and how the diffusion model scales its latents.

  Attributes:
    module: the net; f = module.factor pixels along an axis become one latent.
    params: its parameters, as module.init(…)["params"] has them.
    scaling_factor: what latents are multiplied with, not zero.
    shift_factor: what is subtracted before.

  Raises:
    ValueError: params of another net, or factors that are no finite numbers.
  """

  module: AutoencoderKL
  params: Params
  scaling_factor: float
  shift_factor: float = 0.0

  def __post_init__(self):
    for name in ("scaling_factor", "shift_factor"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}.")
    if self.scaling_factor == 0:
      raise ValueError("scaling_factor must not be zero: latents could not be unscaled.")
    wanted = {"encoder", "decoder"}
    wanted |= {n for n in ("quant_conv", "post_quant_conv") if getattr(self.module, f"use_{n}")}
    if set(self.params) != wanted:
      raise ValueError(
        f"params of this autoencoder hold {sorted(wanted)}; got {sorted(self.params)}. Pass what "
        'module.init(...)["params"] returns.'
      )

  def encode(
    self, images: Any, *, batch_size: int = 8, devices: Sequence[jax.Device] | None = None
  ) -> Posterior:
    """The posteriors of the latents of images, before scaling, as NumPy arrays.

    Args:
      images: [N, H, W, C] uint8, or floating-point numbers in [-1, 1]; H and W are multiples of f.
        Any array that gives rows; it is read a batch at a time.
      batch_size: images at a time over all devices.
      devices: local devices; all of them where None.

    Returns:
      Posterior with mean and logvar [N, H/f, W/f, latent_channels] float32.

    Raises:
      ValueError: images of another rank, of other channels, of a size that is no multiple of f,
        not finite, or far outside of [-1, 1].
    """
    images = as_array(images)
    check_images(self.module, tuple(images.shape))
    images = checked_data(images)
    _check_pixels(images)
    return self._mapped(EncodeKernel(self.module), images, batch_size, devices)

  def decode(
    self, latents: Any, *, batch_size: int = 8, devices: Sequence[jax.Device] | None = None
  ) -> np.ndarray:
    """Images [N, f·h, f·w, out_channels] float32, about in [-1, 1], which nothing clips.

    Args:
      latents: [N, h, w, latent_channels] before scaling, as `encode` gives them; `unscaled` makes
        such of those of the diffusion model.
      batch_size, devices: as for `encode`, in latents of images.

    Raises:
      ValueError: latents of another rank or other channels, or not finite.
    """
    latents = self._checked_latents(latents)
    return self._mapped(DecodeKernel(self.module), latents, batch_size, devices)

  def decode_tiled(
    self,
    latents: Any,
    *,
    tile: int = 64,
    overlap: int | None = None,
    batch_size: int = 1,
    devices: Sequence[jax.Device] | None = None,
  ) -> np.ndarray:
    """Images as of `decode`, from overlapping tiles, for images that are too large for the devices.

    They are those of diffusers' tiled decoding with a tile of the same size. Where one tile covers
    all latents, they are those of `decode`.

    Args:
      latents: as for `decode`.
      tile: height and width of a tile in latents, 1/f of its pixels.
      overlap: latents that neighbouring tiles share along an axis; a quarter of a tile where None.
      batch_size: tiles at a time over all devices.
      devices: local devices; all of them where None.

    Raises:
      ValueError: as for `decode`; or tile is below 1, or overlap not in 0 … tile − 1.
    """
    kernel = DecodeKernel(self.module)
    return decode_tiles(
      lambda tiles: self._mapped(kernel, tiles, batch_size, devices),
      np.asarray(self._checked_latents(latents), np.float32),
      tile=tile,
      overlap=overlap,
      factor=self.module.factor,
    )

  def scaled(self, latents: Array) -> Array:
    """Latents of the diffusion model, (z − shift) · scaling, from those of the autoencoder."""
    return (latents - self.shift_factor) * self.scaling_factor

  def unscaled(self, latents: Array) -> Array:
    """Latents of the autoencoder, z / scaling + shift, from those of the diffusion model."""
    return latents / self.scaling_factor + self.shift_factor

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of fields, factors and parameters: latents of another autoencoder have another."""
    fields = {
      field.name: getattr(self.module, field.name)
      for field in dataclasses.fields(self.module)
      if field.name not in ("parent", "name")
    }
    # Names have no "/" where they are not of parameters.
    arrays: dict[str, Any] = {
      "fields": np.frombuffer(repr(sorted(fields.items())).encode(), np.uint8),
      "factors": np.array([self.scaling_factor, self.shift_factor], np.float64),
    }
    return fingerprint(arrays | traverse_util.flatten_dict(dict(self.params), sep="/"))

  def __repr__(self) -> str:
    widths = "-".join(map(str, self.module.channels))
    return (
      f"Autoencoder({widths}, {self.module.latent_channels} latent channels, "
      f"scaling {self.scaling_factor}, shift {self.shift_factor})"
    )

  def _checked_latents(self, latents: Any) -> Any:
    latents = as_array(latents)
    check_latents(self.module, tuple(latents.shape))
    if not is_floating(latents.dtype):
      raise ValueError(f"Latents are floating-point numbers; got {np.dtype(latents.dtype)}.")
    return checked_data(latents)

  def _mapped(
    self,
    kernel: "EncodeKernel | DecodeKernel",
    data: Any,
    batch_size: int,
    devices: Sequence[jax.Device] | None,
  ) -> Any:
    return map_batches(
      kernel,
      {name: params for name, params in self.params.items() if name in kernel.uses},
      Rows(data, np.arange(data.shape[0], dtype=np.uint32)),
      batch_size=batch_size,
      label=kernel.label,
      unit="images",
      devices=devices,
    )


@dataclasses.dataclass(frozen=True)
class EncodeKernel:
  """Kernel from parameters (those of `uses`) and images to a Posterior, before scaling."""

  module: AutoencoderKL
  label: ClassVar[str] = "encode"
  uses: ClassVar[frozenset[str]] = frozenset({"encoder", "quant_conv"})

  def __call__(self, params: Params, batch: Batch) -> Any:
    return self.module.apply({"params": params}, as_float(batch.data), method="encode")


@dataclasses.dataclass(frozen=True)
class DecodeKernel:
  """Kernel from parameters (those of `uses`) and latents before scaling to images."""

  module: AutoencoderKL
  label: ClassVar[str] = "decode"
  uses: ClassVar[frozenset[str]] = frozenset({"decoder", "post_quant_conv"})

  def __call__(self, params: Params, batch: Batch) -> Any:
    return self.module.apply({"params": params}, batch.data, method="decode")


def _check_pixels(images: Any) -> None:
  """Raises a ValueError where floating-point images are far outside of [-1, 1]."""
  if not is_floating(images.dtype):
    return
  most = max(float(np.abs(block.astype(np.float32)).max()) for block in blocks(images))
  if most > _MOST_OF_A_PIXEL:
    raise ValueError(
      f"Images of floating-point numbers must be in [-1, 1]; the largest magnitude is {most:.4g}. "
      "Pass pixels in 0…255 as uint8, and map other images to [-1, 1]."
    )


class Preset(NamedTuple):
  """An autoencoder in general use: what its diffusers folder says beside the parameters."""

  module: AutoencoderKL
  scaling_factor: float
  shift_factor: float = 0.0


_WIDE = AutoencoderKL(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)

PRESETS: dict[str, Preset] = {
  "sd": Preset(AutoencoderKL(), 0.18215),  # Stable Diffusion 1 and 2
  "sdxl": Preset(AutoencoderKL(), 0.13025),
  "sd3": Preset(_WIDE, 1.5305, 0.0609),
  "flux": Preset(_WIDE, 0.3611, 0.1159),
}
