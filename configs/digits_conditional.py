"""A class-conditional multilayer perceptron on scikit-learn's digits, and its proof by retraining.

python -m jaxinf benchmark --config=configs/digits_conditional.py --workdir=runs/digits_conditional

The labels are left out in a tenth of the draws, in training as in curvature and gradients, and
samples are guided. All else is as in digits_mlp.py, with fewer models.

Measured on 2 CPU cores with other work beside it: 13 min in all. LDS for the loss: K-FAC influence
90.0 ± 0.5 %, TRAK 3.3 ± 1.5 % (35.1 tuned), D-TRAK 0.0 ± 1.3 % (35.9 tuned), pixel similarity
46.0 ± 1.3 %, retraining 88.7 ± 0.4 %.
"""

from ml_collections import ConfigDict

from jaxinf.configs import digits_mlp


def get_config() -> ConfigDict:
  config = digits_mlp.get_config()
  config.data.conditioning = ("labels",)
  config.train.conditioning_dropout = 0.1
  config.sample.guidance_scale = 2.0
  config.sample.keep_trajectory = False
  config.retrain.num_subsets = 50
  config.retrain.num_seeds = 3
  config.measure.measurements = ("loss",)
  config.score.methods = ("influence", "ekfac", "identity", "trak", "dtrak", "pixel", "random")
  config.score.measurements = ("loss",)
  return config
