"""A run: its config and folder, what each stage depends on, and what finished stages left there."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import data, networks
from jaxinf.core.random import example_numbers
from jaxinf.core.types import ApplyFn, Eigenbasis, Params
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.ggn import GGN, Solver
from jaxinf.data.dataset import Dataset
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.schedule import SCHEDULES, Schedule
from jaxinf.engine import artifacts
from jaxinf.engine.worklist import Rows
from jaxinf.layers.coverage import Coverage, Row
from jaxinf.layers.specs import Layer
from jaxinf.runs.config import as_dict
from jaxinf.runs.sections import Config, DrawConfig
from jaxinf.scores.scores import Scores

ORDER = ("train", "sample", "curvature", "attribute", "report")

# What a stage computes: the arrays and notes of its artefact, and a word on them for the user.
Outcome = tuple[Mapping[str, np.ndarray], Mapping[str, Any], str]

# Fields that change how fast a stage goes but not what it computes.
PACE = {
  "train": {"log_every", "checkpoint_every"},
  "sample": {"batch_size"},
  "curvature": {"batch_size", "partitions", "checkpoint_every"},
  "curvature-study": {"batch_size"},
  "compress-study": {"batch_size"},
  "attribute": {"batch_size", "query_blocks", "checkpoint_every"},
  "index": {"batch_size", "reserve_mib"},
}


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
  def data_content(self) -> str:
    """Hash of the training images and their ids."""
    return self.dataset.fingerprint()

  @functools.cached_property
  def model(self) -> nn.Module:
    """The denoiser, without parameters."""
    section = self.config.model
    return networks.build(section.name, dict(section.fields), self.dataset.image_shape[-1])

  @property
  def schedule(self) -> Schedule:
    """The noise schedule."""
    section = self.config.diffusion
    if section.schedule not in SCHEDULES:
      raise ValueError(
        f"Unknown diffusion.schedule {section.schedule!r}; there are: {', '.join(SCHEDULES)}."
      )
    return SCHEDULES[section.schedule](section.num_steps, section.beta_start, section.beta_end)


def key_of(run: Run, stage: str) -> dict:
  """What the result of a stage depends on: config fields and contents of its inputs.

  Raises:
    ValueError: an input is not finished, or was made with other settings (StaleArtifact).
  """
  config = run.config
  pace = PACE.get(stage, set())
  section = as_dict(getattr(config, stage.replace("-", "_")))
  own = {k: v for k, v in section.items() if k not in pace}
  sections, inputs = _DEPENDS[stage]
  key: dict[str, Any] = {"seed": config.seed, stage: own}
  key |= {name: as_dict(getattr(config, name)) for name in sections}
  dataset = run.dataset
  if stage != "sample":
    key["data"] = {"content": run.data_content, "random_flip": dataset.random_flip}
  if stage == "curvature-study":
    key["skip"] = list(config.curvature.skip)
  if stage == "report":
    labels = {} if dataset.labels is None else {"labels": dataset.labels}
    key["data"] |= {
      "name": dataset.name,
      "labels": artifacts.fingerprint(labels),
      "label_names": dataset.label_names,
    }
  return key | {f"{name}_content": content_of_stage(run, name) for name in inputs}


# Stage → further config sections and earlier stages it depends on.
_DEPENDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "train": (("model", "diffusion"), ()),
  "sample": (("diffusion",), ("train",)),
  "curvature": (("diffusion",), ("train",)),
  "curvature-study": (("diffusion",), ("train", "sample")),
  "compress-study": ((), ("train", "sample", "curvature")),
  "attribute": ((), ("train", "sample", "curvature")),
  "index": ((), ("train", "curvature")),
  "report": ((), ("attribute",)),
}


def draw_design(config: DrawConfig, random_flip: bool = False) -> DrawDesign:
  """The design of draws that a config section asks for; with flips for training images."""
  return DrawDesign(**dataclasses.asdict(config), random_flip=random_flip)


def load_task(run: Run) -> Task:
  """The trained model of a run."""
  arrays = artifacts.read(run.folder("train")).arrays
  params: Params = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
  return Task(_apply_fn(run), params, run.schedule)


def fresh_task(run: Run) -> Task:
  """The model of a run with parameters of zero, for what depends on shapes alone."""
  network = run.model
  images, t = jnp.zeros((1, *run.dataset.image_shape)), jnp.zeros(1, jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), images, t)["params"]
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  return Task(_apply_fn(run), params, run.schedule)


def load_samples(run: Run, trajectories: bool = True) -> dict[str, np.ndarray]:
  """The arrays `ids` and `images` of the samples, and `trajectories` if asked for and kept."""
  arrays = dict(artifacts.read(run.folder("sample")).arrays)
  place = run.folder("sample") / "trajectories"
  there = (place / "arrays.npz").exists()  # they may be left out of a copy, being large
  if trajectories and there and artifacts.finished(place, key_of(run, "sample")):
    arrays["trajectories"] = artifacts.read(place).arrays["trajectories"]
  return arrays


def load_curvature(run: Run, task: Task) -> Curvature:
  """The fitted curvature of a run, for its task."""
  artifact = artifacts.read(run.folder("curvature"))
  layers = tuple(_from_json(Layer, layer) for layer in artifact.notes["layers"])
  coverage = load_coverage(artifact.manifest)
  parts = [field.name for field in dataclasses.fields(Eigenbasis)]
  bases = {
    layer.name: Eigenbasis(*(artifact.arrays.get(f"{layer.name}/{part}") for part in parts))
    for layer in layers
  }
  settings, diagnostics = (dict(artifact.notes[name]) for name in ("settings", "diagnostics"))
  exact = None
  if settings["method"] == "cg":
    rows = Rows(run.dataset.images, example_numbers(run.dataset.ids), settings["draws"])
    exact = GGN(
      task, layers, rows, seed=settings["seed"], batch_size=run.config.curvature.batch_size,
      devices=run.devices, solver=Solver(**settings["solver"]),
      random_flip=settings.get("random_flip", False),
    )  # fmt: skip
  return Curvature(layers, bases, coverage, task, settings, diagnostics, exact)


def load_coverage(manifest: Mapping[str, Any]) -> Coverage:
  """The coverage table from the manifest of a curvature."""
  return Coverage(tuple(_from_json(Row, row) for row in manifest["notes"]["coverage"]))


def load_scores(run: Run) -> Scores:
  """The scores of a run."""
  artifact = artifacts.read(run.folder("attribute"))
  own: dict[str, Any] = {n: array for n, array in artifact.arrays.items() if "/" not in n}
  return Scores(**own, settings=artifact.notes["settings"])


def scores_arrays(scores: Scores, prefix: str = "") -> dict[str, np.ndarray]:
  """The arrays of scores by name, as `load_scores` takes them; ids only without a prefix."""
  names = ["group_values"] + ["query_group_values"] * (scores.query_group_values is not None)
  names += ["query_ids", "train_ids"] * (not prefix)
  return {prefix + name: getattr(scores, name) for name in names}


def _apply_fn(run: Run) -> ApplyFn:
  network = run.model

  def apply_fn(params: Params, x_t: jax.Array, t: jax.Array) -> Any:
    return network.apply({"params": params}, x_t, t)

  return apply_fn


def _from_json(cls: type, fields: Mapping[str, Any]) -> Any:
  """A dataclass from its fields as JSON keeps them: lists were tuples."""
  return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def content_of_stage(run: Run, stage: str) -> str:
  """Hash of a stage's arrays; ValueError unless it is finished and matches the config."""
  folder = run.folder(stage)
  if not artifacts.finished(folder, key_of(run, stage)):
    raise ValueError(
      f"{folder} holds no finished {stage} yet: run the stage {stage} (or all) first."
    )
  return artifacts.read_manifest(folder)["content"]
