"""A small U-Net (756,035 parameters) on 400 images of CIFAR-2, trained briefly: for benchmarks.

python -m jaxinf all --config=tests/benchmarks/cifar2_slice.py --workdir=runs/cifar2-slice
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.data.name = "cifar2"
  config.data.num_examples = 400
  config.model.channels = (32, 64)
  config.model.blocks_per_level = 1
  config.model.attention_levels = (False, True)
  config.model.norm_groups = 8
  config.model.dropout = 0.0
  config.train.steps = 400
  config.train.batch_size = 32
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 50
  config.train.decay = "cosine"
  config.train.checkpoint_every = 200
  config.sample.num_samples = 8
  config.sample.sampler = "ddim"
  config.sample.num_steps = 50
  config.sample.batch_size = 8
  config.curvature.draws = 4
  config.curvature.batch_size = 32
  config.attribute.draws = 8
  config.attribute.replicates = 2
  config.attribute.batch_size = 32
  return config
