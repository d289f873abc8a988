"""Runs with few training examples and samples, whose stages are rehearsed, and what that tells."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from jaxinf.core.examples import Examples
from jaxinf.core.moments import Moments
from jaxinf.core.types import PyTree
from jaxinf.data.dataset import Dataset
from jaxinf.diffusion.sampler import sampler_times
from jaxinf.engine import artifacts, processes
from jaxinf.engine.rehearsal import BATCHES, Rehearsal, rehearsing
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, layers_of
from jaxinf.networks import training
from jaxinf.networks.diffusers import load_autoencoder
from jaxinf.networks.latents import Autoencoder
from jaxinf.runs.run import TRAINED, Run, fresh_model, key_of, kind_of_config
from jaxinf.runs.sampling import given_arrays

_DISK_BYTES = 2**25  # written to measure the disk
_KEPT_BYTES = 2**30  # of query rows in a rehearsal, from which more are scaled


@dataclasses.dataclass(frozen=True)
class Reduced(Run):
  """A run on a few of the training examples.

  Attributes:
    few: those.
    classes: of the labels of all.
  """

  few: Dataset | None = None
  classes: int | None = None

  @functools.cached_property
  def dataset(self) -> Dataset:
    assert self.few is not None
    return self.few

  @property
  def num_classes(self) -> int | None:
    return self.classes

  @functools.cached_property
  def autoencoder(self) -> Autoencoder:
    """The run's, or one of random parameters where it is still to be trained."""
    given = self.config.latent.autoencoder
    if given is not None and given != TRAINED:
      return load_autoencoder(given)
    module = self.autoencoder_module
    image = jax.ShapeDtypeStruct((1, *self.dataset.image_shape), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return Autoencoder(module, random_params(params), 1.0)

  @functools.cached_property
  def train(self) -> Examples:
    """Those, as moments of nothing where the model is of latents."""
    moments = None
    if self.is_latent:
      *size, channels = self.shape
      shape = (len(self.dataset), 1 + self.dataset.random_flip, *size, 2 * channels)
      moments = Moments(np.zeros(shape, np.float32), sample=self.config.latent.sample)
    return self.training_examples(self.dataset, moments)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A run that is planned.

  Attributes:
    run: it.
    folder: of the reduced runs; what lies there is thrown away.
    clock: seconds.
    most_bytes: of each device, that a program may take; None: any.
  """

  run: Run
  folder: Path
  clock: Callable[[], float] = time.perf_counter
  most_bytes: int | None = None

  @functools.cached_property
  def params(self) -> PyTree:
    """Random parameters, of which only shapes and sizes count."""
    return random_params(fresh_model(self.run).params)

  @functools.cached_property
  def layers(self) -> Registration:
    """The layers that the curvature covers."""
    config = self.run.config.curvature
    asked = Selection(config.skip, config.diagonal, config.only)
    selection = kind_of_config(config).selection(asked)
    return layers_of(fresh_model(self.run), self.run.stand_in, selection)

  @property
  def num_devices(self) -> int:
    return jax.local_device_count() if self.run.devices is None else len(self.run.devices)

  @property
  def params_bytes(self) -> int:
    return num_bytes(self.params)

  @functools.cached_property
  def state_bytes(self) -> int:
    """Of training: parameters, their EMA, and two moments of Adam."""
    run = self.run
    begin = lambda: training.init_state(run.model, run.stand_in, run.config.train, run.config.seed)
    return num_bytes(jax.eval_shape(begin))

  @property
  def gradient_bytes(self) -> int:
    """Of one row: the gradient matrices of the covered layers."""
    return sum(4 * math.prod(layer.matrix_shape) for layer in self.layers.layers)

  @functools.cached_property
  def images_bytes(self) -> int:
    """Of the training examples: of their moments, where the model is of latents."""
    images = self.run.dataset.images
    if not self.run.is_latent:
      return math.prod(images.shape) * np.dtype(images.dtype).itemsize
    return 8 * (1 + self.run.dataset.random_flip) * len(images) * math.prod(self.run.shape)

  @functools.cached_property
  def sampling_steps(self) -> int:
    """Of each sample; ValueError where the process has not as many."""
    return len(sampler_times(self.run.process, self.run.config.sample.num_steps)) - 1

  @functools.cached_property
  def disk_rate(self) -> float:
    """Bytes a second that reach the disk."""
    block = np.random.default_rng(0).bytes(_DISK_BYTES)
    with tempfile.TemporaryFile(dir=self.folder) as file:
      began = self.clock()
      file.write(block)
      file.flush()
      os.fsync(file.fileno())
      return _DISK_BYTES / (self.clock() - began)

  def reduced(
    self, name: str, examples: int, queries: int = 1, states: bool = False, **sections: Any
  ) -> Reduced:
    """A reduced run with a model of random parameters, and noise in the place of its samples.

    Args:
      name: of its folder.
      examples, queries: training examples and samples, or all where there are fewer.
      states: whether samples have trajectories where the run's have.
      sections: dicts of fields that differ, by section of the config.
    """
    data, total = self.run.dataset, self.run.config.sample.num_samples
    num, few = min(examples, len(data)), min(queries, total)
    if num == few and len(data) != total:  # so that passes over them are told apart
      num, few = (num, few + 1) if few < total else (num + 1, few)
    # Of a file of conditioning, which has a row for each sample, shapes alone would count.
    of_samples = {"num_samples": few, "conditioning": None}
    sections["sample"] = of_samples | sections.get("sample", {})
    sections["train"] = {"num_models": 1} | sections.get("train", {})
    changed = {
      section: dataclasses.replace(getattr(self.run.config, section), **fields)
      for section, fields in sections.items()
    }
    run = Reduced(
      dataclasses.replace(self.run.config, **changed),
      self.folder / name,
      self.run.devices,
      few=data.take(np.arange(num)),
      classes=self.run.num_classes,
    )
    if run.is_latent:
      keep(run, "encode", {"digest": np.zeros(1)})
    keep(run, "train", flax.traverse_util.flatten_dict(self.params, sep="/"))
    rng = np.random.default_rng(0)
    noise, pictures = (
      rng.uniform(-1, 1, (few, *shape)).astype(np.float32)
      for shape in (run.shape, data.image_shape)
    )
    ids = np.array([f"sample_{i:04d}" for i in range(few)])
    samples = {"ids": ids, "images": noise, **given_arrays(run)}
    keep(run, "sample", samples | ({"pictures": pictures} if run.is_latent else {}))
    if states and run.config.sample.keep_trajectory:
      each = np.repeat(noise[:, None], self.sampling_steps + 1, axis=1)
      keep(run, "sample", {"ids": ids, "trajectories": each}, "trajectories")
    return run

  @contextlib.contextmanager
  def rehearsal(
    self,
    run: Reduced,
    num_queries: int | None = None,
    num_train: int | None = None,
    scores: bool = False,
  ) -> Iterator[Rehearsal]:
    """Quietly rehearses what is done in here with a reduced run.

    Args:
      run: it.
      num_queries, num_train: that stand for its samples and training examples; None: the run's.
      scores: whether training gradients meet rows of queries, which grow in number.
    """
    log, few = logging.getLogger("jaxinf"), run.config.sample.num_samples
    num_queries = num_queries or self.run.config.sample.num_samples
    sizes = {few: num_queries, len(run.dataset): num_train or len(self.run.dataset)}
    growth = num_queries / few if scores else 1.0
    level = log.level
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of numbers that mean nothing
      log.setLevel(logging.ERROR)
      try:
        with rehearsing(sizes, self.clock, self.most_bytes, growth) as found:
          yield found
      finally:
        log.setLevel(level)


def keep(
  run: Run, stage: str, arrays: Mapping[str, Any], within: str = "", notes: Mapping = {}
) -> None:
  """Writes arrays as those of a stage."""
  key = key_of(run, stage)
  if processes.is_primary():
    artifacts.write(run.folder(stage) / within, key, arrays, notes=notes, cost={})
  processes.wait_for_all(f"{stage} {within} kept")


def examples_of_batches(batch_size: int, rows_each: int, row_bytes: int = 0) -> int:
  """Examples whose rows fill as many batches as a rehearsal goes through.

  Args:
    batch_size: rows.
    rows_each: rows of an example.
    row_bytes: that are kept of an example: where memory is short, a third of the batches do.
  """
  num = math.ceil(BATCHES * batch_size / rows_each)
  return num if not row_bytes else min(num, max(math.ceil(num / 3), _KEPT_BYTES // row_bytes))


def random_params(params: PyTree, seed: int = 0) -> PyTree:
  """Parameters N(0, 1 / fan-in): of zeros, or of numbers that vanish, times would be others."""
  rng = np.random.default_rng(seed)

  def filled(leaf):
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

  return jax.tree.map(filled, params)


def num_bytes(tree: PyTree) -> int:
  """Bytes of arrays, or of their shapes."""
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
