"""Reads and writes models in diffusers' format: a folder of config.json and a safetensors file.

So a net trained elsewhere can be attributed, and one trained here can be sampled elsewhere. Options
that the net lacks, and tensors that are missing, unexpected or of another shape are refused by
name. PyTorch is not needed. `diffusers_files.py` has the rule of names and layouts,
`diffusers_config.py` and `diffusers_autoencoder.py` the options.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.core.types import ApplyFn
from jaxinf.networks import diffusers_autoencoder as autoencoder_config
from jaxinf.networks import diffusers_files as files
from jaxinf.networks.autoencoder import AutoencoderKL
from jaxinf.networks.diffusers_config import from_config, read_options, to_config
from jaxinf.networks.latents import Autoencoder
from jaxinf.networks.unet import UNet

__all__ = ["from_config", "load", "load_autoencoder", "save", "save_autoencoder"]


def load(folder: str | Path) -> tuple[ApplyFn, dict[str, Any]]:
  """Reads a U-Net saved by diffusers' `save_pretrained` or by `save`.

  Args:
    folder: holds config.json and diffusion_pytorch_model.safetensors, itself or in its subfolder
      "unet" (as a saved pipeline does).

  Returns:
    (apply_fn, params) with apply_fn(params, x_t [B, H, W, C], t [B]) → ε [B, H, W, out_channels], a
    plain function that compiles nothing and keeps dropout off, and float32 params.

  Raises:
    ValueError: a missing or unreadable file, an option that `UNet` lacks, or tensors that do not
      match the config.
  """
  folder = files.model_folder(folder, "unet", "save")
  config = files.read_config(folder)
  model = from_config(config)
  smallest = 2 ** (len(model.channels) - 1)
  shapes = _unet_shapes(model, read_options(config)["in_channels"], smallest)
  params = files.read_params(folder, shapes)

  def apply_fn(params, x_t, t):
    return model.apply({"params": params}, x_t, t)

  return apply_fn, params


def save(folder: str | Path, model: UNet, params: Mapping[str, Any], image_size: int) -> None:
  """Writes config.json and diffusion_pytorch_model.safetensors, for diffusers and `load`.

  Args:
    folder: created where it does not exist; its two files are replaced.
    model: the net.
    params: its parameters, i.e. model.init(...)["params"].
    image_size: height and width of the images, diffusers' sample_size.

  Raises:
    ValueError: `params` are not those of `model`, or it takes no images of this size.
  """
  if "kernel" not in params.get("conv_in", {}):
    raise ValueError('params hold no "conv_in": pass what model.init(...)["params"] returns')
  in_channels = params["conv_in"]["kernel"].shape[2]
  tensors = files.to_tensors(params, _unet_shapes(model, in_channels, image_size))
  config = to_config(model, in_channels=in_channels, image_size=image_size)
  files.write(folder, config, tensors)


def load_autoencoder(folder: str | Path) -> Autoencoder:
  """Reads an `AutoencoderKL` saved by diffusers' `save_pretrained` or by `save_autoencoder`.

  Args:
    folder: holds config.json and diffusion_pytorch_model.safetensors, itself or in its subfolder
      "vae" (as a saved pipeline does). Tensors in half precision become float32.

  Raises:
    ValueError: a missing or unreadable file, an option that `AutoencoderKL` lacks, or tensors that
      do not match the config.
  """
  folder = files.model_folder(folder, "vae", "save_autoencoder")
  module, scaling_factor, shift_factor = autoencoder_config.from_config(files.read_config(folder))
  params = files.read_params(folder, _autoencoder_shapes(module))
  return Autoencoder(module, params, scaling_factor, shift_factor)


def save_autoencoder(folder: str | Path, autoencoder: Autoencoder, image_size: int) -> None:
  """Writes config.json and diffusion_pytorch_model.safetensors, as diffusers' `AutoencoderKL`.

  Args:
    folder: created where it does not exist; its two files are replaced.
    autoencoder: what is written.
    image_size: height and width of the images it was trained on, diffusers' sample_size, from
      which that takes the size of tiles.

  Raises:
    ValueError: parameters of another net, fields that diffusers lacks, or a size of images that
      the net does not take.
  """
  module = autoencoder.module
  tensors = files.to_tensors(autoencoder.params, _autoencoder_shapes(module))
  config = autoencoder_config.to_config(
    module, autoencoder.scaling_factor, autoencoder.shift_factor, image_size
  )
  files.write(folder, config, tensors)


def _unet_shapes(model: UNet, in_channels: int, image_size: int) -> dict[files.FlaxPath, Any]:
  x_t = jax.ShapeDtypeStruct((1, image_size, image_size, in_channels), jnp.float32)
  return files.param_shapes(model, x_t, jax.ShapeDtypeStruct((1,), jnp.int32))


def _autoencoder_shapes(module: AutoencoderKL) -> dict[files.FlaxPath, Any]:
  size = module.factor, module.factor
  images = jax.ShapeDtypeStruct((1, *size, module.in_channels), jnp.float32)
  return files.param_shapes(module, images)
