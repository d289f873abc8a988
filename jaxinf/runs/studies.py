"""What the studies of a run compute, beside the line from training to report, and its memory."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.compression.compression import Compression, compression_named
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.curvature.fit import fit_curvature, partition
from jaxinf.curvature.memory import layer_memory, memory_table
from jaxinf.engine import num_devices, processes
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Kept
from jaxinf.engine.worklist import Rows
from jaxinf.evaluation.compression_study import compression_study
from jaxinf.evaluation.curvature_study import curvature_study as evaluate_curvatures
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import layers_of
from jaxinf.report.studies import write_compression_study, write_curvature_study
from jaxinf.runs.run import Run, fresh_model, kind_of_config, load_curvature, load_model
from jaxinf.runs.sampling import load_samples
from jaxinf.runs.sections import CompressStudyConfig


def curvature_memory(run: Run) -> str:
  """What the curvature would take, as a table; needs no trained model and computes nothing."""
  config, model, kind = run.config.curvature, fresh_model(run), kind_of_config(run.config.curvature)
  train, devices = run.stand_in, num_devices(run.devices)
  selection = kind.selection(Selection(config.skip, config.diagonal, config.only))
  layers = layers_of(model, train, selection)
  each = math.ceil(config.batch_size / devices)
  row = Rows.of(train, 1).padded_batch(0, 1)
  memory = layer_memory(layers, model, row, kind, batch_size=each, augmentation=train.augmentation)
  table = memory_table(memory, partition(layers.layers, config.partitions))
  return (
    f"{layers.coverage.summary()}\nMiB a layer, each on every one of {devices} devices but for "
    f"eigenbases (host and disk); workspace is at most, for {config.batch_size} pairs:\n{table}\n"
    "More curvature.partitions make the sums and rotations smaller, a smaller "
    "curvature.batch_size the workspace."
  )


def curvature_study(run: Run) -> Outcome:
  """Approximations of the curvature against the exact one."""
  config, folder, seed = run.config.curvature_study, run.folder("curvature-study"), run.config.seed
  train, compute = (
    _few(run, config.num_images, seed),
    run.compute(config.batch_size),
  )
  fit = functools.partial(
    fit_curvature,
    load_model(run),
    train,
    draws=Draws(config.draws, seed=seed),
    skip=run.config.curvature.skip,
    compute=compute,
  )
  study = evaluate_curvatures(
    fit,
    queries=_samples(run, config.num_queries, "curvature_study"),
    train=train,
    dampings=config.dampings,
    gradient_draws=Draws(config.gradient_draws, seed=seed),
    solver=config.solver,
    compute=compute,
    keep=Kept(folder / "sums"),
  )
  arrays = _arrays(study, "dampings", "errors", "correlations", "residuals", "iterations")
  files = _shown(folder, study, write_curvature_study)
  notes = {
    "files": files,
    "names": study.names,
    "settings": study.settings,
    "largest_eigenvalue": study.largest_eigenvalue,
  }
  return arrays, notes, f"a comparison of {len(study.names)} approximations"


def compress_study(run: Run) -> Outcome:
  """Compressions of the query gradients against float32."""
  config, seed = run.config.compress_study, run.config.seed
  study = compression_study(
    load_curvature(run, load_model(run)),
    queries=_samples(run, config.num_queries, "compress_study"),
    train=_few(run, config.num_images, seed),
    damping=config.damping,
    draws=Draws(config.draws, seed=seed),
    variants=_variants(config),
    compute=run.compute(config.batch_size),
  )
  arrays = _arrays(study, "sizes", "errors", "pearson", "spearman")
  files = _shown(run.folder("compress-study"), study, write_compression_study)
  notes = {"files": files, "names": study.names, "settings": study.settings}
  return arrays, notes, f"a comparison of {len(study.names)} compressions"


def _variants(config: CompressStudyConfig) -> Mapping[str, Compression]:
  """Description → compression, family by family."""
  sized = {
    "svd": config.svd_ranks,
    "truncation": config.truncation_shares,
    "projection": config.projection_shares,
  }
  variants = [compression_named(name) for name in ("int16", "int8", "int4", "bfloat16")]
  variants += [compression_named(name, size) for name, sizes in sized.items() for size in sizes]
  return {compression.description: compression for compression in variants}


def _few(run: Run, num: int, seed: int) -> Examples:
  """A subset of the training examples with the labels' proportions."""
  chosen = run.dataset.sample(num, seed)
  return run.train.take(run.dataset.positions(chosen.ids))


def _samples(run: Run, num: int, section: str) -> Examples:
  """The first samples; ValueError where there are not as many."""
  samples = load_samples(run)
  if not 1 <= num <= len(samples):
    raise ValueError(
      f"{section}.num_queries must lie in 1…{len(samples)}, the number of samples; got {num}."
    )
  return samples.take(np.arange(num))


def _shown(folder: Path, study: Any, write: Callable[[Path, Any], list[Path]]) -> list[str]:
  """Prints the table and writes the page, in the primary process; returns names of its files."""
  if not processes.is_primary():
    return []
  print(study.table())
  return [path.name for path in write(folder, study)]


def _arrays(study: Any, *names: str) -> dict[str, np.ndarray]:
  return {name: np.asarray(getattr(study, name)) for name in names}
