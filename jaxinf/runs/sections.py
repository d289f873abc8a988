"""The sections of a config, frozen and typed. Their defaults stand in configs/base.py alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinf.networks.training import TrainConfig as TrainConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str  # one of jaxinf.data.DATASETS
  data_dir: str | None  # TFDS folder; None: TFDS's default
  path: str | None  # .npz file or image folder, for `arrays` and `folder`
  image_size: int | None  # `folder` crops and resizes to it; None: images as they are
  num_examples: int | None  # a seeded subset of that many; None: all
  seed: int  # of subsets


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  name: str  # one of jaxinf.networks.MODELS
  fields: Mapping[str, Any]  # of that class


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  schedule: str  # linear or scaled_linear
  num_steps: int
  beta_start: float
  beta_end: float


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  num_samples: int
  sampler: str  # ddpm or ddim
  num_steps: int | None  # None: all of the schedule
  batch_size: int
  keep_trajectory: bool


@dataclasses.dataclass(frozen=True)
class SolverConfig:
  tolerance: float  # relative residual of a solve
  max_iterations: int  # for each query
  precision: str  # float32 or float64
  sketch_rank: int  # of the Nyström preconditioner; 0: EK-FAC preconditions


@dataclasses.dataclass(frozen=True)
class CurvatureConfig:
  method: str  # kfac, ekfac, diagonal, identity or cg (exact, for small sets)
  sharing: str  # expand or reduce, over positions
  estimator: str  # mc, empirical or exact
  targets: int  # model-sampled targets for each draw
  draws: int  # of (t, ε) for each example
  batch_size: int  # (example, draw) pairs at a time
  skip: tuple[str, ...]  # regular expressions on parameter paths to leave out
  diagonal: tuple[str, ...]  # likewise, layers whose curvature is diagonal
  only: tuple[str, ...] | None  # likewise, parameters to keep; None: all
  partitions: int  # groups of layers fitted one after another, in less memory
  decompose: str  # host (float64) or devices (float32)
  solver: SolverConfig  # of cg
  checkpoint_every: int  # batches


@dataclasses.dataclass(frozen=True)
class CurvatureStudyConfig:
  num_images: int  # training images: the curvatures are of them, and they are scored
  num_queries: int  # samples
  draws: int  # of (t, ε) for each image, in the curvatures
  gradient_draws: int  # for each gradient
  dampings: tuple[float, ...]
  batch_size: int  # (example, draw) pairs at a time
  solver: SolverConfig  # of the exact reference


@dataclasses.dataclass(frozen=True)
class CompressStudyConfig:
  num_images: int  # training images that are scored
  num_queries: int  # samples
  draws: int  # of (t, ε) for each gradient
  damping: float  # λ
  svd_ranks: tuple[int, ...]
  truncation_shares: tuple[float, ...]  # of a layer's numbers that are kept
  projection_shares: tuple[float, ...]  # likewise
  batch_size: int  # (image, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class DrawConfig:
  timesteps: str  # stratified or uniform
  antithetic: bool  # draws in pairs of (t, ε) and (t, −ε)
  shared: bool  # whether all examples have the same draws


@dataclasses.dataclass(frozen=True)
class StopConfig:
  top_k: int  # examples of each query whose order is to be stable
  agreement: float  # share of them that two halves of the draws have in common
  group_size: int  # draws of an example in a group; a round is draw_groups groups


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
  measurement: str  # one of jaxinf.diffusion.measurements.MEASUREMENTS
  damping: float  # λ
  sweep: tuple[float, ...]  # further λ, scored in the same pass, of which one is recommended
  draws: int  # of (t, ε) for each example; at most, where auto_draws
  draw_groups: int  # groups the draws are split into, for standard errors
  auto_draws: bool  # rounds of draws until the top of the order is stable
  stop: StopConfig  # of auto_draws
  query_draws: int | None  # for each query; None: as many as for an example, 256 for auto_draws
  query_groups: int  # groups these are split into; each takes as much memory as one
  design: DrawConfig
  compression: str | None  # of the preconditioned query gradients: int8, int4, … or None
  compression_size: float | None  # rank of svd; None: its default
  query_blocks: int  # parts of the queries, of which one is on the devices at a time
  precision: str | None  # of products in training gradients: bfloat16, tensorfloat32, float32
  batch_size: int  # (example, draw) pairs at a time
  checkpoint_every: int  # batches


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  draws: int  # of (t, ε) for each example
  draw_groups: int  # rows kept for each example, for standard errors; 1 takes half of 2's disk
  design: DrawConfig
  compression: str | None  # of the rows: int8, int4, int16, bfloat16, truncation or None
  compression_size: float | None  # share of truncation; None: its default
  batch_size: int  # (example, draw) pairs at a time
  reserve_mib: int  # of the disk that are left free


@dataclasses.dataclass(frozen=True)
class QueryConfig:
  measurement: str  # one of jaxinf.diffusion.measurements.MEASUREMENTS
  damping: float  # λ
  draws: int  # of (t, ε) for each query
  query_groups: int  # groups these are split into, for standard errors
  layers: tuple[str, ...] | None  # regular expressions on layers, of which only those count
  top_k: int  # examples shown for each query
  batch_size: int  # (query, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
  num_subsets: int  # random subsets of the training images; more extend fewer
  num_seeds: int  # models trained on each, and on all images
  share: float  # of the images in a subset
  steps: int  # of each subset's model; warm-up and decay are train's in proportion
  outside_weight: float  # in the loss, of images outside the subset; 0: they are removed
  models_at_once: int  # on each device, as one vmapped step


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
  measurements: tuple[str, ...]  # true measurements of the samples by each retrained model
  draws: int  # of (t, ε) for each sample
  draw_groups: int  # groups these are split into, for standard errors
  design: DrawConfig
  batch_size: int  # (sample, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  methods: tuple[str, ...]  # of jaxinf.attribution.methods.METHODS
  measurements: tuple[str, ...]  # whose gradients are taken at the samples
  dampings: tuple[float, ...]  # λ of every method, beside its default
  draws: int  # of (t, ε) for each image
  draw_groups: int
  query_draws: int
  query_groups: int
  design: DrawConfig
  compression: str | None  # of preconditioned query gradients
  passes: int  # parts of the samples, each with a pass over the images: the more, the less memory
  projection_dim: int  # of TRAK and its kin
  projection: str  # rademacher or normal
  journey_steps: int  # timesteps of a sampling trajectory, for Journey-TRAK
  clip: str | None  # a folder with a CLIP model, or an .npz of embeddings
  batch_size: int  # (image, draw) pairs at a time


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  num_resamples: int  # of the bootstrap over subsets


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig:
  methods: tuple[str, ...]  # whose most supporting images are removed, beside random ones
  dampings: tuple[float, ...]  # λ of each of them; (): their defaults
  measurement: str  # whose gradients rank, and which is measured
  shares: tuple[float, ...]  # of the training images that are removed
  num_queries: int  # samples, each with models of its own
  num_seeds: int  # models trained without each set


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  measurement: str  # gradient of approximations, damping and half precision; truth of the first
  approximations: tuple[str, ...]  # methods that differ in the curvature
  methods: tuple[str, ...]  # of damping and half precision
  draws: tuple[int, ...]  # of (t, ε) in all gradients, of damping
  timesteps: tuple[int, ...]  # from 0, whose losses predict each other
  change_timesteps: tuple[int, ...]  # from 0, whose predicted and actual changes are compared
  outside_weight: float  # in the loss, of images outside the subset, for timesteps-half
  num_models: int  # in the table of correlations, the one of all images among them


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  num_queries: int  # samples shown
  top_k: int  # training images in each row


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int
  data: DataConfig
  model: ModelConfig
  diffusion: DiffusionConfig
  train: TrainConfig
  sample: SampleConfig
  curvature: CurvatureConfig
  curvature_study: CurvatureStudyConfig
  compress_study: CompressStudyConfig
  attribute: AttributeConfig
  index: IndexConfig
  query: QueryConfig
  retrain: RetrainConfig
  measure: MeasureConfig
  score: ScoreConfig
  evaluate: EvaluateConfig
  counterfactual: CounterfactualConfig
  study: StudyConfig
  report: ReportConfig
