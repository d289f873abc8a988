"""Influence as a covariance of losses over parameters drawn around the model: no gradients at all.

With the fitted curvature H, parameters are drawn as θ = θ* + δ, δ ~ N(0, τ (H + λI)⁻¹). Then

  scores[q, n] = Cov_θ(m_q, ℓ_n) / τ

is ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩, influence, for τ → 0. For τ > 0 it also sees how losses bend. Every
parameter draw sees the same pairs (t, ε), so that losses differ by the parameters alone. (Kreer et
al. 2025, arXiv:2509.26544, draw them by Langevin dynamics instead.)

Draws come in pairs ±δ. With the halves o = (f(θ* + δ) − f(θ* − δ)) / 2 and
e = (f(θ* + δ) + f(θ* − δ)) / 2 of a measurement f, which are uncorrelated,

  Cov(m, ℓ) = E[o_m o_ℓ] + Cov(e_m, e_ℓ),

whose first term alone is of order τ. Products of an odd and an even half, which are noise, never
come in.

S parameter draws leave noise of about √(influence of q on itself · of n on itself / S) on a score,
and take S forward passes over the training examples, where influence takes one and a backward one.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import QUERY, TRAIN, Replicate, row_operands
from jaxinf.attribution.queries import check_conditioning
from jaxinf.attribution.rounds import merged_rounds
from jaxinf.core.checks import checked_count, checked_dampings
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.random import fold_in_each, stream, substreams
from jaxinf.core.types import Array, Eigenbasis, Params
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.eigenbasis import from_eigenbasis
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.engine.checkpoints import PartialSums
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import numerics
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.evaluation.measuring import MeasureKernel
from jaxinf.layers.specs import Layer, to_matrices
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


def posterior_covariance(
  curvature: Curvature,
  *,
  queries: Examples,
  train: Examples,
  damping: float,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  measurement: str | Measurement = "loss",
  parameter_draws: int = 480,
  distance: float = 0.05,
  compute: Compute = Compute(),
) -> Scores:
  """Scores every training example for every query by a covariance over drawn parameters.

  Args:
    curvature: of the model, with an eigenbasis; parameters outside it stay as they are.
    queries, train: as of `influence`.
    damping: λ > 0, in the units of the curvature. The smaller, the more of the draws lies in
      directions that no loss sees, and the noisier scores are.
    draws: of (t, ε) for each training example. Each replicate has parameter draws of its own, so
      that standard errors are of both.
    query_draws: likewise for each query; all parameter draws see all of them.
    measurement: what is measured of a query.
    parameter_draws: S, in all replicates together; twice a whole number ≥ 2 in each.
    distance: of drawn parameters from the model's own: the root mean square of ‖δ‖ as a share of
      ‖θ*‖ over covered parameters, which sets τ. settings["temperature"] has it.
    compute: how. batch_size pairs go through 16 models at a time. With a checkpoint, a killed
      computation goes on where it was.

  Returns:
    Scores with values [Q, N], in the units of influence.

  Raises:
    ValueError: the arguments don't fit together, or losses of drawn parameters are not finite.
  """
  method = PosteriorCovariance(
    curvature, (damping,), measurement, query_draws, parameter_draws, distance
  )
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class PosteriorCovariance:
  """`posterior_covariance` as a method, which draws parameters at each damping anew.

  Attributes:
    curvature, dampings, measurement, query_draws, parameter_draws, distance: as of the function.
    models_at_once: whose forward passes are one program; no result depends on it.
  """

  curvature: Curvature
  dampings: tuple[float, ...] = (1e-8,)
  measurement: str | Measurement = "loss"
  query_draws: Draws | None = None
  parameter_draws: int = 480
  distance: float = 0.05
  models_at_once: int = 16

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping."""
    return _Question.of(self, queries, train, draws, compute).answer()


def temperature_of(curvature: Curvature, damping: float, distance: float) -> float:
  """τ at which E‖δ‖² = τ Σ 1 / (Λ + λ) is distance² · ‖θ*‖² over the covered parameters.

  Raises:
    ValueError: these parameters are all zero.
  """
  matrices = to_matrices(curvature.layers, curvature.model.params)
  norm = sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in matrices.values())
  if not norm > 0:
    raise ValueError("distance is a share of the norm of the covered parameters, which are zero.")
  trace = sum(
    float((1 / (np.asarray(basis.eigenvalues, np.float64) + damping)).sum())
    for basis in curvature.bases.values()
  )
  return distance**2 * norm / trace


def drawn_parameters(
  curvature: Curvature, *, damping: float, temperature: float, seed: int, numbers: np.ndarray
) -> Params:
  """Parameters [2 P, …] from N(θ*, τ (H + λI)⁻¹): θ* + δ of the draws `numbers`, then θ* − δ.

  A draw belongs to its number [P] and the seed, whatever others are drawn with it. Covered
  parameters come in float32, since δ would be lost in the rounding of smaller types.
  """
  scales = {
    name: np.sqrt(temperature / (np.asarray(basis.eigenvalues, np.float64) + damping))
    for name, basis in curvature.bases.items()
  }
  return _drawn(
    curvature.layers,
    curvature.model.params,
    dict(curvature.bases),
    scales,
    np.uint32(seed),
    np.asarray(numbers, np.uint32),
  )


@numerics()
@functools.partial(jax.jit, static_argnums=0)
def _drawn(
  layers: tuple[Layer, ...],
  params: Params,
  bases: Mapping[str, Eigenbasis],
  scales: Mapping[str, Array],
  seed: jax.Array,
  numbers: jax.Array,
) -> Params:
  keys = fold_in_each(stream(seed, "posterior"), numbers)
  leaves, structure = jax.tree.flatten(params)
  both = [jnp.broadcast_to(leaf, (2 * len(numbers), *leaf.shape)) for leaf in leaves]
  for layer in layers:
    normal = jax.vmap(lambda key, s=scales[layer.name].shape: jax.random.normal(key, s))
    rotated = normal(substreams(keys, layer.name)) * scales[layer.name]
    with jax.default_matmul_precision("highest"):
      deltas = from_eigenbasis(rotated, bases[layer.name])
    for place, delta in layer.from_matrix(deltas).items():
      both[place] = leaves[place].astype(jnp.float32) + jnp.concatenate([delta, -delta])
  return jax.tree.unflatten(structure, both)


@dataclasses.dataclass(frozen=True)
class _Question:
  """One call of the method: its arguments checked and with their defaults filled in.

  Attributes:
    pairs: of parameter draws in each replicate.
    pairs_at_once: that make one program.
  """

  curvature: Curvature
  dampings: tuple[float, ...]
  measurement: Measurement
  queries: Examples
  train: Examples
  draws: Draws
  asked: Draws
  pairs: int
  pairs_at_once: int
  distance: float
  compute: Compute

  @classmethod
  def of(
    cls,
    method: PosteriorCovariance,
    queries: Examples,
    train: Examples,
    draws: Draws,
    compute: Compute,
  ) -> "_Question":
    """Raises ValueError where arguments don't fit together."""
    curvature, measured = method.curvature, measurement_named(method.measurement)
    if not curvature.has_eigenbasis:
      raise ValueError(
        "Parameters are drawn in an eigenbasis, which the exact curvature has not: fit KFAC() or "
        "EKFAC(), or take its .approximation."
      )
    measured.check(curvature.model.process)
    check_alike(queries, train, measured.axes)
    check_conditioning(curvature, train)
    curvature.model.check_inputs(train.shape, train.conditioning)
    if compute.checkpoint is not None and measured.name is None:
      raise ValueError("With a checkpoint, give the Measurement a name that tells it from others.")
    if not 0 < method.distance < np.inf:
      raise ValueError(
        f"distance must be a positive share of the parameters' norm; got {method.distance}."
      )
    draws = draws.split()
    draws.check_plain("A covariance of losses")
    pairs = _pairs_of(checked_count(method.parameter_draws, "parameter_draws"), draws)
    return cls(
      curvature,
      checked_dampings(method.dampings),
      measured,
      queries,
      train,
      draws,
      draws.of_queries(method.query_draws),
      pairs,
      min(pairs, max(1, checked_count(method.models_at_once, "models_at_once") // 2)),
      float(method.distance),
      compute,
    )

  def answer(self) -> Sweep:
    """The scores."""
    return merged_rounds(self._round, self._sweep, self.draws)

  def _round(self, number: int) -> np.ndarray:
    """[L, G, Q, A, N] scores of one round of draws, each with parameter draws of its own."""
    replicates = self.draws.replicates or 1
    found = [
      [self._scores(damping, number * replicates + g) for g in range(replicates)]
      for damping in self.dampings
    ]
    shape = len(self.dampings), replicates, len(self.queries), -1, len(self.train)
    return np.array(found).reshape(shape)

  def _scores(self, damping: float, replicate: int) -> np.ndarray:
    """[Q · A, N] float32 scores of the training draws of one replicate."""
    temperature = temperature_of(self.curvature, damping, self.distance)
    partial = self._partial(damping, replicate)
    saved = None if partial is None else partial.load()
    done, sums = (0, self._zeros()) if saved is None else saved
    while done < self.pairs:
      params = drawn_parameters(
        self.curvature,
        damping=damping,
        temperature=temperature,
        seed=self.draws.seed,
        numbers=replicate * self.pairs + done + np.arange(self.pairs_at_once),
      )
      count = min(self.pairs_at_once, self.pairs - done)  # the last program may draw too many
      queries, train = self._values(params, replicate)
      sums = _added(sums, _halves(queries, count), _halves(train, count), self.pairs)
      done += count
      if partial is not None:
        partial.save(done, sums)
    products, of_queries, of_train = sums
    # Σ (e_m − ē_m)(e_ℓ − ē_ℓ) = Σ e_m e_ℓ − P ē_m ē_ℓ
    covariance = products - np.outer(of_queries, of_train) / self.pairs / (self.pairs - 1)
    return (covariance / temperature).astype(np.float32)

  def _values(self, params: Params, replicate: int) -> tuple[np.ndarray, np.ndarray]:
    """Measurements [Q · A, V] of queries and losses [N, V] of one replicate, by V models."""
    queries = self._map(self.measurement, params, self.queries, self.asked, QUERY)
    losses = self._map(LOSS, params, self.train, self.draws, TRAIN, replicate)
    if not (np.isfinite(queries).all() and np.isfinite(losses).all()):
      raise ValueError(
        "Some losses of drawn parameters are not finite. Check that the model's outputs are finite "
        f"for these examples at every time, or take a smaller distance than {self.distance}."
      )
    return queries, losses

  def _map(
    self,
    measurement: Measurement,
    params: Params,
    examples: Examples,
    draws: Draws,
    stream_name: str,
    replicate: int | None = None,
  ) -> np.ndarray:
    """[rows, V] measurements of the rows of one replicate of draws, or of all where None."""
    model, compute = self.curvature.model, self.compute
    kernel = MeasureKernel(
      model.apply_fn,
      model.process,
      (measurement,),
      Replicate.of(draws, examples.augmentation),
    )
    rows = Rows.of(examples, draws.replicates if replicate is None else 1)
    values = map_batches(
      kernel,
      row_operands((params, None), draws, stream_name),
      dataclasses.replace(rows, first_draw=replicate or 0),
      batch_size=compute.rows(draws),
      label="losses of drawn parameters" if stream_name == TRAIN else None,
      devices=compute.devices,
    )
    return values[:, 0].astype(np.float64)

  def _zeros(self) -> list[np.ndarray]:
    num_queries, num_train = len(self.queries) * (self.asked.replicates or 1), len(self.train)
    return [np.zeros((num_queries, num_train)), np.zeros(num_queries), np.zeros(num_train)]

  def _partial(self, damping: float, replicate: int) -> PartialSums | None:
    """Where the sums of one replicate are kept."""
    checkpoint = self.compute.checkpoint
    if checkpoint is None:
      return None
    key = {**self._content, "damping": damping, "replicate": replicate}
    name = f"posterior-{self.dampings.index(damping):02d}-{replicate:03d}.npz"
    return PartialSums(checkpoint.path(name), key, every=1)

  @functools.cached_property
  def _content(self) -> dict[str, Any]:
    """What sums depend on, as JSON."""
    contents = content_of(self.curvature.model, queries=self.queries, train=self.train)
    return {
      **self._settings,
      **contents,
      "curvature_content": self.curvature.content(),
    }

  @property
  def _settings(self) -> dict[str, Any]:
    """What the scores are computed with, as JSON."""
    return {
      "method": "posterior",
      "curvature": dict(self.curvature.settings),
      "process": self.curvature.model.process.settings,
      "measurement": self.measurement.name or "custom",
      **self.draws.settings(self.asked),
      **self.train.augmentation.settings,
      "parameter_draws": 2 * self.pairs * (self.draws.replicates or 1),
      "distance": self.distance,
    }

  def _sweep(self, scores: np.ndarray, num: int) -> Sweep:
    """Scores at each damping from [L, G, Q, A, N], means over the rounds of `num` draws."""
    settings = self._settings
    parameter_draws = settings["parameter_draws"] * num // self.draws.num
    settings |= {"draws": num, "parameter_draws": parameter_draws}
    return Sweep(
      Scores(
        of_damping.mean(axis=2),
        self.queries.ids,
        self.train.ids,
        {
          **settings,
          "damping": damping,
          "temperature": temperature_of(self.curvature, damping, self.distance),
        },
        np.swapaxes(of_damping.mean(axis=0), 0, 1) if of_damping.shape[2] > 1 else None,
        self.train.groups,
      )
      for damping, of_damping in zip(self.dampings, scores, strict=True)
    )


def _pairs_of(parameter_draws: int, draws: Draws) -> int:
  """Pairs of parameter draws in each replicate; ValueError unless they are whole and several."""
  replicates = draws.replicates or 1
  if parameter_draws % (2 * replicates) or parameter_draws < 4 * replicates:
    least = max(2, round(parameter_draws / (2 * replicates))) * 2 * replicates
    raise ValueError(
      f"{parameter_draws} parameter draws do not make two or more pairs in each of {replicates} "
      f"replicates of draws: take a multiple of {2 * replicates}, such as {least}."
    )
  return parameter_draws // (2 * replicates)


def _halves(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Odd and even halves [count, rows] of values [rows, 2 P] at θ* + δ and then at θ* − δ."""
  plus, minus = (part[:, :count].T for part in np.split(values, 2, axis=1))
  return (plus - minus) / 2, (plus + minus) / 2


def _added(
  sums: Sequence[np.ndarray],
  queries: tuple[np.ndarray, np.ndarray],
  train: tuple[np.ndarray, np.ndarray],
  pairs: int,
) -> list[np.ndarray]:
  """The sums with some pairs more: o_m o_ℓ / P + e_m e_ℓ / (P − 1), and those of e_m and of e_ℓ."""
  (odd_queries, even_queries), (odd_train, even_train) = queries, train
  products, of_queries, of_train = sums
  more = odd_queries.T @ odd_train / pairs + even_queries.T @ even_train / (pairs - 1)
  return [
    products + more, of_queries + even_queries.sum(axis=0), of_train + even_train.sum(axis=0)
  ]  # fmt: skip
