"""The U-Net and its file format against diffusers itself (PyTorch on the CPU)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import networks
from jaxinf.networks.diffusers import from_config, load, save

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SHARED = {
  "in_channels": 3,
  "out_channels": 3,
  "attention_head_dim": None,
  "resnet_time_scale_shift": "scale_shift",
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
}
CONFIGS = {
  "small": SHARED
  | {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
  },
  "ddpm-cifar": SHARED
  | {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
  },
  # Other settings: added time, heads, no attention in the middle, symmetric padding.
  "additive": {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "add_attention": False,
  },
}
NUM_PARAMS = {"small": 756_035, "ddpm-cifar": 38_306_691}


def seeded_model(name):
  """diffusers' net with every GroupNorm moved off scale 1, bias 0, where mix-ups would hide."""
  torch.manual_seed(0)
  model = diffusers.UNet2DModel(**CONFIGS[name]).eval()
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, torch.nn.GroupNorm):
        module.weight.add_(0.1 * torch.randn_like(module.weight))
        module.bias.add_(0.1 * torch.randn_like(module.bias))
  return model


def torch_outputs(model, x_t, t):
  """Outputs [B, H, W, C] of a diffusers net."""
  with torch.no_grad():
    images = torch.from_numpy(x_t).permute(0, 3, 1, 2)
    return model(images, torch.from_numpy(t)).sample.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_diffusers_in_both_directions(name, tmp_path):
  theirs = seeded_model(name)
  theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
  size = CONFIGS[name]["sample_size"]
  x_t = np.random.default_rng(0).standard_normal((2, size, size, 3), dtype=np.float32)
  t = np.array([3, 999])
  expected = torch_outputs(theirs, x_t, t)

  apply_fn, params = load(tmp_path / "theirs")
  eps = jax.jit(apply_fn)(params, jnp.asarray(x_t), jnp.asarray(t, jnp.int32))
  # float32 sums in another order; the outputs are of size 1.
  np.testing.assert_allclose(eps, expected, rtol=0, atol=1e-4)
  assert networks.num_params(params) == NUM_PARAMS.get(name, theirs.num_parameters())

  save(tmp_path / "ours", from_config(theirs.config), params, image_size=size)
  again, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values())
  np.testing.assert_array_equal(torch_outputs(again.eval(), x_t, t), expected)
