"""TRAK and its relatives for diffusion models, in the frame of influence functions (paper, Eq. 11).

With φ = P ∇(measurement averaged over all draws), P random of k rows, and all parameters:

  scores[q, n] = φ_qᵀ (H + λ I)⁻¹ φ_n,   H = Σ_n φ_n φ_nᵀ / N.

The gradient is averaged over draws BEFORE the outer product: the empirical Fisher of the loss.
Damping is added in the projected space and normalised by N, so that it is that of `influence`;
traker's and D-TRAK's are larger by a factor of N.

  trak    the loss for both (Park et al. 2023; Georgiev et al. 2023; Zheng et al. 2024)
  dtrak   the squared norm of the output for both (Zheng et al. 2024)

See journey.py for the loss on the way to a query, and das.py for the Diffusion Attribution Score.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxinf.attribution.examples import check_alike, checked_dampings, examples_of
from jaxinf.attribution.features import (
  check_pass,
  checked_checkpoints,
  features_of,
  finite,
  flat_kernel,
  partial_of,
  register_everything,
  split_draws,
)
from jaxinf.attribution.fisher import fisher_of, group_scores
from jaxinf.attribution.kernels import QUERY, TRAIN, DrawGroups, gradient_kernel
from jaxinf.compression.projection import Projection
from jaxinf.core.types import Array, Params, PyTree
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.engine.checkpoints import Resume
from jaxinf.scores.scores import Scores


def trak(
  task: Task,
  queries: Array,
  train_images: Array,
  *,
  damping: float | Sequence[float],
  draws: int,
  seed: int,
  projection_dim: int,
  projection: str = "rademacher",
  measurement: str | Measurement = "loss",
  train_measurement: str | Measurement = "loss",
  projection_seed: int | None = None,
  checkpoints: Sequence[Params] = (),
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  query_conditioning: PyTree = None,
  train_conditioning: PyTree = None,
  draw_groups: int | None = None,
  query_draws: int | None = None,
  query_groups: int | None = None,
  design: DrawDesign = DrawDesign(),
  query_design: DrawDesign | None = None,
  batch_size: int = 128,
  block_mib: float = 1024,
  resume: Resume | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Scores | tuple[Scores, ...]:
  """Scores every training image for every query in the projected empirical Fisher.

  Args:
    task: the model.
    queries: [Q, H, W, C] images to explain, float32 in [-1, 1] or uint8; [Q, K, H, W, C] float32
      where the measurement is of trajectories or predictions.
    train_images: [N, H, W, C], likewise.
    damping: λ > 0, in squared gradients of the training measurement; or several of them, at the
      cost of one: features and eigendecomposition are shared.
    draws: draws of (t, ε) for each training image.
    seed: of the draws.
    projection_dim: k, rows of P. The paper has 32,768.
    projection: entries of P: "rademacher" (±1/√k) or "normal" (N(0, 1/k)). P is made anew for each
      block of gradients; signs are several times faster to make.
    measurement: what is measured of a query, by name or as an object.
    train_measurement: what stands for the training loss in H and φ_n, likewise.
    projection_seed: of P, as `seed` where None.
    checkpoints: further parameters of the same network, such as those of other training runs;
      scores are the means over the task's own and these. The c-th has the projection of
      projection_seed + c, the task's own that of projection_seed.
    query_ids, train_ids: stable ids, which the random keys follow; row numbers where None.
    query_conditioning, train_conditioning: pytrees of arrays [Q, …] and [N, …] where the model
      takes them.
    draw_groups: groups the training draws are split into, for standard errors; divides draws. Each
      is projected by itself. None: 2, or 1 where the draws do not split.
    query_draws: draws for each query; as `draws` where None.
    query_groups: groups these are split into; None: 2, or 1 where they do not split.
    design: how the draws of a group depend on each other; with random_flip where training had it.
    query_design: likewise for queries, which are never mirrored; as `design` where None.
    batch_size: (image, draw) pairs at a time over all devices; at least one group of draws on each.
    block_mib: of gradients that wait on the host and are projected at once: the more, the less
      often P is made. The devices share them.
    resume: keeps features on disk as they come; None: a killed pass begins again.
    devices: local devices; all of them where None.

  Returns:
    Scores with values [Q, N]; positive: the training image supports the query. A tuple of them, in
    the order of the dampings, where these are a sequence. The groups of training draws say by how
    much the scores move with them to first order, H moving as well; they average to the scores.

  Raises:
    ValueError: the arguments don't fit together, a parameter is in no layer, or features or scores
      are not finite.
  """
  # 1. What is asked for.
  dampings = checked_dampings(damping)
  measured, train_measured = measurement_named(measurement), measurement_named(train_measurement)
  query = examples_of(queries, query_ids, query_conditioning, "query", measured)
  train = examples_of(train_images, train_ids, train_conditioning, "train", train_measured)
  check_alike(query, train)
  query_draws = draws if query_draws is None else query_draws
  draw_groups, query_groups = split_draws(draws, draw_groups, query_draws, query_groups)
  query_design = design.without_flips() if query_design is None else query_design
  check_pass(
    query_design, (measured, train_measured), resume, batch_size=batch_size, block_mib=block_mib
  )
  models = checked_checkpoints(task.params, checkpoints)
  first_seed = seed if projection_seed is None else projection_seed
  settings = dict(
    method="trak", measurement=measured.name or "custom",
    train_measurement=train_measured.name or "custom", draws=draws, draw_groups=draw_groups,
    query_draws=query_draws, query_groups=query_groups, seed=seed,
    projection=projection, projection_dim=projection_dim, projection_seed=first_seed,
    design=dataclasses.asdict(design), query_design=dataclasses.asdict(query_design),
  )  # fmt: skip

  # 2. Kernels of gradients, the same for all parameters.
  model = register_everything(task, train.image_shape, train.conditioning)
  parts = [
    (name, examples, num, groups, flat_kernel(gradient_kernel(model, of, task.schedule, groups)))
    for name, examples, num, groups, of in (
      (TRAIN, train, draw_groups, DrawGroups(seed, draws // draw_groups, design), train_measured),
      (QUERY, query, query_groups, DrawGroups(seed, query_draws // query_groups, query_design),
       measured),
    )
  ]  # fmt: skip

  def features(number: int, params: Params) -> list[np.ndarray]:
    """Those of training images [N, G, k] and of queries [Q, A, k]."""
    projected = Projection(projection_dim, first_seed + number, projection)
    found = []
    for name, examples, num_groups, groups, kernel in parts:
      model_task = dataclasses.replace(task, params=params)
      kept = partial_of(resume, f"model-{number:03d}/{name}", settings, model_task, query, train)
      found.append(
        features_of(
          kernel, params, examples, groups, num_groups=num_groups, stream_name=name,
          projection=projected, batch_size=batch_size, block_mib=block_mib, devices=devices,
          partial=kept,
        )
      )  # fmt: skip
    return found

  # 3. Scores of each model, and their means.
  total: list[np.ndarray] = []
  for number, params in enumerate(models):
    trained, asked = features(number, params)
    fisher = fisher_of(trained.mean(axis=1, dtype=np.float32))
    pairs = [group_scores(fisher, trained, asked, value) for value in dampings]
    found = [np.stack(part) / len(models) for part in zip(*pairs, strict=True)]
    total = [a + b for a, b in zip(total, found, strict=True)] if total else found
  of_groups, of_queries = total
  settings["num_checkpoints"] = len(checkpoints)
  scores = tuple(
    Scores(
      finite(of_groups[i]), query.ids, train.ids, settings | {"damping": value},
      finite(of_queries[i]) if query_groups > 1 else None,
    )
    for i, value in enumerate(dampings)
  )  # fmt: skip
  return scores[0] if np.ndim(damping) == 0 else scores


def dtrak(
  task: Task, queries: Array, train_images: Array, **settings: Any
) -> Scores | tuple[Scores, ...]:
  """D-TRAK: `trak` with the squared norm of the network's output for both measurements.

  Reference: Zheng et al. 2024, "Intriguing properties of data attribution on diffusion models".

  Args:
    task, queries, train_images: as for `trak`.
    settings: the other arguments of `trak` but the two measurements.
  """
  return trak(
    task, queries, train_images,
    measurement="square_norm", train_measurement="square_norm", **settings,
  )  # fmt: skip
