"""The files of a model in diffusers' format: config.json and its tensors in one safetensors file.

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
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxinf.engine.artifacts import write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# What older releases of diffusers call the layers of an attention, and a second name that they give
# to the convolution of a sampler.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_SAMPLER = "Conv2d_0"

Shape = tuple[int, ...]
FlaxPath = tuple[str, ...]


def model_folder(folder: str | Path, subfolder: str, wrote: str) -> Path:
  """The folder of the config: `folder` or its `subfolder`; `wrote` is what writes such for us."""
  for candidate in (Path(folder), Path(folder) / subfolder):
    if (candidate / CONFIG_FILE).is_file():
      return candidate
  raise ValueError(
    f"no {CONFIG_FILE} in {folder} or {Path(folder) / subfolder}: pass a folder that diffusers' "
    f"save_pretrained or jaxinf.networks.diffusers.{wrote} wrote"
  )


def read_config(folder: Path) -> dict[str, Any]:
  """The folder's config.json; ValueError where it holds no JSON object."""
  path = folder / CONFIG_FILE
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} must hold a JSON object, not a {type(config).__name__}")
  return config


def read_params(folder: Path, shapes: Mapping[FlaxPath, Shape]) -> dict[str, Any]:
  """The folder's tensors as float32 parameters of a net whose `param_shapes` are `shapes`.

  Raises:
    ValueError: no file, one that cannot be read, or tensors of another net, by name.
  """
  path = folder / WEIGHTS_FILE
  tensors = _read_tensors(path)
  _check_shapes(shapes, tensors, f"{path} does not match its {CONFIG_FILE}")
  params = {path: jnp.asarray(_from_torch(tensors[_tensor_name(path)])) for path in shapes}
  return traverse_util.unflatten_dict(params)


def to_tensors(
  params: Mapping[str, Any], shapes: Mapping[FlaxPath, Shape]
) -> dict[str, np.ndarray]:
  """The inverse of `read_params`: float32 tensors by name; ValueError where shapes differ."""
  leaves = traverse_util.flatten_dict(dict(params))
  tensors = {_tensor_name(path): _to_torch(np.asarray(leaf)) for path, leaf in leaves.items()}
  _check_shapes(shapes, tensors, "params do not match the model")
  return tensors


def write(folder: str | Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
  """Writes both files; the folder is created where it does not exist."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # Written aside and renamed, so that a file is whole or not there.
  part = folder / f"{WEIGHTS_FILE}.part"
  save_file(tensors, part, metadata={"format": "pt"})
  os.replace(part, folder / WEIGHTS_FILE)
  write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def param_shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[FlaxPath, Shape]:
  """The shapes of the parameters, in diffusers' layout, by flax path; nothing is computed."""
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  return {
    path: tuple(leaf.shape[axis] for axis in _torch_axes(leaf.ndim))
    for path, leaf in traverse_util.flatten_dict(params).items()
  }


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
    stored = load_file(path)
  except SafetensorError as error:
    raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
  tensors: dict[str, np.ndarray] = {}
  for old_name, tensor in stored.items():
    name, tensor = _renewed(old_name, np.asarray(tensor, np.float32))
    if name in tensors and not np.array_equal(tensors[name], tensor):
      raise ValueError(f"{path} holds {name} twice, under an old name too, with other values")
    tensors[name] = tensor
  return tensors


def _renewed(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
  """A tensor as diffusers writes it today: its name, and dense layers without axes of an image."""
  old = rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\."
  name = re.sub(old, lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name)
  name = re.sub(rf"(samplers\.\d+)\.{OLD_SAMPLER}\.", r"\1.conv.", name)
  dense = rf"attentions\.\d+\.({'|'.join(map(re.escape, OLD_ATTENTION.values()))})\.weight$"
  if re.search(dense, name) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
    tensor = tensor[:, :, 0, 0]
  return name, tensor


def _tensor_name(path: FlaxPath) -> str:
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


def _check_shapes(
  shapes: Mapping[FlaxPath, Shape], tensors: Mapping[str, np.ndarray], what: str
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
