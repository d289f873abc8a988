"""Writes the fixtures of `test_unet.py`: two tiny U-Nets and their outputs, computed by diffusers.

    python tests/networks/make_diffusers_fixture.py

needs PyTorch and diffusers (made with diffusers 0.42.1), unlike the tests that read the fixtures.
For each of VARIANTS it writes fixtures/unet-tiny-<name>/: config.json and the safetensors file as
`save_pretrained` leaves them, and outputs.npz with x_t [B, H, W, C], t [B] and eps [B, H, W, C].
Between them the variants hold both values of every option of the net.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel

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


def main() -> None:
  for name, config in VARIANTS.items():
    torch.manual_seed(0)
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
      # A GroupNorm starts at scale 1, bias 0, where a reader that drops or swaps the two is right.
      for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
          module.weight.add_(0.3 * torch.randn_like(module.weight))
          module.bias.add_(0.3 * torch.randn_like(module.bias))
      size = config["sample_size"]
      x_t = torch.randn(3, config["in_channels"], size, size)
      t = torch.tensor([0, 500, 999])
      eps = model(x_t, t).sample
    folder = FIXTURES / f"unet-tiny-{name}"
    model.save_pretrained(folder, safe_serialization=True)
    np.savez(
      folder / "outputs.npz",
      x_t=x_t.permute(0, 2, 3, 1).numpy(),
      t=t.numpy().astype(np.int32),
      eps=eps.permute(0, 2, 3, 1).numpy(),
    )


if __name__ == "__main__":
  main()
