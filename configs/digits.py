"""A small U-Net on scikit-learn's digits (1,797 real 8 × 8 images): the demo.

python -m jaxinf all --config=configs/digits.py --workdir=runs/digits

Measured: 3 min 17 s on 2 CPU cores with `make demo`, 55 s of it for installation. How well its
scores predict retraining: digits_unet.py.
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.data.name = "digits"
  config.model.channels = (16, 32)
  config.model.blocks_per_level = 1
  config.model.attention_levels = (False, False)
  config.model.norm_groups = 8
  config.model.dropout = 0.0
  config.train.steps = 1_000
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.decay = "cosine"
  config.train.checkpoint_every = 500
  config.sample.num_samples = 16
  config.sample.batch_size = 4
  config.curvature.draws = 12
  config.attribute.draws = 16
  config.attribute.replicates = 4
  config.attribute.query_draws = 96
  config.index.draws = 16
  config.query.draws = 96
  config.retrain.num_subsets = 32
  config.retrain.num_seeds = 2
  config.retrain.steps = 500
  return config
