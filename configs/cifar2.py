"""CIFAR-2 as in the paper: 5,000 cars and horses of CIFAR-10, and the U-Net of 38.3 M parameters.

python -m jaxinf benchmark --config=configs/cifar2.py --workdir=runs/cifar2

Not yet measured: neither cost nor result. Shards and memory are as cifar10.py says.
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.data.name = "cifar2"
  config.train.steps = 32_000
  config.train.warmup_steps = 3_200
  config.train.decay = "cosine"
  config.retrain.steps = 16_000
  return config
