"""The autoencoder and its file format against diffusers itself (PyTorch on the CPU)."""

import numpy as np
import pytest

from jaxinf import load_autoencoder, networks
from jaxinf.networks.diffusers import save_autoencoder

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

IMAGE = (24, 40)
CONFIGS = {
  "gray": {"block_out_channels": (8, 8, 16), "in_channels": 1, "out_channels": 1},
  "plain": {  # without attention, and without the convolutions around the latents
    "block_out_channels": (8, 16),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
  },
  "one-level": {"block_out_channels": (8,), "out_channels": 4},
  "sd": {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
  },
}
NUM_PARAMS = {"sd": 83_653_863}
# In float32 sums of up to 4,608 products in another order, of numbers of size 1.
ATOL = 1e-4


def seeded_model(name):
  """diffusers' net with every GroupNorm moved off scale 1, bias 0, where mix-ups would hide."""
  config = {"norm_num_groups": 4, "sample_size": 16} | CONFIGS[name]
  levels = len(config["block_out_channels"])
  blocks = {
    "down_block_types": ("DownEncoderBlock2D",) * levels,
    "up_block_types": ("UpDecoderBlock2D",) * levels,
  }
  torch.manual_seed(0)
  model = diffusers.AutoencoderKL(**config, **blocks).eval()
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, torch.nn.GroupNorm):
        module.weight.add_(0.1 * torch.randn_like(module.weight))
        module.bias.add_(0.1 * torch.randn_like(module.bias))
  return model


@torch.no_grad()
def torch_moments(model, images):
  """Mean and log variance [N, h, w, c] of diffusers' posteriors."""
  posterior = model.encode(channels_first(images)).latent_dist
  return channels_last(posterior.mean), channels_last(posterior.logvar)


@torch.no_grad()
def torch_images(model, latents):
  """Images [N, H, W, C] decoded by diffusers."""
  return channels_last(model.decode(channels_first(latents)).sample)


def channels_first(x):
  return torch.from_numpy(x).permute(0, 3, 1, 2)


def channels_last(x):
  return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_images_equal_diffusers_in_both_directions(name, tmp_path):
  theirs = seeded_model(name)
  theirs.save_pretrained(tmp_path / "theirs" / "vae", safe_serialization=True)
  size = (64, 64) if name == "sd" else IMAGE
  shape = (2, *size, theirs.config.in_channels)
  images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  mean, logvar = torch_moments(theirs, images)
  decoded = torch_images(theirs, mean)

  ours = load_autoencoder(tmp_path / "theirs")
  posterior = ours.encode(images)
  assert networks.num_params(ours.params) == NUM_PARAMS.get(name, theirs.num_parameters())
  assert ours.scaling_factor == theirs.config.scaling_factor
  expected = {"mean": mean, "logvar": logvar, "decoded": decoded}
  actual = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": ours.decode(mean)}
  for what in expected:
    error, most = np.abs(actual[what] - expected[what]).max(), np.abs(expected[what]).max()
    print(f"{name}, {what}: largest difference {error:.1e} of at most {most:.2f}")
    np.testing.assert_allclose(actual[what], expected[what], rtol=0, atol=ATOL)

  save_autoencoder(tmp_path / "ours", ours, image_size=16)
  again, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values())
  np.testing.assert_array_equal(torch_moments(again.eval(), images)[0], mean)
  np.testing.assert_array_equal(torch_images(again, mean), decoded)
  public = lambda config: {key: value for key, value in config.items() if key[0] != "_"}
  assert public(again.config) == public(theirs.from_pretrained(tmp_path / "theirs/vae").config)


@pytest.mark.parametrize("size", [(6, 19), (13, 7), (16, 16)])
def test_tiles_equal_diffusers(size, tmp_path):
  """Tiles of 8 latents, of which neighbours share 2, with last tiles of every kind."""
  theirs = seeded_model("plain")
  theirs.save_pretrained(tmp_path, safe_serialization=True)
  theirs.enable_tiling()
  latents = np.random.default_rng(0).normal(size=(2, *size, 16)).astype(np.float32)
  tiled = load_autoencoder(tmp_path).decode_tiled(latents, tile=8, batch_size=4)
  np.testing.assert_allclose(tiled, torch_images(theirs, latents), rtol=0, atol=ATOL)
