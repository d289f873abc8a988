"""The door between config files and code: a ConfigDict becomes frozen, typed sections.

Unknown and missing fields are errors that name the valid ones. Defaults stand in configs/base.py
alone. The fields of `model` besides its name are those of the model's class.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


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
  name: str  # one of jaxinf.models.MODELS
  fields: Mapping[str, Any]  # of that class


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  schedule: str  # linear or scaled_linear
  num_steps: int
  beta_start: float
  beta_end: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int
  batch_size: int
  learning_rate: float  # the peak
  warmup_steps: int
  decay: str  # cosine (to zero) or constant
  weight_decay: float
  clip_norm: float
  ema_max_decay: float
  ema_warmup_power: float
  checkpoint_every: int  # steps
  log_every: int  # steps


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
  report: ReportConfig


def typed(config: ConfigDict) -> Config:
  """The sections of a ConfigDict; raises ValueError for unknown, missing or mistyped fields."""
  return _section(Config, config, "config")


def check_path(path: str) -> None:
  """Raises ValueError unless `path`, such as "train.steps", leads to a field of Config.

  What lies below `model` is left to the model's class.
  """
  *sections, name = path.split(".")
  cls: Any = Config
  for depth, part in enumerate([*sections, name]):
    if cls is ModelConfig:
      return
    above = ".".join(["config", *sections[:depth]])
    if not dataclasses.is_dataclass(cls):
      raise ValueError(f"{above} is a field, not a section: config.{path} does not exist.")
    fields = typing.get_type_hints(cls)
    if part not in fields:
      raise ValueError(f"{above} has no field {part}. Its fields are: {', '.join(fields)}.")
    cls = fields[part]


def as_dict(section: Any) -> Any:
  """A section as plain dicts, lists and numbers, for manifests."""
  if dataclasses.is_dataclass(section):
    fields = dataclasses.fields(section)
    return {field.name: as_dict(getattr(section, field.name)) for field in fields}
  if isinstance(section, Mapping):
    return {key: as_dict(value) for key, value in section.items()}
  if isinstance(section, list | tuple):
    return [as_dict(value) for value in section]
  return section


def _section(cls: type, config: Any, path: str) -> Any:
  if not isinstance(config, Mapping | ConfigDict):
    raise ValueError(f"{path} must be a section of fields; got {config!r}.")
  if cls is ModelConfig:
    return _model_section(config, path)
  types_of = typing.get_type_hints(cls)
  unknown = sorted(set(config) - set(types_of))
  missing = [name for name in types_of if name not in config]
  if unknown or missing:
    complaints = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    complaints += [f"missing: {', '.join(missing)}"] * bool(missing)
    raise ValueError(f"{path} has {'; '.join(complaints)}. Its fields are: {', '.join(types_of)}.")
  return cls(**{k: _value(t, config[k], f"{path}.{k}") for k, t in types_of.items()})


def _model_section(config: Any, path: str) -> ModelConfig:
  fields = dict(config)
  if "name" not in fields:
    raise ValueError(f"{path} needs a field `name`.")
  name = _value(str, fields.pop("name"), f"{path}.name")
  return ModelConfig(name, {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _value(expected: Any, value: Any, path: str) -> Any:
  """`value` as type `expected`: numbers are widened, sequences become tuples."""
  if dataclasses.is_dataclass(expected):
    return _section(typing.cast(type, expected), value, path)
  if isinstance(expected, types.UnionType):
    if value is None:
      return None
    expected = next(t for t in typing.get_args(expected) if t is not types.NoneType)
  if typing.get_origin(expected) is tuple:
    (item, _) = typing.get_args(expected)
    if isinstance(value, str) or not isinstance(value, list | tuple):
      raise ValueError(f"{path} must be a sequence; got {value!r}.")
    return tuple(_value(item, element, f"{path}[{i}]") for i, element in enumerate(value))
  if expected is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
    raise ValueError(f"{path} must be {expected.__name__}; got {value!r}.")
  return value
