"""The paper's latent diffusion model on ArtBench-10: 37.4 M parameters, 256 × 256 images.

python -m jaxinf all --config=configs/artbench.py --workdir=runs/artbench \
  --config.data.path=artbench-10-imagefolder-split.tar \
  --config.latent.autoencoder=stable-diffusion-2-base

It needs the published tar of images, and the autoencoder of Stable Diffusion 2 as a folder in
diffusers' format. The paper's proof retrains 50 subsets with 5 seeds each for 60,000 steps.
Not yet measured: neither cost nor result.
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.data.name = "artbench"
  config.latent.autoencoder = "stable-diffusion-2-base"
  config.diffusion.schedule = "scaled_linear"
  config.diffusion.beta_start = 8.5e-4
  config.diffusion.beta_end = 0.012
  config.model.attention_levels = (True, True, True, False)
  config.model.head_dim = 8
  config.model.norm_eps = 1e-5
  config.model.scale_shift = False
  config.model.sin_first = False
  config.model.freq_shift = 0.0
  config.model.downsample_padding = 1
  config.model.dropout = 0.0
  config.train.steps = 200_000
  config.train.batch_size = 64
  config.train.warmup_steps = 10_000
  config.train.ema_max_decay = 0.9999
  config.retrain.num_subsets = 50
  config.retrain.steps = 60_000
  config.curvature.batch_size = 64
  config.attribute.batch_size = 64
  return config
