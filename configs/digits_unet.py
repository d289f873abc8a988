"""The U-Net of digits.py with 50 samples, for the proof by retraining: 32 subsets, 2 seeds each.

python -m jaxinf benchmark --config=configs/digits_unet.py --workdir=runs/digits_unet
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.sample.num_samples = 50
  config.sample.batch_size = 50
  return config
