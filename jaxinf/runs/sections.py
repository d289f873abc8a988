"""The sections of a config, frozen and typed, each field once: its type, default and meaning.

The defaults are the paper's: DDPM on CIFAR-10. Sections that a package of the library owns, such as
`TrainConfig`, stand there. The line of commands and their sections is in stage.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinf.attribution.influence import AUTO, LOSS_POWER
from jaxinf.attribution.unlearning import Unlearning
from jaxinf.compression.compression import STORE_COMPRESSION
from jaxinf.core.damping import DAMPINGS
from jaxinf.core.draws import Draws
from jaxinf.core.registry import named
from jaxinf.curvature.fit import SKIP_NORMALISATION
from jaxinf.curvature.solver import Solver
from jaxinf.data import DataConfig
from jaxinf.networks import UNet
from jaxinf.networks.autoencoder_training import AutoencoderConfig
from jaxinf.networks.training import TrainConfig

_DEFAULT = object()


def added(value: Any, before: Any = _DEFAULT) -> Any:
  """A field that came after results were kept; `value` is its default, and `before` gave them all.

  Keys of results leave the field out while it has the value `before`, which is the default where
  none is given, so that they stay as they were.
  """
  return dataclasses.field(
    default=value, metadata={"before": value if before is _DEFAULT else before}
  )


def renamed(before: str, value: Any) -> Any:
  """A field that had another name when results were kept, by which their keys still know it."""
  return dataclasses.field(default=value, metadata={"key": before})


def _unet() -> dict[str, Any]:
  """The fields of the paper's U-Net, as its class has them."""
  fields = dataclasses.fields(UNet)
  unset = ("out_channels", "num_classes", "parent", "name")  # the data set's, and Flax's own
  return {field.name: field.default for field in fields if field.name not in unset}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  name: str = "unet"  # one of jaxinf.networks.MODELS
  fields: Mapping[str, Any] = dataclasses.field(default_factory=_unet)  # of that class


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  schedule: str = "linear"  # one of jaxinf.diffusion.schedule.SCHEDULES, or betas or alpha_bars
  num_steps: int = 1000  # of the schedule: t = 0 … num_steps − 1
  beta_start: float = 1e-4  # β of the first step
  beta_end: float = 0.02  # of the last
  table: tuple[float, ...] = added(())  # β or ᾱ at all num_steps, of schedules betas and alpha_bars
  prediction: str = added("epsilon")  # of the network: epsilon, sample, v, flow or edm
  zero_terminal_snr: bool = added(False)  # the schedule is rescaled to end in noise alone
  # Of the loss, by timestep: min_snr, p2 or table; None: the prediction's own.
  weight: str | None = added(None)
  weight_gamma: float | None = added(None)  # γ of min_snr (None: 5) and p2 (None: 1)
  weight_table: tuple[float, ...] = added(())  # at all num_steps, of weight table
  time: str = added("uniform")  # the law of t in training: uniform or logit_normal
  time_mean: float | None = added(None)  # of logit t (None: 0), or of ln σ for edm (None: −1.2)
  time_std: float | None = added(None)  # likewise (None: 1, or 1.2)
  shift: float = added(1.0)  # of t towards noise, for flow
  sigma_data: float = added(0.5)  # standard deviation of the data, for edm
  raw: bool = added(False)  # the network is the denoiser D(x, σ) itself, for edm


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  # Of a model of latents: a folder with an AutoencoderKL in diffusers' format, or "trained" for the
  # one of the stage train-vae. None: the model is of the data themselves.
  autoencoder: str | None = None
  sample: bool = True  # each draw samples the posterior of a latent; False: its mean
  batch_size: int = 8  # images at a time through the autoencoder


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  num_samples: int = 200  # to be explained
  sampler: str = "ddpm"  # ddpm, ddim or euler
  num_steps: int | None = None  # None: all of the schedule
  batch_size: int = 25  # samples at a time
  keep_trajectory: bool = False  # all states of each sample, for measurements of trajectories
  clip: bool | None = added(None)  # predicted data to [-1, 1]; None: where the data are pixels
  # Of classifier-free guidance: 1 is the model's own prediction, more moves away from the one
  # without conditioning.
  guidance_scale: float = added(1.0)
  # An .npz file with the samples' conditioning (labels, text), one row each; None: labels in turn,
  # or text of training examples evenly spaced.
  conditioning: str | None = added(None)


@dataclasses.dataclass(frozen=True)
class DrawConfig:
  """How draws of (t, ε) are made: by default the best of those measured, which is the library's."""

  timesteps: str = Draws.timesteps  # stratified or uniform
  antithetic: bool = Draws.antithetic  # draws in pairs of (t, ε) and (t, −ε)
  shared: bool = Draws.shared  # whether all examples have the same draws


@dataclasses.dataclass(frozen=True)
class CurvatureConfig:
  kind: str = renamed("method", "kfac")  # kfac, ekfac, shampoo, diagonal, identity or exact
  approx: str = renamed("sharing", "expand")  # expand or reduce, over positions
  fisher: str = renamed("estimator", "mc")  # mc, empirical or exact
  samples: int = renamed("targets", 1)  # model-sampled targets for each draw
  draws: int = 250  # of (t, ε) for each example
  batch_size: int = 128  # (example, draw) pairs at a time
  skip: tuple[str, ...] = SKIP_NORMALISATION  # regular expressions on parameter paths to leave out
  diagonal: tuple[str, ...] = ()  # likewise, layers whose curvature is diagonal
  only: tuple[str, ...] | None = None  # likewise, parameters to keep; None: all
  partitions: int = 1  # groups of layers fitted one after another, in less memory
  decompose: str = "host"  # host (float64) or devices (float32)
  solver: Solver = Solver(tolerance=1e-3, max_iterations=500, sketch_rank=500)  # of exact
  checkpoint_every: int = 500  # batches


@dataclasses.dataclass(frozen=True)
class CurvatureStudyConfig:
  num_images: int = 512  # training images: the curvatures are of them, and they are scored
  num_queries: int = 8  # samples
  draws: int = 1  # of (t, ε) for each image, in the curvatures
  gradient_draws: int = 16  # for each gradient
  dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # λ that are compared
  batch_size: int = 128  # (example, draw) pairs at a time
  # Of the exact reference.
  solver: Solver = Solver(tolerance=1e-2, max_iterations=200, sketch_rank=1_000)


@dataclasses.dataclass(frozen=True)
class CompressStudyConfig:
  num_images: int = 512  # training images that are scored
  num_queries: int = 8  # samples
  draws: int = 16  # of (t, ε) for each gradient
  damping: float = 1e-8  # λ
  svd_ranks: tuple[int, ...] = (1, 5, 10, 20, 50, 100)  # of each layer's matrix
  truncation_shares: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)  # of a layer's numbers kept
  projection_shares: tuple[float, ...] = (0.5, 0.1, 0.02)  # likewise
  batch_size: int = 128  # (image, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class StopConfig:
  top_k: int = 10  # examples of each query whose order is to be stable
  agreement: float = 0.8  # share of them that two halves of the draws have in common
  size: int = renamed("group_size", 8)  # draws of an example in a replicate of a round


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
  measurement: str = "loss"  # one of jaxinf.diffusion.measurements.MEASUREMENTS
  damping: float = 1e-8  # λ, or ρ
  # absolute: λ of all layers; relative: each has ρ times the mean of its eigenvalues.
  damping_kind: str = added("absolute")
  # Further λ, or ρ, scored in the same pass, of which one is recommended.
  sweep: tuple[float, ...] = ()
  draws: int = 250  # of (t, ε) for each example; at most, where auto_draws
  replicates: int = renamed("draw_groups", 5)  # of the draws, for standard errors
  auto_draws: bool = False  # rounds of draws until the top of the order is stable
  stop: StopConfig = StopConfig()  # of auto_draws
  # For each query; None: as many as for an example, 256 for auto_draws. Queries are few, so that
  # their noise costs little to lower.
  query_draws: int | None = 1_000
  query_replicates: int = renamed("query_groups", 2)  # each takes as much memory as one
  design: DrawConfig = DrawConfig()
  # p, by which draws of training examples are weighted, with ℓ^(p − 1): 1 for the loss itself.
  loss_power: float = added(LOSS_POWER, before=1.0)
  # Of the preconditioned query gradients: int16, int8, …, None for float32, or auto: int16, and
  # float32 where that would lose the order.
  compression: str | None = AUTO
  compression_size: float | None = None  # rank of svd; None: its default
  query_chunk: int | None = None  # queries on the devices at a time; None: all of them
  precision: str | None = None  # of training gradients' products: bfloat16, tensorfloat32, float32
  batch_size: int = 128  # (example, draw) pairs at a time
  checkpoint_every: int = 100  # batches

  def __post_init__(self):
    named(DAMPINGS, self.damping_kind, "attribute.damping_kind")


@dataclasses.dataclass(frozen=True)
class SelfInfluenceConfig:
  damping: float = 1e-8  # λ
  draws: int = 250  # of (t, ε) for each example
  replicates: int = 5  # of the draws: 2 or more, and for standard errors 3 or more
  design: DrawConfig = DrawConfig()
  batch_size: int = 128  # (example, draw) pairs at a time
  checkpoint_every: int = 100  # batches


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  draws: int = 250  # of (t, ε) for each example
  # Rows kept for each example, for standard errors; 1 takes half of the disk of 2.
  replicates: int = renamed("draw_groups", 2)
  design: DrawConfig = DrawConfig()
  loss_power: float = added(LOSS_POWER, before=1.0)  # as attribute.loss_power
  compression: str | None = (
    STORE_COMPRESSION  # of the rows: int8, int4, int16, bfloat16, truncation or None
  )
  compression_size: float | None = None  # share of truncation; None: its default
  batch_size: int = 128  # (example, draw) pairs at a time
  reserve_mib: int = 1024  # of the disk that are left free


@dataclasses.dataclass(frozen=True)
class QueryConfig:
  measurement: str = "loss"  # one of jaxinf.diffusion.measurements.MEASUREMENTS
  damping: float = 1e-8  # λ, or ρ
  damping_kind: str = added("absolute")  # or relative, as of attribute
  draws: int = 1_000  # of (t, ε) for each query
  query_replicates: int = renamed("query_groups", 2)  # of these, for standard errors
  layers: tuple[str, ...] | None = None  # regular expressions on layers: only those count
  top_k: int = 10  # examples shown for each query
  batch_size: int = 128  # (query, draw) pairs at a time

  def __post_init__(self):
    named(DAMPINGS, self.damping_kind, "query.damping_kind")


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
  num_subsets: int = 100  # random subsets of the training images; more extend fewer
  num_seeds: int = 5  # models trained on each, and on all images
  share: float = 0.5  # of the images in a subset
  steps: int = 80_000  # of each subset's model; warm-up and decay are train's in proportion
  outside_weight: float = 0.0  # in the loss, of images outside the subset; 0: they are removed
  # Of the subset models: the attributed model's seed, steps and batches, in whose loss images
  # outside the subset have outside_weight: what `replay` predicts.
  same_batches: bool = added(False)
  models_at_once: int = 1  # on each device, as one vmapped step


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
  measurements: tuple[str, ...] = ("loss", "elbo")  # of the samples by each retrained model
  draws: int = 5_000  # of (t, ε) for each sample
  replicates: int = renamed("draw_groups", 20)  # of these, for standard errors
  design: DrawConfig = DrawConfig()
  batch_size: int = 500  # (sample, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  # Of jaxinf.attribution.methods.METHODS.
  methods: tuple[str, ...] = ("influence", "trak", "dtrak", "pixel", "random")
  measurements: tuple[str, ...] = ("loss", "elbo")  # whose gradients are taken at the samples
  # λ of every method, beside its default.
  dampings: tuple[float, ...] = tuple(10.0**power for power in range(-9, 2))
  draws: int = 250  # of (t, ε) for each image
  # No standard errors, which the LDS does not need: half the work.
  replicates: int = renamed("draw_groups", 1)
  query_draws: int = 250  # for each sample
  query_replicates: int = renamed("query_groups", 1)  # of these
  design: DrawConfig = DrawConfig()
  loss_power: float = added(LOSS_POWER, before=1.0)  # as attribute.loss_power, of influence alone
  compression: str | None = AUTO  # of preconditioned query gradients
  # Parts of the samples, each with a pass over the images: the more, the less memory. An eighth of
  # 200 samples at 11 dampings are 21 GB of int16 gradients.
  passes: int = 8
  projection_dim: int = 32_768  # of TRAK and its kin
  projection: str = "rademacher"  # or normal
  journey_steps: int = 10  # timesteps of a sampling trajectory, for Journey-TRAK
  clip: str | None = None  # a folder with a CLIP model, or an .npz of embeddings
  # Of fine-tuning a copy of the model away from a sample, at most.
  unlearning_steps: int = added(Unlearning.max_steps)
  batch_size: int = 128  # (image, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  num_resamples: int = 1_000  # of the bootstrap over subsets


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig:
  # Whose most supporting images are removed, beside random ones.
  methods: tuple[str, ...] = ("influence", "trak", "dtrak")
  dampings: tuple[float, ...] = ()  # λ of each of them; (): their defaults
  measurement: str = "loss"  # whose gradients rank, and which is measured
  shares: tuple[float, ...] = (0.02, 0.1)  # of the training images that are removed
  num_queries: int = 5  # samples, each with models of its own
  num_seeds: int = 1  # models trained without each set
  # Beside the measurement: how alike the samples are that these models and the model of all images
  # make of the same noise; of jaxinf.evaluation.resemblance.METRICS, ssim and mse.
  metrics: tuple[str, ...] = added(())


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  # Gradient of approximations, damping and half precision; truth of the first.
  measurement: str = "loss"
  # Methods that differ in the curvature.
  approximations: tuple[str, ...] = (
    "influence", "ekfac", "kfac-empirical", "kfac-reduce", "kfac-reduce-empirical", "diagonal",
    "identity",
  )  # fmt: skip
  methods: tuple[str, ...] = ("influence", "trak", "dtrak")  # of damping and half precision
  draws: tuple[int, ...] = (10, 50, 250)  # of (t, ε) in all gradients, of damping
  # From 0, whose losses predict each other.
  timesteps: tuple[int, ...] = (0, 9, 19, 49, 79, 99, 199, 499, 799, 998)
  # From 0, whose predicted and actual changes are compared.
  change_timesteps: tuple[int, ...] = (0, 49, 99)
  outside_weight: float = 0.5  # in the loss, of images outside the subset, for timesteps-half
  num_models: int = 8  # in the table of correlations, the one of all images among them


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  num_queries: int = 12  # samples shown
  top_k: int = 8  # training images in each row


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = 0  # of everything that is random, but for subsets of the data
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  diffusion: DiffusionConfig = DiffusionConfig()
  latent: LatentConfig = LatentConfig()
  vae: AutoencoderConfig = AutoencoderConfig()
  train: TrainConfig = TrainConfig()
  sample: SampleConfig = SampleConfig()
  curvature: CurvatureConfig = CurvatureConfig()
  curvature_study: CurvatureStudyConfig = CurvatureStudyConfig()
  compress_study: CompressStudyConfig = CompressStudyConfig()
  attribute: AttributeConfig = AttributeConfig()
  self_influence: SelfInfluenceConfig = SelfInfluenceConfig()
  index: IndexConfig = IndexConfig()
  query: QueryConfig = QueryConfig()
  retrain: RetrainConfig = RetrainConfig()
  measure: MeasureConfig = MeasureConfig()
  score: ScoreConfig = ScoreConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  counterfactual: CounterfactualConfig = CounterfactualConfig()
  study: StudyConfig = StudyConfig()
  report: ReportConfig = ReportConfig()
