"""Every field and its default: DDPM on CIFAR-10 as in the paper. configs/cifar10.py runs it.

Other configs start from `get_config()` here and change what differs.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict()
  config.data.name = "cifar10"
  config.data.data_dir = placeholder(str)
  config.data.path = placeholder(str)
  config.data.image_size = placeholder(int)
  config.data.num_examples = placeholder(int)
  config.data.seed = 0

  config.model = unet()

  config.diffusion = ConfigDict()
  config.diffusion.schedule = "linear"
  config.diffusion.num_steps = 1000
  config.diffusion.beta_start = 1e-4
  config.diffusion.beta_end = 0.02

  config.train = ConfigDict()
  config.train.steps = 160_000
  config.train.batch_size = 128
  config.train.learning_rate = 1e-4
  config.train.warmup_steps = 16_000
  config.train.decay = "constant"
  config.train.weight_decay = 0.01
  config.train.clip_norm = 1.0
  config.train.ema_max_decay = 0.999
  config.train.ema_warmup_power = 0.75
  config.train.checkpoint_every = 5_000
  config.train.log_every = 100

  config.sample = ConfigDict()
  config.sample.num_samples = 200
  config.sample.sampler = "ddpm"
  config.sample.num_steps = placeholder(int)
  config.sample.batch_size = 25
  config.sample.keep_trajectory = False

  config.curvature = ConfigDict()
  config.curvature.method = "kfac"
  config.curvature.sharing = "expand"
  config.curvature.estimator = "mc"
  config.curvature.targets = 1
  config.curvature.draws = 250
  config.curvature.batch_size = 128
  config.curvature.skip = (r"(?i)norm[^/]*/(scale|bias)$",)
  config.curvature.diagonal = ()
  config.curvature.only = placeholder(tuple)
  config.curvature.partitions = 1
  config.curvature.decompose = "host"
  config.curvature.solver = ConfigDict()
  config.curvature.solver.tolerance = 1e-3
  config.curvature.solver.max_iterations = 500
  config.curvature.solver.precision = "float32"
  config.curvature.solver.sketch_rank = 500
  config.curvature.checkpoint_every = 500

  config.curvature_study = ConfigDict()
  config.curvature_study.num_images = 512
  config.curvature_study.num_queries = 8
  config.curvature_study.draws = 1
  config.curvature_study.gradient_draws = 16
  config.curvature_study.dampings = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
  config.curvature_study.batch_size = 128
  config.curvature_study.solver = ConfigDict()
  config.curvature_study.solver.tolerance = 1e-2
  config.curvature_study.solver.max_iterations = 200
  config.curvature_study.solver.precision = "float32"
  config.curvature_study.solver.sketch_rank = 1_000

  config.compress_study = ConfigDict()
  config.compress_study.num_images = 512
  config.compress_study.num_queries = 8
  config.compress_study.draws = 16
  config.compress_study.damping = 1e-8
  config.compress_study.svd_ranks = (1, 5, 10, 20, 50, 100)
  config.compress_study.truncation_shares = (0.5, 0.25, 0.1, 0.05)
  config.compress_study.projection_shares = (0.5, 0.1, 0.02)
  config.compress_study.batch_size = 128

  config.attribute = ConfigDict()
  config.attribute.measurement = "loss"
  config.attribute.damping = 1e-8
  config.attribute.sweep = ()
  config.attribute.draws = 250
  config.attribute.draw_groups = 5
  config.attribute.auto_draws = False
  config.attribute.stop = ConfigDict()
  config.attribute.stop.top_k = 10
  config.attribute.stop.agreement = 0.8
  config.attribute.stop.group_size = 8
  config.attribute.query_draws = 1_000  # queries are few, so that their noise costs little to lower
  config.attribute.query_groups = 2
  config.attribute.design = draw_design()
  config.attribute.compression = "int8"
  config.attribute.compression_size = placeholder(float)
  config.attribute.query_blocks = 1
  config.attribute.precision = placeholder(str)
  config.attribute.batch_size = 128
  config.attribute.checkpoint_every = 100

  config.index = ConfigDict()
  config.index.draws = 250
  config.index.draw_groups = 2
  config.index.design = draw_design()
  config.index.compression = "int8"
  config.index.compression_size = placeholder(float)
  config.index.batch_size = 128
  config.index.reserve_mib = 1024

  config.query = ConfigDict()
  config.query.measurement = "loss"
  config.query.damping = 1e-8
  config.query.draws = 1_000
  config.query.query_groups = 2
  config.query.layers = placeholder(tuple)
  config.query.top_k = 10
  config.query.batch_size = 128

  config.retrain = ConfigDict()
  config.retrain.num_subsets = 100
  config.retrain.num_seeds = 5
  config.retrain.share = 0.5
  config.retrain.steps = 80_000
  config.retrain.outside_weight = 0.0
  config.retrain.models_at_once = 1

  config.measure = ConfigDict()
  config.measure.measurements = ("loss", "elbo")
  config.measure.draws = 5_000
  config.measure.draw_groups = 20
  config.measure.design = draw_design()
  config.measure.batch_size = 500

  config.score = ConfigDict()
  config.score.methods = ("influence", "trak", "dtrak", "pixel", "random")
  config.score.measurements = ("loss", "elbo")
  config.score.dampings = tuple(10.0**power for power in range(-9, 2))
  config.score.draws = 250
  config.score.draw_groups = 1  # no standard errors, which the LDS does not need: half the work
  config.score.query_draws = 250
  config.score.query_groups = 1
  config.score.design = draw_design()
  config.score.compression = "int8"
  config.score.passes = 4  # 21 GB each of int8 gradients of 200 samples at 11 dampings
  config.score.projection_dim = 32_768
  config.score.projection = "rademacher"
  config.score.journey_steps = 10
  config.score.clip = placeholder(str)
  config.score.batch_size = 128

  config.evaluate = ConfigDict()
  config.evaluate.num_resamples = 1_000

  config.counterfactual = ConfigDict()
  config.counterfactual.methods = ("influence", "trak", "dtrak")
  config.counterfactual.dampings = ()
  config.counterfactual.measurement = "loss"
  config.counterfactual.shares = (0.02, 0.1)
  config.counterfactual.num_queries = 5
  config.counterfactual.num_seeds = 1

  config.study = ConfigDict()
  config.study.measurement = "loss"
  config.study.approximations = (
    "influence", "ekfac", "kfac-empirical", "kfac-reduce", "kfac-reduce-empirical", "diagonal",
    "identity",
  )  # fmt: skip
  config.study.methods = ("influence", "trak", "dtrak")
  config.study.draws = (10, 50, 250)
  config.study.timesteps = (0, 9, 19, 49, 79, 99, 199, 499, 799, 998)
  config.study.change_timesteps = (0, 49, 99)
  config.study.outside_weight = 0.5
  config.study.num_models = 8

  config.report = ConfigDict()
  config.report.num_queries = 12
  config.report.top_k = 8
  return config


def draw_design() -> ConfigDict:
  """How draws of (t, ε) are made: the best of those measured. The paper's are uniform alone."""
  design = ConfigDict()
  design.timesteps = "stratified"
  design.antithetic = True
  design.shared = True
  return design


def unet() -> ConfigDict:
  """The 38.3 M-parameter DDPM-CIFAR U-Net."""
  model = ConfigDict()
  model.name = "unet"
  model.channels = (128, 256, 256, 256)
  model.blocks_per_level = 2
  model.attention_levels = (False, True, False, False)
  model.mid_attention = True
  model.head_dim = placeholder(int)
  model.norm_groups = 32
  model.norm_eps = 1e-6
  model.scale_shift = True
  model.sin_first = True
  model.freq_shift = 1.0
  model.dropout = 0.1
  model.downsample_padding = 0
  return model
