"""The stages of a run: load → compute → save, one function a stage.

train → sample → curvature → attribute → report. Each leaves an artefact under workdir/<stage>/; a
finished one is reused where config and inputs match, and refused with the difference where not.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import artifacts, data, models, training
from jaxinf.artifacts import Artifact
from jaxinf.attribution.influence import influence
from jaxinf.config import Config, as_dict
from jaxinf.costs import measured
from jaxinf.curvature.coverage import Coverage, Row
from jaxinf.curvature.fit import Curvature, fit_curvature
from jaxinf.curvature.layers import Layer
from jaxinf.data.dataset import Dataset
from jaxinf.diffusion import sampler
from jaxinf.diffusion.schedule import SCHEDULES, Schedule
from jaxinf.diffusion.task import Task
from jaxinf.parallel import Rows, map_batches
from jaxinf.progress import clock
from jaxinf.random import example_numbers, fold_in_each, stream
from jaxinf.types import Eigenbasis, Params, Scores

_LOG = logging.getLogger("jaxinf")

# Fields that change how fast a stage goes but not what it computes.
_PACE = {
  "train": {"log_every", "checkpoint_every"},
  "sample": {"batch_size"},
  "curvature": {"batch_size"},
  "attribute": {"batch_size"},
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One experiment: its config, its folder, and the local devices to use (None: all)."""

  config: Config
  workdir: Path
  devices: Sequence[jax.Device] | None = None

  def folder(self, stage: str) -> Path:
    return self.workdir / stage


def train(run: Run) -> Artifact:
  """Trains the model, or imports it; the artefact holds its EMA parameters."""
  dataset = data.load(run.config.data)
  key = _train_key(run, dataset)
  return _stage(run, "train", key, lambda: _train(run, dataset))


def sample(run: Run) -> Artifact:
  """Generates the samples that will be explained."""
  dataset = data.load(run.config.data)
  return _stage(run, "sample", _sample_key(run, dataset), lambda: _sample(run, dataset))


def curvature(run: Run) -> Artifact:
  """Fits the curvature over all training images."""
  dataset = data.load(run.config.data)
  key = _curvature_key(run, dataset)
  return _stage(run, "curvature", key, lambda: _curvature(run, dataset))


def attribute(run: Run) -> Artifact:
  """Scores every training image for every sample."""
  dataset = data.load(run.config.data)
  key = _attribute_key(run, dataset)
  return _stage(run, "attribute", key, lambda: _attribute(run, dataset))


def report(run: Run) -> Artifact:
  """Draws the page report/index.html."""
  dataset = data.load(run.config.data)
  key = _report_key(run, dataset)
  return _stage(run, "report", key, lambda: _report(run, dataset))


def everything(run: Run) -> Artifact:
  """All stages in order."""
  for name in ORDER[:-1]:
    STAGES[name](run)
  return report(run)


# What each stage computes: (arrays, notes) of its artefact, and what to tell the user.
Outcome = tuple[Mapping[str, np.ndarray], Mapping[str, Any], str]


def _train(run: Run, dataset: Dataset) -> Outcome:
  config, folder = run.config, run.folder("train")
  model, schedule = _model(config, dataset), schedule_of(config)
  state = training.init_state(model, dataset.image_shape, config.train, config.seed)
  checkpoints = artifacts.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
    _LOG.info("train: resuming from the checkpoint at step %d", step)
  log = artifacts.MetricsLog(folder, step or 0)
  try:
    state = training.fit(
      model, schedule, dataset, config.train, seed=config.seed, state=state,
      hooks=training.Hooks(save=checkpoints.save, log=log.write), devices=run.devices,
    )  # fmt: skip
  except training.NonFiniteLoss as error:
    raise ValueError(
      f"{error} The last good checkpoint is that of step {checkpoints.latest() or 0} in "
      f"{folder / 'checkpoints'}."
    ) from error
  finally:
    checkpoints.close()
    log.close()
  arrays = flax.traverse_util.flatten_dict(state.ema_params, sep="/")
  num = models.num_params(state.ema_params)
  notes = {"num_parameters": num, "last_metrics": _last_line(folder / "metrics.jsonl")}
  return arrays, notes, f"a model of {num:,} parameters"


def _sample(run: Run, dataset: Dataset) -> Outcome:
  config = run.config.sample
  task = load_task(run, dataset)
  ids = np.array([f"sample_{i:04d}" for i in range(config.num_samples)])

  def kernel(params, batch):
    keys = fold_in_each(stream(run.config.seed, "sample"), batch.ids)
    images, trajectory = sampler.sample(
      task.apply_fn, params, task.schedule, keys, dataset.image_shape, sampler=config.sampler,
      num_steps=config.num_steps, keep_trajectory=config.keep_trajectory,
    )  # fmt: skip
    if trajectory is None:
      return {"images": images}
    return {"images": images, "trajectories": jnp.moveaxis(trajectory, 0, 1)}

  rows = Rows(None, example_numbers(ids))
  arrays = map_batches(
    kernel, task.params, rows, batch_size=config.batch_size, label="sample", unit="samples",
    devices=run.devices,
  )  # fmt: skip
  return {"ids": ids, **arrays}, {}, f"{len(ids)} samples"


def _curvature(run: Run, dataset: Dataset) -> Outcome:
  config = run.config.curvature
  fitted = fit_curvature(
    load_task(run, dataset), dataset.images, ids=dataset.ids, draws=config.draws,
    seed=run.config.seed, skip=config.skip, batch_size=config.batch_size, devices=run.devices,
  )  # fmt: skip
  for line in (fitted.coverage.summary(), f"skipped: {', '.join(fitted.coverage.skipped)}"):
    _LOG.info("curvature: %s", line)
  arrays = {
    f"{name}/{field.name}": np.asarray(getattr(basis, field.name))
    for name, basis in fitted.bases.items()
    for field in dataclasses.fields(basis)
  }
  notes = {
    "layers": [dataclasses.asdict(layer) for layer in fitted.layers],
    "coverage": [dataclasses.asdict(row) for row in fitted.coverage.rows],
    "settings": fitted.settings,
  }
  return arrays, notes, f"the curvature of {len(fitted.layers)} layers"


def _attribute(run: Run, dataset: Dataset) -> Outcome:
  config = run.config.attribute
  task, samples = load_task(run, dataset), artifacts.read(run.folder("sample"))
  scores = influence(
    task, load_curvature(run, dataset, task), samples.arrays["images"], dataset.images,
    damping=config.damping, draws=config.draws, seed=run.config.seed,
    measurement=config.measurement, query_ids=samples.arrays["ids"], train_ids=dataset.ids,
    draw_groups=config.draw_groups, compression=config.compression,
    batch_size=config.batch_size, devices=run.devices,
  )  # fmt: skip
  arrays = {
    "group_values": scores.group_values, "query_ids": scores.query_ids,
    "train_ids": scores.train_ids,
  }  # fmt: skip
  shape = " × ".join(map(str, scores.values.shape))
  return arrays, {"settings": scores.settings}, f"scores of {shape} (sample, training image) pairs"


def _report(run: Run, dataset: Dataset) -> Outcome:
  from jaxinf.report.page import write_report

  finished = {name: artifacts.read(run.folder(name)) for name in ORDER[:-1]}
  files = write_report(
    run.folder("report"),
    config=run.config,
    dataset=dataset,
    samples=finished["sample"].arrays["images"],
    scores=load_scores(run),
    coverage=_coverage(finished["curvature"]),
    manifests={name: artifact.manifest for name, artifact in finished.items()},
  )
  return {}, {"files": [path.name for path in files]}, ", ".join(str(p) for p in files)


def _stage(run: Run, name: str, key: Mapping[str, Any], compute: Callable[[], Outcome]):
  """Reuses a matching artefact; otherwise computes and saves it, and says what comes next."""
  folder = run.folder(name)
  if artifacts.finished(folder, key):
    artifact = artifacts.read(folder)
    _LOG.info("%s: reused %s", name, folder)
    return artifact
  artifacts.begin(folder, key)
  with measured() as cost:
    arrays, notes, what = compute()
  artifact = artifacts.write(folder, key, arrays, notes=notes, cost=cost)
  _LOG.info("%s: wrote %s in %s to %s", name, what, clock(cost["seconds"]), folder)
  rest = ORDER[ORDER.index(name) + 1 :]
  _LOG.info("%s: %s", name, f"next: {rest[0]}" if rest else f"open {folder / 'index.html'}")
  return artifact


def schedule_of(config: Config) -> Schedule:
  """The noise schedule of a config."""
  section = config.diffusion
  if section.schedule not in SCHEDULES:
    raise ValueError(
      f"Unknown diffusion.schedule {section.schedule!r}; there are: {', '.join(SCHEDULES)}."
    )
  return SCHEDULES[section.schedule](section.num_steps, section.beta_start, section.beta_end)


def load_task(run: Run, dataset: Dataset) -> Task:
  """The trained model of a run."""
  model = _model(run.config, dataset)
  arrays = artifacts.read(run.folder("train")).arrays
  params: Params = flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
  return Task(
    lambda params, x_t, t: model.apply({"params": params}, x_t, t), params, schedule_of(run.config)
  )


def load_curvature(run: Run, dataset: Dataset, task: Task) -> Curvature:
  """The fitted curvature of a run."""
  artifact = artifacts.read(run.folder("curvature"))
  tuples = lambda row: {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
  layers = tuple(Layer(**tuples(layer)) for layer in artifact.notes["layers"])
  parts = [field.name for field in dataclasses.fields(Eigenbasis)]
  bases = {
    layer.name: Eigenbasis(*(artifact.arrays[f"{layer.name}/{part}"] for part in parts))
    for layer in layers
  }
  return Curvature(layers, bases, _coverage(artifact), task.params, dict(artifact.notes["settings"]))


def load_scores(run: Run) -> Scores:
  """The scores of a run."""
  artifact = artifacts.read(run.folder("attribute"))
  return Scores(**artifact.arrays, settings=artifact.notes["settings"])


def _coverage(artifact: Artifact) -> Coverage:
  rows = (Row(**{**row, "shape": tuple(row["shape"])}) for row in artifact.notes["coverage"])
  return Coverage(tuple(rows))


def _model(config: Config, dataset: Dataset) -> nn.Module:
  return models.build(config.model.name, dict(config.model.fields), dataset.image_shape[-1])


def _train_key(run: Run, dataset: Dataset) -> dict:
  sections = {"data": {"content": dataset.fingerprint(), "random_flip": dataset.random_flip}}
  return _key(run.config, "train", "model", "diffusion") | sections


def _sample_key(run: Run, dataset: Dataset) -> dict:
  return _key(run.config, "sample", "diffusion") | _input(run, "train", _train_key(run, dataset))


def _curvature_key(run: Run, dataset: Dataset) -> dict:
  inputs = _input(run, "train", _train_key(run, dataset))
  return _key(run.config, "curvature", "diffusion") | inputs


def _attribute_key(run: Run, dataset: Dataset) -> dict:
  return (
    _key(run.config, "attribute")
    | _input(run, "sample", _sample_key(run, dataset))
    | _input(run, "curvature", _curvature_key(run, dataset))
  )


def _report_key(run: Run, dataset: Dataset) -> dict:
  return _key(run.config, "report") | _input(run, "attribute", _attribute_key(run, dataset))


def _key(config: Config, stage: str, *sections: str) -> dict:
  """The stage's own section less its pace, the seed, and other sections it depends on."""
  pace = _PACE.get(stage, set())
  own = {k: v for k, v in as_dict(getattr(config, stage)).items() if k not in pace}
  return {"seed": config.seed, stage: own} | {s: as_dict(getattr(config, s)) for s in sections}


def _input(run: Run, stage: str, key: Mapping[str, Any]) -> dict:
  """The content of an earlier stage's artefact, which must be finished and match."""
  folder = run.folder(stage)
  if not artifacts.finished(folder, key):
    raise ValueError(f"{folder} holds no finished {stage} yet: run the stage {stage} (or all) first.")
  manifest = json.loads((folder / "manifest.json").read_text())
  return {f"{stage}_content": manifest["content"]}


def _last_line(path: Path) -> dict:
  return json.loads(path.read_text().splitlines()[-1])


STAGES = {
  "train": train,
  "sample": sample,
  "curvature": curvature,
  "attribute": attribute,
  "report": report,
  "all": everything,
}
ORDER = ("train", "sample", "curvature", "attribute", "report")
