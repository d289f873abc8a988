"""Writes the fixtures of tests/networks: tiny models and their outputs, computed by diffusers.

    python tests/networks/make_diffusers_fixture.py

needs PyTorch and diffusers (made with diffusers 0.42.1), unlike the tests that read the fixtures.
For each of VARIANTS it writes fixtures/unet-tiny-<name>/: config.json and the safetensors file as
`save_pretrained` leaves them, and outputs.npz with x_t [B, H, W, C], t [B] and eps [B, H, W, C].
Between them the variants hold both values of every option of the net.

fixtures/autoencoder-tiny/ likewise: images [B, H, W, 3], mean and logvar [B, H/2, W/2, 2], decoded
[B, H, W, 3] from the means, and wide [1, 7, 9, 2] with its tiled decoding, in tiles of 4 latents.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DModel

FIXTURES = Path(__file__).parent / "fixtures"

VARIANTS = {
  "scale-shift": {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 2,
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "scale_shift",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "dropout": 0.1,
  },
  "additive": {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4, 4, 8),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "dropout": 0.0,
  },
}

AUTOENCODER = {
  "block_out_channels": (2, 4),
  "down_block_types": ("DownEncoderBlock2D",) * 2,
  "up_block_types": ("UpDecoderBlock2D",) * 2,
  "norm_num_groups": 2,
  "latent_channels": 2,
  "sample_size": 8,
  "scaling_factor": 0.5,
  "shift_factor": 0.25,
}


def main() -> None:
  for name, config in VARIANTS.items():
    _write_unet(FIXTURES / f"unet-tiny-{name}", config)
  _write_autoencoder(FIXTURES / "autoencoder-tiny")


def _write_unet(folder: Path, config: dict) -> None:
  torch.manual_seed(0)
  model = UNet2DModel(**config).eval()
  with torch.no_grad():
    _move_norms(model)
    size = config["sample_size"]
    x_t = torch.randn(3, config["in_channels"], size, size)
    t = torch.tensor([0, 500, 999])
    eps = model(x_t, t).sample
  model.save_pretrained(folder, safe_serialization=True)
  t = t.numpy().astype(np.int32)
  np.savez(folder / "outputs.npz", x_t=_channels_last(x_t), t=t, eps=_channels_last(eps))


def _write_autoencoder(folder: Path) -> None:
  torch.manual_seed(0)
  model = AutoencoderKL(**AUTOENCODER).eval()
  with torch.no_grad():
    _move_norms(model)
    images = torch.rand(3, 3, 6, 10) * 2 - 1
    posterior = model.encode(images).latent_dist
    decoded = model.decode(posterior.mean).sample
    wide = torch.randn(1, 2, 7, 9)
    model.enable_tiling()
    tiled = model.decode(wide).sample
  model.save_pretrained(folder, safe_serialization=True)
  outputs = dict(
    images=images,
    mean=posterior.mean,
    logvar=posterior.logvar,
    decoded=decoded,
    wide=wide,
    tiled=tiled,
  )
  np.savez(folder / "outputs.npz", **{name: _channels_last(x) for name, x in outputs.items()})


def _move_norms(model: torch.nn.Module) -> None:
  """A GroupNorm starts at scale 1, bias 0, where a reader that drops or swaps the two is right."""
  for module in model.modules():
    if isinstance(module, torch.nn.GroupNorm):
      module.weight.add_(0.3 * torch.randn_like(module.weight))
      module.bias.add_(0.3 * torch.randn_like(module.bias))


def _channels_last(images: torch.Tensor) -> np.ndarray:
  return images.permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
  main()
