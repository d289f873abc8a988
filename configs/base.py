"""Every field at its default: DDPM on CIFAR-10 as in the paper. configs/cifar10.py runs it.

The fields, with their defaults and meanings, stand in jaxinf/runs/sections.py. Other configs start
from `get_config()` here and change what differs.
"""

from ml_collections import ConfigDict

from jaxinf.runs.config import default_config


def get_config() -> ConfigDict:
  return default_config()
