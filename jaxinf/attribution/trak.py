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
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.features import (
  FlatGradients,
  all_layers,
  check_named,
  features_of,
  finite,
  partial_of,
  projection_of,
  settings_of_projected,
  split_draws,
)
from jaxinf.attribution.fisher import fisher_of, group_scores
from jaxinf.attribution.kernels import QUERY, TRAIN, GradientKernel, Replicate
from jaxinf.compression.projection import Projection
from jaxinf.core.checks import checked_dampings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine.compute import Compute
from jaxinf.engine.maps import PartialRows
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

Models = DiffusionModel | Sequence[DiffusionModel]


def trak(
  model: Models,
  *,
  queries: Examples,
  train: Examples,
  damping: float,
  projection: Projection | int,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  measurement: str | Measurement = "loss",
  train_measurement: str | Measurement = "loss",
  compute: Compute = Compute(),
) -> Scores:
  """Scores every training example for every query in the projected empirical Fisher.

  Args:
    model: the model; or several with parameters of one network, such as those of other training
      runs, over which scores are means. The c-th has the projection of seed + c.
    queries: what is to be explained; states [Q, K, …] where the measurement is of trajectories or
      predictions.
    train: the training examples.
    damping: λ > 0, in squared gradients of the training measurement.
    projection: P, or its dimension k, the rows of P, whose seed is then that of the draws. The
      paper has 32,768.
    draws: of (t, ε) for each training example.
    query_draws: likewise for each query; as many by the same design where None.
    measurement: what is measured of a query, by name or as an object.
    train_measurement: what stands for the training loss in H and φ_n, likewise.
    compute: how.

  Returns:
    Scores with values [Q, N]; positive: the training example supports the query. The replicates of
    training draws say by how much the scores move with them to first order, H moving as well; they
    average to the scores.

  Raises:
    ValueError: the arguments don't fit together, a parameter is in no layer, or features or scores
      are not finite.
  """
  method = TRAK(model, projection, (damping,), measurement, train_measurement, query_draws)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


def dtrak(
  model: Models,
  *,
  queries: Examples,
  train: Examples,
  damping: float,
  projection: Projection | int,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  compute: Compute = Compute(),
) -> Scores:
  """D-TRAK: `trak` with the squared norm of the network's output for both measurements.

  Reference: Zheng et al. 2024, "Intriguing properties of data attribution on diffusion models".
  """
  method = DTRAK(model, projection, (damping,), query_draws)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class TRAK:
  """TRAK as a method: see `trak` for the fields. All dampings share the features."""

  model: Models
  projection: Projection | int
  dampings: tuple[float, ...] = (1e-9,)
  measurement: str | Measurement = "loss"
  train_measurement: str | Measurement = "loss"
  query_draws: Draws | None = None

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping."""
    # 1. What is asked for.
    dampings = checked_dampings(self.dampings)
    models = _checked_models(self.model)
    measured = measurement_named(self.measurement)
    train_measured = measurement_named(self.train_measurement)
    for each in (measured, train_measured):
      each.check_gradient(models[0].process)
    if train_measured.axes:
      raise ValueError(
        "train_measurement is of training examples as they are; "
        f"{train_measured.name or 'this one'} is of {train_measured.of}."
      )
    check_alike(queries, train, measured.axes)
    check_named(compute, measured, train_measured)
    draws, asked = split_draws(draws, self.query_draws)
    projection = projection_of(self.projection, draws)
    settings = settings_of_projected(models[0], draws, asked, projection, train) | {
      "method": "trak",
      "measurement": measured.name or "custom",
      "train_measurement": train_measured.name or "custom",
    }

    # 2. Scores of each model, and their means.
    total: list[np.ndarray] = []
    for number, model in enumerate(models):
      own = dataclasses.replace(projection, seed=projection.seed + number)
      of_model = dataclasses.replace(self, model=model)
      trained, queried = (
        of_model.features(
          examples,
          name,
          of,
          own,
          compute,
          partial_of(
            compute, f"model-{number:03d}/{name}", settings, model, queries=queries, train=train
          ),
        )
        for name, examples, of in ((TRAIN, train, draws), (QUERY, queries, asked))
      )
      fisher = fisher_of(trained.mean(axis=1, dtype=np.float32))
      pairs = [group_scores(fisher, trained, queried, value) for value in dampings]
      found = [np.stack(part) / len(models) for part in zip(*pairs, strict=True)]
      total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    settings["num_checkpoints"] = len(models) - 1
    return projected_sweep(
      *total, dampings=dampings, queries=queries, train=train, settings=settings
    )

  def features(
    self,
    examples: Examples,
    stream: str,
    draws: Draws,
    projection: Projection,
    compute: Compute,
    partial: PartialRows | None = None,
  ) -> np.ndarray:
    """[n, G, k] float32 features of queries or of training examples, as `stream` says."""
    (model,) = _checked_models(self.model)
    of = self.train_measurement if stream == TRAIN else self.measurement
    measured, replicate = measurement_named(of), Replicate.of(draws, examples.augmentation)
    layers = all_layers(model, examples, measured.axes)
    kernel = FlatGradients(GradientKernel(layers, measured, model.process, replicate))
    return features_of(
      kernel,
      model,
      examples,
      draws,
      stream,
      projection=projection,
      compute=compute,
      partial=partial,
    )


def DTRAK(
  model: Models,
  projection: Projection | int,
  dampings: tuple[float, ...] = (1e-9,),
  query_draws: Draws | None = None,
) -> TRAK:
  """D-TRAK as a method."""
  return TRAK(model, projection, dampings, "square_norm", "square_norm", query_draws)


def projected_sweep(
  of_draws: np.ndarray,
  of_queries: np.ndarray,
  *,
  dampings: Sequence[float],
  queries: Examples,
  train: Examples,
  settings: dict[str, Any],
) -> Sweep:
  """Scores at each damping from those by replicate of training draws and of query draws.

  Args:
    of_draws, of_queries: [L, G, Q, N] and [L, A, Q, N].
    dampings: the L values of λ.
    queries, train: both.
    settings: of the scores.
  """
  return Sweep(
    tuple(
      Scores(
        finite(of_draws[i]),
        queries.ids,
        train.ids,
        settings | {"damping": damping},
        finite(of_queries[i]) if len(of_queries[i]) > 1 else None,
        train.groups,
      )
      for i, damping in enumerate(dampings)
    )
  )


def _checked_models(model: Models) -> tuple[DiffusionModel, ...]:
  """The model or models; ValueError where their parameters are not alike.

  Those of one apply_fn share what is found about it, so that their gradients are one program.
  """
  models = (model,) if isinstance(model, DiffusionModel) else tuple(model)
  if not models:
    raise ValueError("There is no model: give one or several.")
  shape = lambda tree: jax.tree.map(lambda x: (np.shape(x), jnp.asarray(x).dtype), tree)
  for number, other in enumerate(models):
    if shape(other.params) != shape(models[0].params) or other.process != models[0].process:
      raise ValueError(
        f"Model {number} has parameters of other shapes or types than the first, or another "
        "process: give models of the same network."
      )
  first = models[0]
  alike = lambda other: other.apply_fn == first.apply_fn
  return tuple(first.with_params(m.params) if alike(m) else m for m in models)
