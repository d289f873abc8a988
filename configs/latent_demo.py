"""Latent diffusion in minutes on a CPU: scikit-learn's digits, enlarged to 32 × 32.

python -m jaxinf all --config=configs/latent_demo.py --workdir=runs/latent_demo

A small autoencoder is trained first, whose latents are 8 × 8 × 2; then a U-Net on the latents, and
all else as of pixels. The report shows decoded samples. Measured on 2 CPU cores: 4 min 49 s.
"""

from ml_collections import ConfigDict

from jaxinf.configs import digits


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.data.image_size = 32
  config.latent.autoencoder = "trained"
  config.latent.batch_size = 64
  config.vae.channels = (16, 32, 32)
  config.vae.latent_channels = 2
  config.vae.steps = 600
  config.vae.batch_size = 32
  return config
