"""CIFAR-2 at 16 × 16 for two CPU cores: 1,000 real images, a U-Net of 0.88 M parameters.

python -m jaxinf benchmark --config=configs/cifar2_tiny.py --workdir=runs/cifar2_tiny
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.data.name = "cifar2"
  config.data.num_examples = 1_000
  config.data.image_size = 16
  config.model.channels = (32, 32, 64)
  config.model.blocks_per_level = 1
  config.model.attention_levels = (False, False, True)
  config.model.norm_groups = 8
  config.model.dropout = 0.0
  config.train.steps = 2_000
  config.train.batch_size = 64
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.decay = "cosine"
  config.train.checkpoint_every = 500
  config.sample.num_samples = 50
  config.sample.batch_size = 50
  config.curvature.draws = 24
  config.curvature.batch_size = 256
  config.retrain.num_subsets = 32
  config.retrain.num_seeds = 2
  config.retrain.steps = 1_000
  config.measure.draws = 400
  config.measure.replicates = 5
  config.measure.batch_size = 400
  config.score.methods = (
    "influence", "ekfac", "identity", "trak", "dtrak", "das", "pixel", "random",
  )  # fmt: skip
  config.score.compression = None
  config.score.passes = 1
  config.score.draws = 24
  config.score.query_draws = 192
  config.score.projection_dim = 4_096
  config.score.batch_size = 256
  return config
