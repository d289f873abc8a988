"""A run in seconds: a multilayer perceptron on 24 digits, with a schedule of 20 timesteps."""

from ml_collections import ConfigDict

from jaxinf.configs import digits


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.data.num_examples = 24
  config.model = ConfigDict({"name": "mlp", "hidden": (8,), "time_features": 4})
  config.diffusion.num_steps = 20
  config.train.steps = 20
  config.train.warmup_steps = 2
  config.train.batch_size = 10
  config.train.checkpoint_every = 10
  config.train.log_every = 5
  config.sample.num_samples = 3
  config.sample.keep_trajectory = True
  config.curvature.draws = 3
  config.curvature.skip = ()
  config.curvature_study.num_images = 6
  config.curvature_study.num_queries = 2
  config.curvature_study.gradient_draws = 2
  config.curvature_study.dampings = (1e-2,)
  config.curvature_study.solver.sketch_rank = 8
  config.compress_study.num_images = 6
  config.compress_study.num_queries = 2
  config.compress_study.draws = 2
  config.compress_study.svd_ranks = (1,)
  config.compress_study.truncation_shares = (0.5,)
  config.compress_study.projection_shares = (0.5,)
  config.attribute.draws = 4
  config.attribute.query_draws = 4
  config.attribute.replicates = 2
  config.attribute.stop.size = 1
  config.attribute.damping = 1e-4
  config.self_influence.draws = 6
  config.self_influence.replicates = 3
  config.self_influence.damping = 1e-4
  config.index.draws = 4
  config.query.draws = 4
  config.query.damping = 1e-4
  config.query.top_k = 3
  config.retrain.num_subsets = 4
  config.retrain.steps = 10
  config.retrain.models_at_once = 4
  config.measure.draws = 8
  config.measure.replicates = 2
  config.measure.batch_size = 16
  config.score.methods = ("influence", "pixel", "random")
  config.score.dampings = (1e-4, 1e-2)
  config.score.draws = 4
  config.score.query_draws = 4
  config.score.projection_dim = 64
  config.evaluate.num_resamples = 50
  config.counterfactual.methods = ("influence", "pixel")
  config.counterfactual.num_queries = 2
  config.counterfactual.shares = (0.1, 0.25)
  config.study.approximations = ("influence", "kfac-reduce", "identity")
  config.study.methods = ("influence", "trak")
  config.study.draws = (2, 4)
  config.study.timesteps = (0, 9, 19)
  config.study.change_timesteps = (9,)
  config.study.num_models = 3
  config.report.num_queries = 2
  config.report.top_k = 3
  return config
