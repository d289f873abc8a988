"""CIFAR-2 for two CPU cores: 1,000 real images at 16 × 16, a U-Net of 0.9 M parameters.

python -m jaxinf benchmark --config=configs/cifar2_tiny.py --workdir=runs/cifar2_tiny

Measured on 2 CPU cores: a model of a subset takes 2 min 36 s, two at a time with a core each, and
one of all images 6 min 43 s.
"""

from ml_collections import ConfigDict

from jaxinf.configs import cifar2_small


def get_config() -> ConfigDict:
  config = cifar2_small.get_config()
  config.data.num_examples = 1_000
  config.data.image_size = 16
  config.model.channels = (32, 32, 64)
  config.model.blocks_per_level = 1
  config.model.attention_levels = (False, False, True)
  config.model.dropout = 0.0
  config.train.steps = 2_000
  config.train.batch_size = 64
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.checkpoint_every = 500
  config.sample.num_samples = 50
  config.sample.batch_size = 50
  config.curvature.draws = 24
  config.curvature.batch_size = 256
  config.retrain.steps = 1_000
  config.measure.draws = 400
  config.measure.replicates = 5
  config.measure.batch_size = 400
  config.score.methods = (
    "influence", "influence-unweighted", "ekfac", "identity", "trak", "dtrak", "das", "pixel",
    "random",
  )  # fmt: skip
  config.score.draws = 24
  config.score.query_draws = 192
  config.score.batch_size = 256
  return config
