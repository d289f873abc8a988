"""Autoencoders in diffusers' folders: round trips, old names, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinf import load_autoencoder
from jaxinf.networks.diffusers import save_autoencoder
from jaxinf.networks.diffusers_autoencoder import from_config, to_config
from jaxinf.networks.latents import PRESETS

FIXTURE = Path(__file__).parent / "fixtures" / "autoencoder-tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
  """A copy of the fixture, to be changed."""
  return Path(shutil.copytree(FIXTURE, tmp_path / "model"))


def read_config(folder):
  return json.loads((folder / "config.json").read_text())


def change_config(folder, **options):
  (folder / "config.json").write_text(json.dumps(read_config(folder) | options))


def assert_trees_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_save_inverts_load(tmp_path):
  """The files hold what diffusers wrote, tensor for tensor and option for option."""
  autoencoder = load_autoencoder(FIXTURE)
  save_autoencoder(tmp_path / "new" / "vae", autoencoder, image_size=8)
  assert_trees_equal(load_file(tmp_path / "new" / "vae" / WEIGHTS), load_file(FIXTURE / WEIGHTS))
  expected = read_config(FIXTURE)
  del expected["_diffusers_version"]
  assert read_config(tmp_path / "new" / "vae") == expected
  assert load_autoencoder(tmp_path / "new").fingerprint == autoencoder.fingerprint


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_configs_say(name):
  config = to_config(*PRESETS[name], image_size=512)
  assert from_config(config) == tuple(PRESETS[name])


def test_a_config_of_stable_diffusion_has_the_options_of_its_day(tmp_path):
  """It names no scaling factor, for example: what is left out has diffusers' defaults."""
  config = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
  }
  assert from_config(config) == tuple(PRESETS["sd"])


def test_old_names_and_layouts_load_the_same(folder):
  """Attention under old names with 1 × 1 convolutions, and samplers that are there twice."""
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  tensors = {}
  for name, tensor in load_file(folder / WEIGHTS).items():
    if "attentions" in name and tensor.ndim == 2:
      tensor = tensor[:, :, None, None]
    if "samplers.0.conv" in name:
      tensors[name.replace(".conv.", ".Conv2d_0.")] = tensor
    for new_name, old_name in old.items():
      name = name.replace(f".{new_name}.", f".{old_name}.")
    tensors[name] = tensor
  assert sum(".proj_attn." in n or ".Conv2d_0." in n for n in tensors) == 8
  save_file(tensors, folder / WEIGHTS)
  change_config(folder, act_fn="swish", sample_size=[8, 8])
  assert load_autoencoder(folder).fingerprint == load_autoencoder(FIXTURE).fingerprint

  name = "decoder.up_blocks.0.upsamplers.0.Conv2d_0.bias"
  tensors[name] = tensors[name] + 1
  save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError, match="upsamplers.0.conv.bias twice.*with other values"):
    load_autoencoder(folder)


def test_half_precision_becomes_float32(folder):
  halves = {name: x.astype(np.float16) for name, x in load_file(folder / WEIGHTS).items()}
  save_file(halves, folder / WEIGHTS)
  loaded, exact = load_autoencoder(folder), load_autoencoder(FIXTURE)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype("float32")}
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), exact.params)
  assert_trees_equal(loaded.params, rounded)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"act_fn": "gelu"}, "act_fn='gelu'; supported: 'silu', 'swish'"),
    ({"latents_mean": [0.1, 0.2]}, r"latents_mean=\[0.1, 0.2\]; supported: None"),
    ({"latents_std": [1, 2]}, r"latents_std=\[1, 2\]; supported: None"),
    ({"use_quant_conv": None}, "use_quant_conv=None; supported: True, False"),
    ({"mid_block_add_attention": 2}, "mid_block_add_attention=2; supported: True, False"),
    ({"scaling_factor": None}, "scaling_factor=None"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"norm_type": "spatial"}, r"options \['norm_type'\]"),
    ({"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny'; supported: 'AutoencoderKL'"),
    (
      {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
      "down_block_types=.*supported: 'DownEncoderBlock2D' for each of",
    ),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types=.*'UpDecoderBlock2D' for each of"),
    ({"block_out_channels": [2, 3]}, r"norm_groups=2 must divide"),
  ],
)
def test_options_that_change_the_output_are_refused(folder, options, message):
  change_config(folder, **options)
  with pytest.raises(ValueError, match=message):
    load_autoencoder(folder)


def test_tensors_that_do_not_match_are_named(folder):
  tensors = load_file(folder / WEIGHTS)
  tensors["extra.bias"] = tensors.pop("quant_conv.bias")
  save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError, match=r"(?s)missing quant_conv.bias \(4,\).*extra.bias \(4,\)"):
    load_autoencoder(folder)
  with pytest.raises(ValueError, match=r"or .*vae: pass a folder .*diffusers.save_autoencoder"):
    load_autoencoder(folder / "nowhere")


def test_save_refuses_what_diffusers_lacks(tmp_path):
  autoencoder = load_autoencoder(FIXTURE)
  other = lambda **fields: dataclasses.replace(
    autoencoder, module=autoencoder.module.clone(**fields)
  )
  with pytest.raises(ValueError, match="norm_eps=1e-06 and no other; got 1e-05"):
    save_autoencoder(tmp_path, other(norm_eps=1e-5), image_size=8)
  with pytest.raises(ValueError, match="multiple of 2, pixels for one latent; got 7"):
    save_autoencoder(tmp_path, autoencoder, image_size=7)
  with pytest.raises(ValueError, match=r"(?s)params do not match.*missing decoder.up_blocks"):
    save_autoencoder(tmp_path, other(blocks_per_level=2), image_size=8)
  assert not list(tmp_path.iterdir())
