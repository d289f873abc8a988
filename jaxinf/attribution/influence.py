"""Influence of training examples on queries (paper, Eq. 4 and Algorithm 1).

scores[q, n] = ⟨∇m_q, (H + λI)⁻¹ ∇ℓ_n⟩. Query gradients are computed once, preconditioned once a
damping and compressed; the training gradients stream past them in blocks of examples, all queries
and dampings at once, and are never kept.

∇ℓ_n is by default that of draws weighted by ℓ^(−½) (`Draws.loss_power`): retraining confirms these
scores more. Such gradients do not add up to zero at the optimum, as those of the loss do, and so
their scores are centred: those of a query have the mean 0 over the training examples.
"""

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinf.attribution.kernels import (
  QUERY,
  TRAIN,
  LayerScoreKernel,
  ScoreKernel,
  row_operands,
)
from jaxinf.attribution.queries import QueryRows, gradient_batches, gradient_kernel, query_rows
from jaxinf.attribution.rounds import mean_of_rounds, merged_rounds
from jaxinf.attribution.scoring import ScorePass
from jaxinf.compression.check import LostOrder, fallback_of, keeps_order, verdict
from jaxinf.compression.compression import (
  QUERY_COMPRESSION,
  Compression,
  Uncompressed,
  compression_named,
  settings_of,
)
from jaxinf.core.checks import checked_layer_dampings
from jaxinf.core.damping import (
  Damping,
  damping_settings,
  kind_settings,
  number_of,
  symbol_of,
)
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.measurements import LOSS, Measurement, measurement_named
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import PartialOutputs
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import Kernel
from jaxinf.scores.layer_scores import LayerScores
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

_LOG = logging.getLogger("jaxinf")

LOSS_POWER = 0.5  # of training gradients, where none is asked for

AUTO = "auto"  # QUERY_COMPRESSION, or a finer one where that loses the order


def influence(
  curvature: Curvature,
  *,
  queries: Examples,
  train: Examples,
  damping: Damping,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  measurement: str | Measurement = "loss",
  compression: str | Compression | None = AUTO,
  precision: str | None = None,
  compute: Compute = Compute(),
) -> Scores:
  """Scores every training example for every query.

  Args:
    curvature: of the model; see `fit_curvature`.
    queries: what is to be explained; states [Q, K, …] where the measurement is of trajectories.
    train: the training examples, with random_flip where training mirrored images.
    damping: λ > 0, in the units of the curvature (squared gradient of the loss, a mean over the
      elements of an example); or RelativeDamping(ρ), by which each layer has its own.
    draws: of (t, ε) for each training example; their loss_power is ½ where none is given.
      `Draws.until_stable()` goes on until the top of the order is stable, and says in
      settings["draws"] how many that took.
    query_draws: likewise for each query; as many by the same design where None.
    measurement: what is measured of a query, by name or as an object; see
      jaxinf.diffusion.measurements.
    compression: of the preconditioned query gradients: a name of jaxinf.compression, or a
      Compression. None: float32. What it and `precision` do to scores is measured first, on a
      sample of training examples, and put into settings["check"]. "auto" takes int16, or float32
      where that would lose the order; others warn of it.
    precision: of the network's products in the pass over training examples, "bfloat16",
      "tensorfloat32" or "float32"; as the network is where None. To the rounding of that precision,
      scores then depend on the batch size.
    compute: how; with a checkpoint, a killed pass goes on where it was.

  Returns:
    Scores with values [Q, N]; positive: the training example supports the query.

  Raises:
    ValueError: the arguments don't fit together, or scores are not finite.
  """
  method = Influence(curvature, (damping,), measurement, compression, precision, query_draws)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


def influence_sweep(
  curvature: Curvature,
  *,
  queries: Examples,
  train: Examples,
  dampings: Sequence[Damping],
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  measurement: str | Measurement = "loss",
  compression: str | Compression | None = AUTO,
  precision: str | None = None,
  compute: Compute = Compute(),
) -> Sweep:
  """`influence` at several dampings of one kind, scored in one pass over the training gradients.

  Each damping takes as much memory for the preconditioned query gradients as one.
  """
  several = checked_layer_dampings(dampings)
  method = Influence(curvature, several, measurement, compression, precision, query_draws)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)


@dataclasses.dataclass(frozen=True)
class Influence:
  """Influence functions as a method: see `influence` for the fields."""

  curvature: Curvature
  dampings: tuple[Damping, ...] = (1e-8,)
  measurement: str | Measurement = "loss"
  compression: str | Compression | None = AUTO
  precision: str | None = None
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
    return _Question.of(self, queries, train, draws, compute).answer()

  def by_layer(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> tuple[LayerScores, ...]:
    """Scores of each layer at every damping, from one pass; see `layer_scores`."""
    return _Question.of(self, queries, train, draws, compute).answer_by_layer()


@dataclasses.dataclass(frozen=True)
class _Question:
  """One call of the method: its arguments checked and with their defaults filled in."""

  curvature: Curvature
  dampings: tuple[Damping, ...]
  measurement: Measurement
  compression: Compression
  precision: str | None
  queries: Examples
  train: Examples
  draws: Draws
  asked: Draws
  compute: Compute
  falls_back: bool = False

  @classmethod
  def of(
    cls, method: Influence, queries: Examples, train: Examples, draws: Draws, compute: Compute
  ) -> "_Question":
    """Raises ValueError where arguments don't fit together."""
    curvature, measured = method.curvature, measurement_named(method.measurement)
    measured.check_gradient(curvature.model.process)
    dampings = checked_layer_dampings(method.dampings)
    for damping in dampings:
      curvature.check_damping(damping)
    check_alike(queries, train, measured.axes)
    if compute.checkpoint is not None and measured.name is None:
      raise ValueError("With a checkpoint, give the Measurement a name that tells it from others.")
    compression, falls_back = method.compression, method.compression == AUTO
    if isinstance(compression, str) or compression is None:
      compression = compression_named(QUERY_COMPRESSION if falls_back else compression)
    if compression.in_eigenbasis or compression.is_costly:
      raise ValueError(
        f"{compression.description} cannot be restored batch by batch: take int4, int8, int16, "
        "bfloat16, svd or None."
      )
    draws = draws.split().of_power(LOSS_POWER)
    return cls(
      curvature,
      dampings,
      measured,
      compression,
      method.precision,
      queries,
      train,
      draws,
      draws.of_queries(method.query_draws),
      compute,
      falls_back,
    )

  def answer(self) -> Sweep:
    """The scores."""
    question, score_pass, rows, checks = self._settled()
    question._say(checks)
    own = question._own_settings(checks, rows.solves)
    kernel = ScoreKernel(question.compression)
    return merged_rounds(
      lambda number: question._round(score_pass, rows, kernel, number),
      lambda products, num: question._sweep(products, num, own),
      self.draws,
    )

  def answer_by_layer(self) -> tuple[LayerScores, ...]:
    """The scores of each layer, at every damping."""
    question, score_pass, rows, checks = self._settled()
    question._say(checks)
    own = question._own_settings(checks, rows.solves)
    kernel = LayerScoreKernel(question.compression, tuple(x.name for x in self.curvature.layers))
    products, num = mean_of_rounds(
      lambda number: question._round(score_pass, rows, kernel, number),
      lambda products, num: question._sweep(products.sum(axis=2), num, own),
      self.draws,
    )
    return question._layer_scores(products, num, own)

  def _settled(
    self,
  ) -> tuple["_Question", ScorePass, QueryRows, Sequence[dict[str, Any] | None]]:
    """The question with the compression that keeps the order, and what its rounds take."""
    score_pass = self._score_pass()
    rows = self._query_rows()
    checks = self._checks(score_pass, rows)
    finer = fallback_of(self.compression)
    if self.falls_back and finer is not None and self._loses_order(checks):
      _LOG.info(
        "attribute: %s query gradients would change the order; they are kept in %s",
        self.compression.description,
        finer.description,
      )
      return dataclasses.replace(self, compression=finer)._settled()
    return self, score_pass, rows, checks

  def _checks(self, score_pass: ScorePass, rows: QueryRows) -> Sequence[dict[str, Any] | None]:
    """What compression and precision do to scores at each damping, on a sample."""
    if self.compression == Uncompressed() and self.precision is None:
      return [None] * len(self.dampings)
    return score_pass.check(
      rows,
      self.compression,
      num_dampings=len(self.dampings),
      replicates=self.asked.replicates or 1,
    )

  def _loses_order(self, checks: Sequence[dict[str, Any] | None]) -> bool:
    """Whether rounding the queries changes the order, by what the first process has seen.

    Where the network computes in another precision as well, finer queries may not help.
    """
    known = [check for check in checks if check is not None and check["spearman"] is not None]
    return self.precision is None and processes.agreed(not all(map(keeps_order, known)))

  def _kernel(self, examples: Examples, measurement: Measurement, draws: Draws, **how: Any):
    return gradient_kernel(self.curvature, examples, measurement, draws, **how)

  def _query_rows(self) -> QueryRows:
    """Every query's gradients, preconditioned for every damping, and compressed."""
    replicates = self.asked.replicates or 1
    return query_rows(
      self.curvature,
      gradient_batches(
        self._kernel(self.queries, self.measurement, self.asked),
        row_operands(self.curvature.model.params, self.asked, QUERY),
        self.queries,
        self.asked,
        self.compute,
      ),
      num_rows=len(self.queries) * replicates,
      dampings=self.dampings,
      compression=self.compression,
      groups=replicates,
      checkpoint=self.compute.within("solves").checkpoint,
    )

  def _score_pass(self) -> ScorePass:
    """Training gradients, past all rows of queries."""
    exactly = gradients = self._kernel(self.train, LOSS, self.draws)
    if self.precision is not None:
      gradients = self._kernel(self.train, LOSS, self.draws, precision=self.precision)
    operands = row_operands(self.curvature.model.params, self.draws, TRAIN)
    return ScorePass(
      gradients,
      exactly,
      operands,
      self.train,
      self.draws,
      self.curvature,
      self.compute,
      len(self.queries),
    )

  @property
  def _settings(self) -> dict[str, Any]:
    """What the scores are computed with, as JSON."""
    return {
      "curvature": dict(self.curvature.settings),
      "process": self.curvature.model.process.settings,
      "measurement": self.measurement.name or "custom",
      **self.draws.settings(self.asked),
      **self.train.augmentation.settings,
      "compression": self.compression.description,
      "precision": self.precision,
      **kind_settings(self.dampings[0]),
    }

  def _round(
    self, score_pass: ScorePass, rows: QueryRows, kernel: Kernel, number: int
  ) -> np.ndarray:
    """[N, G, L, Q, A] scores of one round of draws; an axis of layers follows G where kept."""
    partial, checkpoint = None, self.compute.checkpoint
    replicates = self.draws.replicates or 1
    if checkpoint is not None:
      key = self._settings | content_of(
        self.curvature.model, queries=self.queries, train=self.train
      )
      key |= {
        "curvature_content": self.curvature.content(),
        "dampings": tuple(map(number_of, self.dampings)),
        "compression": settings_of(self.compression),
      }
      key |= {"by_layer": True} if isinstance(kernel, LayerScoreKernel) else {}
      folder = checkpoint.path(f"round-{number:03d}")
      partial = PartialOutputs(folder, key, checkpoint.every)
    products = score_pass.scores(rows, kernel, first_replicate=number * replicates, partial=partial)
    if not np.isfinite(products).all():
      raise ValueError(
        "Some scores are not finite: gradients overflow. Check that the model's outputs are finite "
        "for these examples at every time, or raise the damping."
      )
    layers = products.shape[1:-1]
    shape = len(self.train), replicates, *layers, len(self.dampings), len(self.queries), -1
    return products.reshape(shape)

  def _centred(self, products: np.ndarray) -> np.ndarray:
    """Products [N, …] of mean 0 over the training examples, where draws are weighted."""
    if self.draws.power == 1:
      return products
    return products - products.mean(axis=0, dtype=np.float64).astype(products.dtype)

  def _own_settings(
    self, checks: Sequence[dict | None], solves: Sequence[dict[str, list]]
  ) -> list[dict[str, Any]]:
    """What only the scores of each damping are known by; `solves` are those of QueryRows."""
    found = [
      damping_settings(damping) | {"check": check}
      for damping, check in zip(self.dampings, checks, strict=True)
    ]
    if solves:
      found = [own | {"solves": how} for own, how in zip(found, solves, strict=True)]
    return found

  def _sweep(self, products: np.ndarray, num: int, own: Sequence[dict[str, Any]]) -> Sweep:
    """Scores at each damping from products [N, G, L, Q, A], with the settings that are its own."""
    products = self._centred(products)
    of_draws = np.transpose(products.mean(axis=4), (2, 1, 3, 0))
    of_queries = np.transpose(products.mean(axis=1), (1, 3, 2, 0))
    settings = self._settings | {"draws": num}
    return Sweep(
      tuple(
        Scores(
          of_draws[i],
          self.queries.ids,
          self.train.ids,
          settings | own[i],
          of_queries[i] if of_queries.shape[1] > 1 else None,
          self.train.groups,
        )
        for i in range(len(self.dampings))
      )
    )

  def _layer_scores(
    self, products: np.ndarray, num: int, own: Sequence[dict[str, Any]]
  ) -> tuple[LayerScores, ...]:
    """Scores of each layer at each damping from products [N, G, layers, L, Q, A]."""
    products = self._centred(products)
    of_draws = np.transpose(products.mean(axis=5), (3, 2, 1, 4, 0))
    of_queries = np.transpose(products.mean(axis=1), (2, 1, 4, 3, 0))
    settings = self._settings | {"draws": num}
    return tuple(
      LayerScores(
        of_draws[i],
        tuple(layer.name for layer in self.curvature.layers),
        self.queries.ids,
        self.train.ids,
        settings | own[i],
        of_queries[i] if of_queries.shape[2] > 1 else None,
        self.train.groups,
      )
      for i in range(len(self.dampings))
    )

  def _say(self, checks: Sequence[dict[str, Any] | None]) -> None:
    """Says what compression and precision do to the order, and warns where it suffers."""
    for damping, check in zip(self.dampings, checks, strict=True):
      if check is None or check["spearman"] is None or not processes.is_primary():
        continue
      _LOG.info(
        "attribute: at %s = %.1e, %s queries%s against float32 on %d training examples and %d "
        "queries: rank correlation of scores %.4f (least %.4f)",
        symbol_of(damping),
        number_of(damping),
        self.compression.description,
        f" and {self.precision} products" if self.precision else "",
        check["num_examples"],
        check["num_queries"],
        check["spearman"],
        check["least_spearman"],
      )
      text = verdict(check, self.compression, damping=damping, precision=self.precision)
      if text is not None:
        warnings.warn(text, LostOrder, stacklevel=5)
