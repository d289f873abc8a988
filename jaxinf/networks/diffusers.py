"""Reads and writes U-Nets in diffusers' format: a folder of config.json and a safetensors file.

So a net trained elsewhere can be attributed, and one trained here can be sampled elsewhere. Tensors
that are missing, unexpected or of another shape are refused by name. PyTorch is not needed.

A parameter's diffusers name is its flax path with "." before digits and "weight" for kernel and
scale: down_blocks_0/resnets_1/conv1/kernel is down_blocks.0.resnets.1.conv1.weight. Convolution
kernels [H, W, in, out] are [out, in, H, W] there and dense kernels [in, out] are [out, in].
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxinf.core.types import ApplyFn
from jaxinf.engine.artifacts import write_text
from jaxinf.networks.diffusers_config import from_config, read_options, to_config
from jaxinf.networks.unet import UNet

__all__ = ["from_config", "load", "save"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# What older releases of diffusers call the layers of an attention.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Shape = tuple[int, ...]


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
  folder = _model_folder(Path(folder))
  config = _read_config(folder / CONFIG_FILE)
  model = from_config(config)
  tensors = _read_tensors(folder / WEIGHTS_FILE)
  smallest = 2 ** (len(model.channels) - 1)
  shapes = _param_shapes(model, read_options(config)["in_channels"], smallest)
  _check_shapes(shapes, tensors, f"{folder / WEIGHTS_FILE} does not match its {CONFIG_FILE}")
  params = {path: jnp.asarray(_from_torch(tensors[_tensor_name(path)])) for path in shapes}

  def apply_fn(params, x_t, t):
    return model.apply({"params": params}, x_t, t)

  return apply_fn, traverse_util.unflatten_dict(params)


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
  leaves = traverse_util.flatten_dict(dict(params))
  if ("conv_in", "kernel") not in leaves:
    raise ValueError('params hold no "conv_in": pass what model.init(...)["params"] returns')
  tensors = {_tensor_name(path): _to_torch(np.asarray(leaf)) for path, leaf in leaves.items()}
  in_channels = leaves["conv_in", "kernel"].shape[2]
  shapes = _param_shapes(model, in_channels, image_size)
  _check_shapes(shapes, tensors, "params do not match the model")
  config = to_config(model, in_channels=in_channels, image_size=image_size)

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Written aside and renamed, so that a file is whole or not there.
  part = folder / f"{WEIGHTS_FILE}.part"
  save_file(tensors, part, metadata={"format": "pt"})
  os.replace(part, folder / WEIGHTS_FILE)
  write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _model_folder(folder: Path) -> Path:
  """The folder of the config: `folder` or its subfolder "unet"."""
  for candidate in (folder, folder / "unet"):
    if (candidate / CONFIG_FILE).is_file():
      return candidate
  raise ValueError(
    f"no {CONFIG_FILE} in {folder} or {folder / 'unet'}: pass a folder that diffusers' "
    "save_pretrained or jaxinf.networks.diffusers.save wrote"
  )


def _read_config(path: Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} must hold a JSON object, not a {type(config).__name__}")
  return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
  """The file's tensors in float32, under the names that diffusers gives them today."""
  if not path.is_file():
    files = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".bin", ".safetensors"))
    raise ValueError(
      f"no {path.name} in {path.parent} (weight files there: {', '.join(files) or 'none'}). Load "
      "the model with diffusers and write it again as one safetensors file: "
      'model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")'
    )
  try:
    tensors = load_file(path)
  except SafetensorError as error:
    raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
  old = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
  return {
    old.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name): np.asarray(tensor, np.float32)
    for name, tensor in tensors.items()
  }


def _tensor_name(path: tuple[str, ...]) -> str:
  """The diffusers name of a flax path."""
  *modules, leaf = path
  numbered = r"(blocks|resnets|attentions|samplers|to_out)_(\d+)$"
  modules = [re.sub(numbered, r"\1.\2", module) for module in modules]
  return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def _to_torch(leaf: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(leaf.transpose(_torch_axes(leaf.ndim)), np.float32)


def _from_torch(tensor: np.ndarray) -> np.ndarray:
  return tensor.transpose(np.argsort(_torch_axes(tensor.ndim)))


def _torch_axes(ndim: int) -> tuple[int, ...]:
  """[H, W, in, out] → [out, in, H, W] and [in, out] → [out, in]; vectors stay."""
  return {4: (3, 2, 0, 1), 2: (1, 0)}.get(ndim, tuple(range(ndim)))


def _param_shapes(model: UNet, in_channels: int, image_size: int) -> dict[tuple[str, ...], Shape]:
  """The shapes of the parameters, in diffusers' layout, by flax path; nothing is computed."""
  x_t = jax.ShapeDtypeStruct((1, image_size, image_size, in_channels), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"]
  return {
    path: tuple(leaf.shape[axis] for axis in _torch_axes(leaf.ndim))
    for path, leaf in traverse_util.flatten_dict(params).items()
  }


def _check_shapes(
  shapes: Mapping[tuple[str, ...], Shape], tensors: Mapping[str, np.ndarray], what: str
) -> None:
  """Raises a ValueError listing the tensors that are missing, unexpected or of another shape."""
  expected = {_tensor_name(path): shape for path, shape in shapes.items()}
  problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors]
  problems += [
    f"unexpected {name} {tensors[name].shape}" for name in sorted(tensors.keys() - expected)
  ]
  problems += [
    f"{name} has shape {tensors[name].shape}, expected {shape}"
    for name, shape in expected.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if problems:
    shown = problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else [])
    raise ValueError("\n  ".join([f"{what}:", *shown]))
