"""What the studies of a run compute, beside the line from training to report, and its memory."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.compression.compression import Compression, compression_named
from jaxinf.curvature.fit import partition
from jaxinf.curvature.memory import layer_memory, memory_table
from jaxinf.engine import artifacts, num_devices, processes
from jaxinf.engine.artifacts import Outcome
from jaxinf.engine.checkpoints import Kept
from jaxinf.evaluation.compression_study import compression_study
from jaxinf.evaluation.curvature_study import curvature_study as evaluate_curvatures
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from jaxinf.report.compression_page import write_compression_study
from jaxinf.report.study import write_study
from jaxinf.runs.run import Run, fresh_task, load_curvature, load_task
from jaxinf.runs.sections import CompressStudyConfig


def curvature_memory(run: Run) -> str:
  """What the curvature would take, as a table; needs no trained model and computes nothing."""
  config, task, image_shape = run.config.curvature, fresh_task(run), run.dataset.image_shape
  diagonal = (".",) if config.method == "diagonal" else config.diagonal
  selection = Selection(config.skip, diagonal, config.only)
  model = register(task.apply_fn, task.params, image_shape, selection)
  devices = num_devices(run.devices)
  targets = math.prod(image_shape) if config.estimator == "exact" else config.targets
  memory = layer_memory(
    model,
    task.params,
    image_shape,
    method=config.method,
    sharing=config.sharing,
    targets=targets,
    batch_size=math.ceil(config.batch_size / devices),
  )
  table = memory_table(memory, partition(model.layers, config.partitions))
  return (
    f"{model.coverage.summary()}\nMiB a layer, each on every one of {devices} devices but for "
    f"eigenbases (host and disk); workspace is at most, for {config.batch_size} pairs:\n{table}\n"
    "More curvature.partitions make the sums and rotations smaller, a smaller "
    "curvature.batch_size the workspace."
  )


def curvature_study(run: Run) -> Outcome:
  """Approximations of the curvature against the exact one."""
  config, folder = run.config.curvature_study, run.folder("curvature-study")
  dataset = run.dataset.sample(config.num_images, run.config.seed)
  queries, query_ids = _samples(run, config.num_queries, "curvature_study")
  study = evaluate_curvatures(
    load_task(run),
    dataset.images,
    queries,
    dampings=config.dampings,
    draws=config.draws,
    gradient_draws=config.gradient_draws,
    seed=run.config.seed,
    ids=dataset.ids,
    query_ids=query_ids,
    skip=run.config.curvature.skip,
    solver=config.solver,
    batch_size=config.batch_size,
    devices=run.devices,
    keep=Kept(folder / "sums"),
  )
  arrays = _arrays(study, "dampings", "errors", "correlations", "residuals", "iterations")
  notes = {
    "files": _shown(folder, study, write_study),
    "names": study.names,
    "settings": study.settings,
    "largest_eigenvalue": study.largest_eigenvalue,
  }
  return arrays, notes, f"a comparison of {len(study.names)} approximations"


def compress_study(run: Run) -> Outcome:
  """Compressions of the query gradients against float32."""
  config, task = run.config.compress_study, load_task(run)
  variants = _variants(config)
  dataset = run.dataset.sample(config.num_images, run.config.seed)
  queries, query_ids = _samples(run, config.num_queries, "compress_study")
  study = compression_study(
    task,
    load_curvature(run, task),
    dataset.images,
    queries,
    damping=config.damping,
    draws=config.draws,
    seed=run.config.seed,
    variants=variants,
    train_ids=dataset.ids,
    query_ids=query_ids,
    batch_size=config.batch_size,
    devices=run.devices,
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


def _samples(run: Run, num: int, section: str) -> tuple[np.ndarray, np.ndarray]:
  """Images and ids of the first samples; ValueError where there are not as many."""
  samples = artifacts.read(run.folder("sample")).arrays
  if not 1 <= num <= len(samples["images"]):
    raise ValueError(
      f"{section}.num_queries must lie in 1…{len(samples['images'])}, the number of samples; "
      f"got {num}."
    )
  return samples["images"][:num], samples["ids"][:num]


def _shown(folder: Path, study: Any, write: Callable[[Path, Any], list[Path]]) -> list[str]:
  """Prints the table and writes the page, in the primary process; returns names of its files."""
  if not processes.is_primary():
    return []
  print(study.table())
  return [path.name for path in write(folder, study)]


def _arrays(study: Any, *names: str) -> dict[str, np.ndarray]:
  return {name: np.asarray(getattr(study, name)) for name in names}
