"""A run: its config and folder, what each stage depends on, and what finished stages left there."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from jaxinf import data, networks
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.registry import named
from jaxinf.core.types import ApplyFn, Params
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.kinds import Kind, kind_of
from jaxinf.curvature.saving import curvature_from
from jaxinf.data.dataset import Dataset
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.process import Process
from jaxinf.engine import artifacts
from jaxinf.engine.compute import Compute
from jaxinf.networks.training import example_inputs
from jaxinf.runs.config import settings
from jaxinf.runs.process import process_of
from jaxinf.runs.sections import Config, CurvatureConfig, DrawConfig
from jaxinf.runs.stage import STAGES
from jaxinf.scores.scores import Scores


@dataclasses.dataclass(frozen=True)
class Run:
  """One experiment.

  Attributes:
    config: of all stages.
    workdir: folder of the artefacts.
    devices: local devices; all of them where None.
    images: a file or folder of images that a stage on the store acts on, beside the config's.
    ids: of training images, likewise.
    shard: (i, n), the part of the models to retrain that this process trains: the i-th of n.
    folders: stage → folder, for those that lie elsewhere than in workdir/<stage>.
  """

  config: Config
  workdir: Path
  devices: Sequence[jax.Device] | None = None
  images: Path | None = None
  ids: tuple[str, ...] = ()
  shard: tuple[int, int] = (0, 1)
  folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)

  def folder(self, stage: str) -> Path:
    return self.folders.get(stage, self.workdir / stage)

  @functools.cached_property
  def dataset(self) -> Dataset:
    """The training images."""
    return data.load(self.config.data)

  @functools.cached_property
  def train(self) -> Examples:
    """What the model is trained on."""
    return self.dataset.examples

  @functools.cached_property
  def data_content(self) -> str:
    """Hash of the training images and their ids."""
    return self.dataset.fingerprint()

  @functools.cached_property
  def model(self) -> nn.Module:
    """The denoiser, without parameters."""
    section = self.config.model
    return networks.build(section.name, dict(section.fields), self.train.shape[-1])

  @property
  def process(self) -> Process:
    """How data are noised, and what the network predicts."""
    return process_of(self.config.diffusion)

  @functools.cached_property  # one function, so that what is compiled for it serves every stage
  def apply_fn(self) -> ApplyFn:
    """The network as a function of parameters."""
    return networks.apply_fn_of(self.model, self.process)

  def with_curvature(self, section: CurvatureConfig, folder: Path) -> "Run":
    """The same run with another curvature in a folder of its own; what was loaded is shared."""
    other = dataclasses.replace(
      self,
      config=dataclasses.replace(self.config, curvature=section),
      folders={**self.folders, "curvature": folder},
    )
    shared = ("dataset", "train", "data_content", "model", "apply_fn", "found")
    vars(other).update({name: getattr(self, name) for name in shared})
    return other

  @functools.cached_property
  def found(self) -> dict[Any, Any]:
    """What is found once about the network, for all models of the run: see DiffusionModel.cache."""
    return {}

  def compute(self, batch_size: int, **how: Any) -> Compute:
    """How this run computes, so many pairs at a time; `how` are further fields of Compute."""
    return Compute(batch_size, self.devices, **how)

  def draws(self, num: int, replicates: int | None, design: DrawConfig) -> Draws:
    """Draws from the run's seed."""
    return Draws(num, replicates, seed=self.config.seed, **dataclasses.asdict(design))


def check_measurable(run: Run, names: Sequence[str]) -> None:
  """Raises ValueError where the run's process has no measurement of one of these names."""
  for name in names:
    measurement = measurement_named(name)
    try:
      measurement.check(run.process)
    except ValueError as error:
      raise ValueError(f"{name} cannot be measured here: {error}") from error


def key_of(run: Run, name: str) -> dict[str, Any]:
  """What the result of a stage depends on, as its row of STAGES says: settings, and its inputs.

  Raises:
    ValueError: an input is not finished, or was made with other settings (StaleArtifact).
  """
  stage = named(STAGES, name, "stage")
  key: dict[str, Any] = {"seed": run.config.seed, name: own_settings(run, name)}
  for path in stage.reads:
    key[path.rpartition(".")[2]] = settings(operator.attrgetter(path)(run.config))
  if stage.data:
    key["data"] = {"content": run.data_content, "random_flip": run.dataset.random_flip}
  if stage.data == "labelled":
    key["data"] |= _labels(run.dataset)
  return key | {f"{needed}_content": content_of_stage(run, needed) for needed in stage.needs}


def own_settings(run: Run, name: str) -> dict[str, Any]:
  """The fields of a stage's own section that its result depends on."""
  stage = named(STAGES, name, "stage")
  assert stage.section is not None
  section = settings(getattr(run.config, stage.section))
  return {k: v for k, v in section.items() if k not in (*stage.pace, *stage.extent)}


def _labels(dataset: Dataset) -> dict[str, Any]:
  labels = {} if dataset.labels is None else {"labels": dataset.labels}
  return {
    "name": dataset.name,
    "labels": artifacts.fingerprint(labels),
    "label_names": dataset.label_names,
  }


def load_model(run: Run) -> DiffusionModel:
  """The trained model of a run."""
  arrays = artifacts.read(run.folder("train")).arrays
  params: Params = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
  return DiffusionModel(run.apply_fn, params, run.process, run.found)


def fresh_model(run: Run) -> DiffusionModel:
  """The model of a run with parameters of zero, for what depends on shapes alone."""
  shapes = jax.eval_shape(run.model.init, jax.random.key(0), *example_inputs(run.train))["params"]
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  return DiffusionModel(run.apply_fn, params, run.process)  # zeros say nothing of the network


def load_curvature(run: Run, model: DiffusionModel) -> Curvature:
  """The fitted curvature of a run, for its model."""
  artifact = artifacts.read(run.folder("curvature"))
  compute = run.compute(run.config.curvature.batch_size)
  return curvature_from(artifact.arrays, artifact.notes, model, run.train, compute)


def kind_of_config(config: CurvatureConfig) -> Kind:
  """The kind of curvature that a config asks for."""
  fields = {"fisher": config.fisher, "samples": config.samples}
  settings = {"name": config.kind, "approx": config.approx, "solver": vars(config.solver)}
  return kind_of(settings | fields)


def load_scores(run: Run) -> Scores:
  """The scores of a run."""
  artifact = artifacts.read(run.folder("attribute"))
  own = {name: array for name, array in artifact.arrays.items() if "/" not in name}
  return Scores(settings=artifact.notes["settings"], **own)  # type: ignore[arg-type]


def scores_arrays(scores: Scores, prefix: str = "") -> dict[str, np.ndarray]:
  """The arrays of scores by name, as `load_scores` takes them; ids only without a prefix."""
  names = ["replicate_values"] + ["query_replicate_values"] * (
    scores.query_replicate_values is not None
  )
  names += ["query_ids", "train_ids"] * (not prefix)
  names += ["train_groups"] * (not prefix and scores.train_groups is not None)
  return {prefix + name: getattr(scores, name) for name in names}


def content_of_stage(run: Run, stage: str) -> str:
  """Hash of a stage's arrays; ValueError unless it is finished and matches the config."""
  folder = run.folder(stage)
  if not artifacts.finished(folder, key_of(run, stage)):
    raise ValueError(
      f"{folder} holds no finished {stage} yet: run the stage {stage} (or all) first."
    )
  return artifacts.read_manifest(folder)["content"]
