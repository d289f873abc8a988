"""A run: its config and folder, what each stage depends on, and what finished stages left there."""

import dataclasses
import functools
import operator
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from jaxinf import data, networks
from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.moments import Moments
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
from jaxinf.networks.autoencoder import AutoencoderKL
from jaxinf.networks.autoencoder_training import module_of
from jaxinf.networks.diffusers import load_autoencoder
from jaxinf.networks.latent_cache import open_moments
from jaxinf.networks.latents import Autoencoder
from jaxinf.networks.training import example_inputs
from jaxinf.runs.config import settings
from jaxinf.runs.process import process_of
from jaxinf.runs.sections import Config, CurvatureConfig, DrawConfig
from jaxinf.runs.stage import STAGES
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import shared_settings

TRAINED = "trained"  # latent.autoencoder where the stage train-vae makes it

# Between the seeds of models trained on all images. Retrained models of the proof have the run's
# seed + 1, + 2, …, so that fewer than this share no seed with them.
SEED_STEP = 1000
ADDRESS = ("127.0.0.1", 8765)  # host and port of `explore`, where the user names none
AT_DAMPING = "damping-"  # before the names of arrays of scores at a damping of the sweep
_LOADED = ("train", "autoencoder", "stand_in")  # of a run, where it has asked for them
_OF_EACH = {name for name, stage in STAGES.items() if stage.models == "each"} | {"score"}


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
    as_json: what stages print is JSON, for programs, and not text.
    folders: stage → folder, for those that lie elsewhere than in workdir/<stage>.
    address: (host, port) that `explore` serves on.
    model_number: of the model that the run is of, from 0. The others have seeds of their own, lie
      in workdir/models/<number>, and share data, autoencoder and samples with the first.
  """

  config: Config
  workdir: Path
  devices: Sequence[jax.Device] | None = None
  images: Path | None = None
  ids: tuple[str, ...] = ()
  shard: tuple[int, int] = (0, 1)
  as_json: bool = False
  address: tuple[str, int] = ADDRESS
  folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)
  model_number: int = 0

  def folder(self, stage: str) -> Path:
    """Where the result of a stage lies: this model's own, or what all models share."""
    name = f"{self._prefix}{stage}" if stage in _OF_EACH else stage
    return self.folders.get(name, self.workdir / name)

  @property
  def _prefix(self) -> str:
    return f"models/{self.model_number}/" if self.model_number else ""

  @property
  def seed(self) -> int:
    """Of training, and of the draws of curvature and scores."""
    return self.config.seed + SEED_STEP * self.model_number

  def of_model(self, number: int) -> "Run":
    """The run of one of the models alone; what was loaded is shared."""
    if number == self.model_number and self.config.train.num_models == 1:
      return self
    section = dataclasses.replace(self.config.train, num_models=1)
    config = dataclasses.replace(self.config, train=section)
    return self._sharing(dataclasses.replace(self, config=config, model_number=number))

  @property
  def first(self) -> "Run":
    """The run whose samples, autoencoder and proof all models share."""
    return self.of_model(0) if self.model_number else self

  def each_model(self) -> list["Run"]:
    """The runs of all models, each alone, the first before the others."""
    num = checked_count(self.config.train.num_models, "train.num_models")
    return [self.of_model(self.model_number + number) for number in range(num)]

  @functools.cached_property
  def dataset(self) -> Dataset:
    """The training images."""
    return data.load(self.config.data)

  @property
  def is_latent(self) -> bool:
    """Whether the model is of latents, and not of the data themselves."""
    return self.config.latent.autoencoder is not None

  @functools.cached_property
  def autoencoder(self) -> Autoencoder:
    """The frozen autoencoder of a model of latents."""
    given = self.config.latent.autoencoder
    assert given is not None
    if given != TRAINED:
      return load_autoencoder(given)
    content_of_stage(self, "train-vae")  # finished, and of these settings and images
    artifact = artifacts.read(self.folder("train-vae"))
    params = flax.traverse_util.unflatten_dict(dict(artifact.arrays), sep="/")
    return Autoencoder(self.autoencoder_module, params, artifact.notes["scaling_factor"])

  @property
  def autoencoder_module(self) -> AutoencoderKL:
    """The autoencoder without parameters, known before one is trained."""
    if self.config.latent.autoencoder == TRAINED:
      return module_of(self.config.vae, self.dataset.image_shape[-1])
    return self.autoencoder.module

  @functools.cached_property
  def train(self) -> Examples:
    """What the model is trained on: the data, or latents of them by their moments."""
    moments = None
    if self.is_latent:
      content_of_stage(self, "encode")  # finished, and of these images and this autoencoder
      own = self.config.latent.sample
      moments = open_moments(moments_folder(self), self.autoencoder, sample=own)
    return self.training_examples(self.dataset, moments)

  def training_examples(self, dataset: Dataset, moments: Moments | None = None) -> Examples:
    """The examples of a data set as training has them: augmented, and latents by their moments."""
    rate, examples = self.config.train.conditioning_dropout, dataset.examples
    null = self.null_conditioning if rate else None
    data = examples.data if moments is None else moments
    return dataclasses.replace(
      examples, data=data, conditioning_dropout=rate, null_conditioning=null
    )

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of what the model is of, known before anything is encoded."""
    shape = self.dataset.image_shape
    if not self.is_latent:
      return shape
    module = self.autoencoder_module
    return (*(n // module.factor for n in shape[:2]), module.latent_channels)

  @functools.cached_property
  def stand_in(self) -> Examples:
    """One example in the shapes of `train`, of which nothing else counts."""
    one = self.dataset.take(np.arange(1)).examples
    return Examples(np.zeros((1, *self.shape), np.float32), one.ids, one.conditioning)

  @property
  def clips(self) -> bool:
    """Whether sampling clips predicted data to [-1, 1]: by default where they are pixels."""
    given = self.config.sample.clip
    return not self.is_latent and self.dataset.is_pixels if given is None else given

  @property
  def null_conditioning(self) -> dict[str, Any]:
    """One row of the conditioning that stands for none: a class of its own, and zeros as text.

    Raises:
      ValueError: the model is given nothing that could be left out.
    """
    given = self.dataset.conditioning
    if not given:
      raise ValueError(
        "train.conditioning_dropout and sample.guidance_scale leave out the conditioning, and "
        "data.conditioning names none: give labels, text or both."
      )
    null = {name: np.zeros(x.shape[1:], x.dtype) for name, x in given.items()}
    labels = self.num_classes
    return null | ({} if labels is None else {"labels": np.int32(labels)})

  @property
  def num_classes(self) -> int | None:
    """Of the labels that the model is given; None where it is given none."""
    return num_classes_of(self.dataset)

  @functools.cached_property
  def data_content(self) -> str:
    """Hash of the training images and their ids."""
    return self.dataset.fingerprint()

  @functools.cached_property
  def model(self) -> nn.Module:
    """The denoiser, without parameters."""
    section = self.config.model
    fields = dict(section.fields)
    return networks.build(section.name, fields, self.shape[-1], self.num_classes)

  @property
  def process(self) -> Process:
    """How data are noised, and what the network predicts."""
    return process_of(self.config.diffusion)

  @functools.cached_property  # one function, so that what is compiled for it serves every stage
  def apply_fn(self) -> ApplyFn:
    """The network as a function of parameters."""
    return networks.apply_fn_of(self.model, self.process)

  def with_curvature(self, section: CurvatureConfig, name: str) -> "Run":
    """The same run with another curvature, which is kept under score/<name>, beside this model's
    scores; what was loaded is shared."""
    folder = self.workdir / self._prefix / "score" / name
    other = dataclasses.replace(
      self,
      config=dataclasses.replace(self.config, curvature=section),
      folders={**self.folders, f"{self._prefix}curvature": folder},
    )
    return self._sharing(other)

  def _sharing(self, other: "Run") -> "Run":
    """`other`, with what was loaded or found for this run, which is the same there."""
    shared = ("dataset", "data_content", "model", "apply_fn", "found")
    vars(other).update({name: getattr(self, name) for name in shared})
    vars(other).update({name: vars(self)[name] for name in _LOADED if name in vars(self)})
    return other

  @functools.cached_property
  def found(self) -> dict[Any, Any]:
    """What is found once about the network, for all models of the run: see DiffusionModel.cache."""
    return {}

  def compute(self, batch_size: int, **how: Any) -> Compute:
    """How this run computes, so many pairs at a time; `how` are further fields of Compute."""
    return Compute(batch_size, self.devices, **how)

  def draws(
    self, num: int, replicates: int | None, design: DrawConfig, loss_power: float | None = None
  ) -> Draws:
    """Draws from the run's seed."""
    fields = dataclasses.asdict(design) | {"loss_power": loss_power}
    return Draws(num, replicates, seed=self.seed, **fields)


def num_classes_of(dataset: Dataset) -> int | None:
  """Classes of the labels that models are given; None where they are given none."""
  if not dataset.conditioning or "labels" not in dataset.conditioning:
    return None
  return len(dataset.label_names) or int(np.max(dataset.conditioning["labels"])) + 1


def check_classes(labels: np.ndarray, dataset: Dataset, whose: str) -> None:
  """Raises ValueError where labels, of `whose`, are of no class that models are given."""
  num = num_classes_of(dataset)
  if num is not None and not np.isin(labels, np.arange(num)).all():
    raise ValueError(
      f"Labels of {whose} must lie in 0…{num - 1}, the classes of {dataset.name!r}; got "
      f"{labels.min()}…{labels.max()}."
    )


def check_measurable(run: Run, names: Sequence[str]) -> None:
  """Raises ValueError where the run's process has no measurement of one of these names."""
  for name in names:
    measurement = measurement_named(name)
    try:
      measurement.check(run.process)
    except ValueError as error:
      raise ValueError(f"{name} cannot be measured here: {error}") from error


def check_attributable(run: Run, names: Sequence[str]) -> None:
  """Raises ValueError where one of these measurements has no gradient, or there is none here."""
  check_measurable(run, names)
  for name in names:
    measurement_named(name).check_gradient(run.process)


def check_conditioning(run: Run) -> None:
  """Raises ValueError where conditioning is to be left out and the model is given none."""
  if run.config.train.conditioning_dropout or run.config.sample.guidance_scale != 1:
    _ = run.null_conditioning


def key_of(run: Run, name: str) -> dict[str, Any]:
  """What the result of a stage depends on, as its row of STAGES says: settings, and its inputs.

  Raises:
    ValueError: an input is not finished, or was made with other settings (StaleArtifact).
  """
  stage = named(STAGES, name, "stage")
  if stage.models != "each":
    run = run.first
  key: dict[str, Any] = {"seed": run.seed, name: own_settings(run, name)}
  for path in stage.reads:
    key[path.rpartition(".")[2]] = settings(operator.attrgetter(path)(run.config))
  if stage.data:
    key["data"] = data_key(run, latents=name not in ("train-vae", "encode"))
  if stage.data == "labelled":
    key["data"] |= _labels(run.dataset)
  if stage.key:
    key |= pkgutil.resolve_name(stage.key)(run)
  inputs = lambda run: {
    f"{needed}_content": content_of_stage(run, needed) for needed in stage.needs
  }
  if stage.models == "all" and (others := run.each_model()[1:]):
    key["models"] = [inputs(other) for other in others]
  return key | inputs(run)


def data_key(run: Run, latents: bool = True) -> dict[str, Any]:
  """What results depend on of the training examples."""
  key: dict[str, Any] = {"content": run.data_content, "random_flip": run.dataset.random_flip}
  if latents and run.is_latent:
    key["latents_content"] = content_of_stage(run, "encode")
    key["latents_sampled"] = run.config.latent.sample
  return key


def moments_folder(run: Run) -> Path:
  """Where the moments of the images' latents lie."""
  return run.folder("encode") / "moments"


def own_settings(run: Run, name: str) -> dict[str, Any]:
  """The fields of a stage's own section that its result depends on.

  A measurement goes by its own name, which holds a hash of what its text may refer to as a file.
  """
  stage = named(STAGES, name, "stage")
  assert stage.section is not None
  section = settings(getattr(run.config, stage.section))
  if "measurement" in section:
    section["measurement"] = measurement_named(section["measurement"]).name
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
  shapes = jax.eval_shape(run.model.init, jax.random.key(0), *example_inputs(run.stand_in))[
    "params"
  ]
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
  """The scores of a run, means over its models."""
  folders = [model.folder("attribute") for model in run.each_model()]
  return mean_scores([scores_of(artifacts.read(folder)) for folder in folders])


def scores_of(artifact: artifacts.Artifact) -> Scores:
  """The scores, at the first damping, that the stage `attribute` left."""
  own = {name: array for name, array in artifact.arrays.items() if "/" not in name}
  return Scores(settings=artifact.notes["settings"], **_renamed(own))


def attribute_sweep_of(artifact: artifacts.Artifact) -> list[Scores]:
  """All scores that the stage `attribute` left: at its damping, then at those of the sweep."""
  first, others = scores_of(artifact), dict[str, dict[str, np.ndarray]]()
  for path, array in artifact.arrays.items():
    damping, slash, name = path.removeprefix(AT_DAMPING).partition("/")
    if slash:
      others.setdefault(damping, {})[name] = array
  found, common = [first], shared_settings(first)
  for damping, arrays in others.items():
    settings = {**common, "damping": float(damping)}
    found.append(dataclasses.replace(first, settings=settings, **_renamed(arrays)))
  return found


def _renamed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Arrays of scores by the names that they have today."""
  before = {"group_values": "replicate_values", "query_group_values": "query_replicate_values"}
  return {before.get(name, name): array for name, array in arrays.items()}


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
