"""Reading and writing diffusers' folders: round trips, old names, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinf.networks import diffusers

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ("unet-tiny-scale-shift", "unet-tiny-additive")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
  """A copy of a fixture, to be changed."""
  return Path(shutil.copytree(FIXTURES / VARIANTS[0], tmp_path / "model"))


def read_config(folder):
  return json.loads((folder / "config.json").read_text())


def change_config(folder, **options):
  (folder / "config.json").write_text(json.dumps(read_config(folder) | options))


def assert_trees_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_inverts_save(variant, tmp_path):
  model = diffusers.from_config(read_config(FIXTURES / variant))
  _, params = diffusers.load(FIXTURES / variant)
  diffusers.save(tmp_path / "new" / "folder", model, params, image_size=8)
  _, again = diffusers.load(tmp_path / "new" / "folder")
  assert_trees_equal(again, params)
  assert diffusers.from_config(read_config(tmp_path / "new" / "folder")) == model


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_inverts_load(variant, tmp_path):
  """The files hold what diffusers wrote, tensor for tensor and option for option."""
  model = diffusers.from_config(read_config(FIXTURES / variant))
  _, params = diffusers.load(FIXTURES / variant)
  diffusers.save(tmp_path, model, params, image_size=8)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
  assert_trees_equal(load_file(tmp_path / WEIGHTS), load_file(FIXTURES / variant / WEIGHTS))
  expected = read_config(FIXTURES / variant)
  del expected["_diffusers_version"]
  assert read_config(tmp_path) == expected


def test_pipeline_subfolder_and_old_names_load_the_same(folder, tmp_path):
  tensors = load_file(folder / WEIGHTS)
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  for new_name, old_name in old.items():
    tensors = {name.replace(f".{new_name}.", f".{old_name}."): x for name, x in tensors.items()}
  assert any(".proj_attn." in name for name in tensors)
  save_file(tensors, folder / WEIGHTS)
  blocks = ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]
  change_config(folder, down_block_types=blocks)
  shutil.move(folder, tmp_path / "pipeline" / "unet")
  assert_trees_equal(
    diffusers.load(tmp_path / "pipeline")[1], diffusers.load(FIXTURES / VARIANTS[0])[1]
  )


def test_absent_options_have_the_defaults_of_diffusers():
  model = diffusers.from_config({"_class_name": "UNet2DModel"})
  assert model.channels == (224, 448, 672, 896)
  assert model.attention_levels == (False, True, True, True)
  assert (model.head_dim, model.norm_eps, model.sin_first) == (8, 1e-5, False)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"act_fn": "gelu"}, "act_fn='gelu'; supported: 'silu', 'swish'"),
    ({"center_input_sample": True}, "center_input_sample=True; supported: False"),
    ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor=1.5; supported: 1"),
    ({"mid_block_type": None}, "mid_block_type=None; supported: 'UNetMidBlock2D'"),
    ({"downsample_type": "resnet"}, "downsample_type='resnet'; supported: 'conv'"),
    ({"upsample_type": "resnet"}, "upsample_type='resnet'; supported: 'conv'"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'; supported: 'positional'"),
    ({"time_embedding_dim": 7}, "time_embedding_dim=7; supported: None, 16"),
    ({"class_embed_type": "timestep"}, "class_embed_type='timestep'; supported: None"),
    ({"num_class_embeds": 10}, "num_class_embeds=10; supported: None"),
    ({"attn_norm_num_groups": 2}, "attn_norm_num_groups=2; supported: None"),
    ({"resnet_time_scale_shift": "spatial"}, "'spatial'; supported: 'default', 'scale_shift'"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"norm_type": "layer"}, r"options \['norm_type'\]"),
    ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel'; supported: 'UNet2DModel'"),
    (
      {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
      "'SkipDownBlock2D' in down_block_types.*supported: 'DownBlock2D', 'AttnDownBlock2D'",
    ),
    ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types=.*at the levels where"),
    ({"block_out_channels": [4, 8, 8]}, "must hold one entry a level"),
  ],
)
def test_options_that_change_the_output_are_refused(folder, options, message):
  change_config(folder, **options)
  with pytest.raises(ValueError, match=message):
    diffusers.load(folder)


def test_tensors_that_do_not_match_are_named(folder):
  tensors = load_file(folder / WEIGHTS)
  tensors["conv_extra.bias"] = tensors.pop("conv_out.bias")
  tensors["mid_block.attentions.0.to_q.weight"] = np.zeros((8, 9), np.float32)
  save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError) as error:
    diffusers.load(folder)
  assert "missing conv_out.bias (3,)" in str(error.value)
  assert "unexpected conv_extra.bias (3,)" in str(error.value)
  assert "mid_block.attentions.0.to_q.weight has shape (8, 9), expected (8, 8)" in str(error.value)


def test_missing_and_broken_files_say_what_to_do(folder, tmp_path):
  with pytest.raises(ValueError, match=r"no config.json in .*save_pretrained"):
    diffusers.load(tmp_path / "nowhere")
  (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
  with pytest.raises(ValueError, match=r"_model\.bin\).*safe_serialization=True"):
    diffusers.load(folder)
  (folder / WEIGHTS).write_bytes(b"not tensors")
  with pytest.raises(ValueError, match="cannot be read as safetensors"):
    diffusers.load(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    diffusers.load(folder)


def test_save_refuses_parameters_of_another_model(tmp_path):
  model = diffusers.from_config(read_config(FIXTURES / VARIANTS[0]))
  _, params = diffusers.load(FIXTURES / VARIANTS[0])
  with pytest.raises(ValueError, match='hold no "conv_in"'):
    diffusers.save(tmp_path, model, {"params": params}, image_size=8)
  with pytest.raises(ValueError, match=r"(?s)params do not match the model:.*missing down_blocks"):
    diffusers.save(tmp_path, model.clone(blocks_per_level=2), params, image_size=8)
  with pytest.raises(ValueError, match="divisible by 2"):
    diffusers.save(tmp_path, model, params, image_size=7)
  assert not list(tmp_path.iterdir())
