"""CIFAR-2 for one GPU: the paper's U-Net at a quarter of its width, 2.4 M parameters.

python -m jaxinf benchmark --config=configs/cifar2_small.py --workdir=runs/cifar2_small

Meant for tens of minutes: 32 subsets with 2 seeds each, 100 samples. Not yet measured: neither
cost nor result.
"""

from ml_collections import ConfigDict

from jaxinf.configs import cifar2


def get_config() -> ConfigDict:
  config = cifar2.get_config()
  config.model.channels = (32, 64, 64, 64)
  config.model.norm_groups = 8
  config.train.steps = 8_000
  config.train.learning_rate = 5e-4
  config.train.warmup_steps = 800
  config.sample.num_samples = 100
  config.sample.batch_size = 100
  config.curvature.draws = 100
  config.curvature.batch_size = 1_000
  config.retrain.num_subsets = 32
  config.retrain.num_seeds = 2
  config.retrain.steps = 4_000
  config.measure.draws = 1_000
  config.measure.batch_size = 2_000
  config.score.methods = (
    "influence", "ekfac", "identity", "trak", "dtrak", "pixel", "random",
  )  # fmt: skip
  config.score.compression = None
  config.score.passes = 1
  config.score.draws = 100
  config.score.query_draws = 500
  config.score.projection_dim = 4_096
  config.score.batch_size = 1_000
  return config
