"""The U-Net of digits.py with 50 samples, for the proof by retraining: 32 subsets, 2 seeds each.

python -m jaxinf benchmark --config=configs/digits_unet.py --workdir=runs/digits_unet

Measured on 2 CPU cores with other work beside it: the 66 models took 43 min. LDS for the loss:
K-FAC influence 48.7 ± 2.5 %, TRAK 11.4 ± 2.3 % (31.4 tuned), retraining 39.3 ± 2.0 %.
"""

from ml_collections import ConfigDict

from jaxinf.configs import digits


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.sample.num_samples = 50
  config.sample.batch_size = 50
  config.measure.draws = 400
  config.measure.replicates = 5
  config.measure.batch_size = 400
  config.score.methods = (
    "influence", "ekfac", "kfac-empirical", "kfac-reduce", "kfac-reduce-empirical", "identity",
    "trak", "dtrak", "pixel", "random",
  )  # fmt: skip
  config.score.loss_power = 1.0  # as when the results that are kept were made
  config.score.compression = None
  config.score.passes = 1
  config.score.draws = 48
  config.score.query_draws = 192
  config.score.projection_dim = 4_096
  return config
