"""CIFAR-10 as in the paper: all of base.py, and nothing else.

python -m jaxinf benchmark --config=configs/cifar10.py --workdir=runs/cifar10

Not yet measured: neither cost nor result. With the stage retrain, --shard=i/n spreads the 505
models over machines. More --config.score.passes hold less at once.
"""

from ml_collections import ConfigDict

from jaxinf.configs import base


def get_config() -> ConfigDict:
  return base.get_config()
