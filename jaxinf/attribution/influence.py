"""Influence of training examples on queries (paper, Eq. 4 and Algorithm 1).

scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Query gradients are computed once, preconditioned once a
damping and compressed; the training gradients stream past them in blocks of examples, all queries
and dampings at once, and are never kept.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, overload

import jax
import numpy as np

from jaxinf.attribution.auto import AutoDraws, DrawPlan, merged_rounds
from jaxinf.attribution.examples import (
  check_alike,
  checked_dampings,
  content_of,
  curvature_content,
  examples_of,
  registered,
)
from jaxinf.attribution.kernels import QUERY, DrawGroups, gradient_kernel, gradient_operands
from jaxinf.attribution.queries import gradient_batches, query_rows
from jaxinf.attribution.scoring import ScorePass
from jaxinf.compression.compression import (
  Compression,
  Uncompressed,
  compression_named,
  settings_of,
)
from jaxinf.core.types import Array, PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine.checkpoints import PartialOutputs, Resume
from jaxinf.layers.per_example import checked_draws, default_groups
from jaxinf.layers.precision import in_precision
from jaxinf.scores.scores import Scores

_LOG = logging.getLogger("jaxinf")

# Small dampings raise directions that hardly matter to scores; rounding them drowns those that do.
_ADVICE = ": the order is not kept; take compression=None, or a larger damping"


# fmt: off
@overload
def influence(
  task: Task, curvature: Curvature, queries: Array, train_images: Array, *,
  damping: float, draws: int | str | AutoDraws, seed: int, measurement: str | Measurement = ...,
  query_ids: np.ndarray | None = ..., train_ids: np.ndarray | None = ...,
  query_conditioning: PyTree = ..., train_conditioning: PyTree = ...,
  draw_groups: int | None = ..., query_draws: int | None = ..., query_groups: int | None = ...,
  design: DrawDesign = ..., query_design: DrawDesign | None = ...,
  compression: str | Compression | None = ..., query_blocks: int = ...,
  precision: str | None = ..., batch_size: int = ...,
  resume: Resume | None = ..., devices: Sequence[jax.Device] | None = ...,
) -> Scores: ...
@overload
def influence(
  task: Task, curvature: Curvature, queries: Array, train_images: Array, *,
  damping: Sequence[float], draws: int | str | AutoDraws, seed: int,
  measurement: str | Measurement = ...,
  query_ids: np.ndarray | None = ..., train_ids: np.ndarray | None = ...,
  query_conditioning: PyTree = ..., train_conditioning: PyTree = ...,
  draw_groups: int | None = ..., query_draws: int | None = ..., query_groups: int | None = ...,
  design: DrawDesign = ..., query_design: DrawDesign | None = ...,
  compression: str | Compression | None = ..., query_blocks: int = ...,
  precision: str | None = ..., batch_size: int = ...,
  resume: Resume | None = ..., devices: Sequence[jax.Device] | None = ...,
) -> tuple[Scores, ...]: ...
# fmt: on
def influence(
  task: Task,
  curvature: Curvature,
  queries: Array,
  train_images: Array,
  *,
  damping: float | Sequence[float],
  draws: int | str | AutoDraws,
  seed: int,
  measurement: str | Measurement = "loss",
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  query_conditioning: PyTree = None,
  train_conditioning: PyTree = None,
  draw_groups: int | None = None,
  query_draws: int | None = None,
  query_groups: int | None = None,
  design: DrawDesign = DrawDesign(),
  query_design: DrawDesign | None = None,
  compression: str | Compression | None = "int8",
  query_blocks: int = 1,
  precision: str | None = None,
  batch_size: int = 128,
  resume: Resume | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Scores | tuple[Scores, ...]:
  """Scores every training image for every query.

  Args:
    task: the model.
    curvature: fitted at the task's parameters.
    queries: [Q, H, W, C] images to explain, float32 in [-1, 1] or uint8; [Q, K, H, W, C] float32
      where the measurement is of trajectories.
    train_images: [N, H, W, C], likewise.
    damping: λ > 0, in the units of the curvature (squared gradient of the pixel-mean loss); or
      several of them, all scored in one pass over the training gradients. Each takes as much
      memory for the preconditioned query gradients as one.
    draws: draws of (t, ε) for each training image; "auto" or an AutoDraws goes on until the top of
      the order is stable, and says in settings["draws"] how many that took.
    seed: of the draws.
    measurement: what is measured of a query, by name or as an object; see
      jaxinf.diffusion.measurements.
    query_ids, train_ids: stable ids, which the random keys follow; row numbers where None.
    query_conditioning, train_conditioning: what a conditional model is given with each image, such
      as labels: pytrees of arrays [Q, …] and [N, …] of one form; None where it has no such inputs.
    draw_groups: groups the training draws are split into, for standard errors; divides draws. None:
      the largest divisor of draws up to 5.
    query_draws: draws for each query; as many as for a training image where None (256 for "auto",
      which adds none).
    query_groups: groups these are split into, whose spread is the queries' part of the standard
      errors; each takes as much memory as one. None: 2, or 1 where the draws do not split. That
      part has one degree of freedom less than there are groups, the same for all training images
      of a query: with 2 it is right on average, and rough for a single query.
    design: how the draws of a group depend on each other; each group is one complete design, so
      that few draws a group leave little to stratify. Shared draws are the best for comparing
      images; a sum of scores over many images is then no less noisy than its terms. With
      random_flip where training had it (paper, Appendix J.8).
    query_design: likewise for queries, which are never mirrored; as `design` where None.
    compression: of the preconditioned query gradients: a name of gradients.compression, or a
      Compression. None: float32. What it and `precision` do to scores is measured on a sample of
      training images and put into settings["check"].
    query_blocks: parts of the query gradients, of which one is on the devices at a time, with
      equal results: for more queries than fit.
    precision: of the network's products in the pass over training images, "bfloat16",
      "tensorfloat32" or "float32"; as the network is where None. See diffusion.precision. To the
      rounding of that precision, scores then depend on batch_size.
    batch_size: (image, draw) pairs at a time over all devices; at least one group of draws on each
      goes through at once, so that more groups need less memory.
    resume: keeps scores on disk as they come; None: a killed pass begins again.
    devices: local devices; all of them where None.

  Returns:
    Scores with values [Q, N]; positive: the training image supports the query. A tuple of them, in
    the order of the dampings, where these are a sequence.

  Raises:
    ValueError: the arguments don't fit together, or scores are not finite.
  """
  dampings = checked_dampings(damping)
  measured = measurement_named(measurement)
  query = examples_of(queries, query_ids, query_conditioning, "query", measured)
  train = examples_of(train_images, train_ids, train_conditioning, "train")
  asked_design = design.without_flips() if query_design is None else query_design
  if asked_design.random_flip:
    raise ValueError("query_design mirrors images, but a query is measured as it is: leave it out.")
  if resume is not None and measured.name is None:
    raise ValueError("With resume, give the Measurement a name that tells it from others.")
  plan = _draw_plan(draws, draw_groups, query_draws, query_groups)
  if isinstance(compression, str) or compression is None:
    compression = compression_named(compression)
  if compression.in_eigenbasis or compression.is_costly:
    raise ValueError(
      f"{compression.description} cannot be restored batch by batch: take int4, int8, int16, "
      "bfloat16, svd or None. (jaxinf compress-study compares them all.)"
    )
  for value, what in ((batch_size, "batch_size"), (query_blocks, "query_blocks")):
    if value < 1:
      raise ValueError(f"{what} must be at least 1; got {value}.")
  check_alike(query, train)
  model = registered(task, curvature, train)

  # 1. Rows of queries: every one's gradients, preconditioned for every damping, and compressed.
  asked = DrawGroups(seed, plan.query_draws // plan.query_groups, asked_design)
  num_rows = len(query.ids) * plan.query_groups
  with jax.default_device(devices[0] if devices else None):
    rows = query_rows(
      curvature,
      gradient_batches(
        gradient_kernel(model, measured, task.schedule, asked),
        gradient_operands(task.params, QUERY), query.rows(plan.query_groups),
        batch_size=max(1, batch_size // asked.size), devices=devices,
      ),
      num_rows=num_rows, groups=plan.query_groups, dampings=dampings, compression=compression,
    )  # fmt: skip

  # 2. Training gradients, past all of them.
  groups = DrawGroups(seed, plan.group_size, design)
  exactly = gradients = gradient_kernel(model, LOSS, task.schedule, groups)
  if precision is not None:
    network = in_precision(task.apply_fn, precision)
    faster = registered(dataclasses.replace(task, apply_fn=network), curvature, train)
    gradients = gradient_kernel(faster, LOSS, task.schedule, groups)
  score_pass = ScorePass(
    gradients, exactly, task.params, train.rows(plan.draw_groups),
    max(1, batch_size // groups.size), devices, query_blocks,
  )  # fmt: skip
  settings = {f"curvature_{name}": value for name, value in curvature.settings.items()} | dict(
    measurement=measured.name or "custom", draw_groups=plan.draw_groups,
    query_draws=plan.query_draws, query_groups=plan.query_groups,
    compression=compression.description, seed=seed, precision=precision,
    design=dataclasses.asdict(design), query_design=dataclasses.asdict(asked_design),
  )  # fmt: skip
  key = settings | {
    "group_size": plan.group_size, "dampings": dampings,
    "compression": settings_of(compression),
  }  # fmt: skip
  if resume is not None:
    key |= {"inputs": content_of(task, query, train), "curvature": curvature_content(curvature)}

  def scored_round(number: int) -> np.ndarray:
    partial = None
    if resume is not None:
      partial = PartialOutputs(resume.folder / f"round-{number:03d}", key, resume.every)
    products = score_pass.scores(
      rows, curvature, compression, first_group=number * plan.draw_groups, partial=partial
    )
    if not np.isfinite(products).all():
      raise ValueError(
        "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
        "for these images at every timestep, or raise the damping."
      )
    shape = (len(train.ids), plan.draw_groups, len(dampings), len(query.ids), plan.query_groups)
    return products.reshape(shape)

  def scores_of(products: np.ndarray, draws: int) -> tuple[Scores, ...]:
    found = settings | {"draws": draws}
    of_groups = np.transpose(products.mean(axis=4), (2, 1, 3, 0))
    of_queries = np.transpose(products.mean(axis=1), (1, 3, 2, 0))
    return tuple(
      Scores(
        of_groups[i], query.ids, train.ids, found | {"damping": value},
        of_queries[i] if plan.query_groups > 1 else None,
      )
      for i, value in enumerate(dampings)
    )  # fmt: skip

  products, total = merged_rounds(scored_round, scores_of, plan)
  scores = scores_of(products, total)
  if compression != Uncompressed() or precision is not None:
    checks = score_pass.check(
      rows,
      curvature,
      compression,
      num_dampings=len(dampings),
      query_groups=plan.query_groups,
      seed=seed,
    )
    scores = tuple(map(_with_check, scores, checks))
  return scores[0] if np.ndim(damping) == 0 else scores


def _draw_plan(
  draws: int | str | AutoDraws,
  draw_groups: int | None,
  query_draws: int | None,
  query_groups: int | None,
) -> DrawPlan:
  """The plan, with defaults filled in; ValueError where draws do not split as asked."""
  if isinstance(draws, int):
    auto, a_round, per_query = None, draws, draws
    groups = default_groups(draws) if draw_groups is None else draw_groups
  elif draws == "auto" or isinstance(draws, AutoDraws):
    auto = draws if isinstance(draws, AutoDraws) else AutoDraws()
    groups = auto.num_groups if draw_groups is None else draw_groups
    a_round, per_query = auto.group_size * groups, 256
    if a_round > auto.max_draws:
      raise ValueError(
        f"A round has {groups} groups of {auto.group_size} = {a_round} draws, more than the most, "
        f"{auto.max_draws}: allow more draws, or take fewer or smaller groups."
      )
  else:
    raise ValueError(f'draws must be a number, "auto" or an AutoDraws; got {draws!r}.')
  per_query = per_query if query_draws is None else query_draws
  asked = default_groups(per_query, most=2) if query_groups is None else query_groups
  checked_draws(a_round, groups, "draws", "draw_groups")
  checked_draws(per_query, asked, "query_draws", "query_groups")
  return DrawPlan(a_round // groups, groups, per_query, asked, auto)


def _with_check(scores: Scores, check: dict[str, Any] | None) -> Scores:
  """The scores, with what compression and precision do to them in their settings, and said."""
  if check is not None and check["spearman"] is not None:
    _LOG.info(
      "attribute: at λ = %.1e, %s queries%s against float32 on %d training images and %d queries: "
      "rank correlation of scores %.4f (least %.4f)%s", scores.settings["damping"],
      scores.settings["compression"],
      f" and {scores.settings['precision']} products" if scores.settings["precision"] else "",
      check["num_examples"], check["num_queries"], check["spearman"], check["least_spearman"],
      _ADVICE if check["spearman"] < 0.95 else "",
    )  # fmt: skip
  return dataclasses.replace(scores, settings={**scores.settings, "check": check})
