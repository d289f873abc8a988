"""A multilayer perceptron on scikit-learn's digits, retrained on 100 subsets with 5 seeds each.

python -m jaxinf benchmark --config=configs/digits_mlp.py --workdir=runs/digits_mlp

Measured on 2 CPU cores with other work beside it: the 505 models took 11 min. LDS for the loss:
K-FAC influence 87.0 ± 0.4 %, TRAK 3.2 ± 1.0 % (64.5 tuned), retraining 76.6 ± 0.6 %.
"""

from ml_collections import ConfigDict

from jaxinf.configs import digits_unet


def get_config() -> ConfigDict:
  config = digits_unet.get_config()
  config.model = ConfigDict({"name": "mlp", "hidden": (128, 128, 128), "time_features": 32})
  config.train.steps = 4_000
  config.train.warmup_steps = 400
  config.train.checkpoint_every = 4_000
  config.sample.num_samples = 100
  config.sample.batch_size = 100
  config.sample.keep_trajectory = True
  config.curvature.draws = 200
  config.curvature.batch_size = 2_048
  config.retrain.num_subsets = 100
  config.retrain.num_seeds = 5
  config.retrain.steps = 2_000
  config.retrain.models_at_once = 20
  config.measure.measurements = ("loss", "elbo", "simple_elbo", "trajectory", "square_norm")
  config.measure.draws = 1_000
  config.measure.batch_size = 5_000
  config.score.methods = (
    "influence", "ekfac", "kfac-empirical", "diagonal", "identity", "trak", "dtrak",
    "journey-trak", "das", "pixel", "pixel-l2", "random",
  )  # fmt: skip
  config.score.measurements = ("loss", "elbo", "simple_elbo", "trajectory", "square_norm")
  config.score.draws = 200
  config.score.batch_size = 2_000
  # TRAK, D-TRAK and DAS at their best on the benchmark: at the default they rank by noise.
  config.counterfactual.methods = ("influence", "trak", "dtrak", "das")
  config.counterfactual.dampings = (1e-8, 10.0, 10.0, 1e-3)
  return config
