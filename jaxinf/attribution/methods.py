"""Methods of attribution by name, each a constructor of a value with `.scores(…) -> Sweep`.

All give `Scores` of the same queries and training examples, positive where an example supports a
query. The oracle, exact retraining, predicts models rather than scoring examples, and is
evaluation/oracle.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxinf.attribution.das import DAS
from jaxinf.attribution.influence import Influence
from jaxinf.attribution.journey import JourneyTRAK
from jaxinf.attribution.layer_weights import LayerWeighted
from jaxinf.attribution.nearest_patch import NearestPatch
from jaxinf.attribution.posterior import PosteriorCovariance
from jaxinf.attribution.similarity import EmbeddingSimilarity, PixelSimilarity, RandomScores
from jaxinf.attribution.trak import DTRAK, TRAK
from jaxinf.attribution.unlearning import Unlearning
from jaxinf.compression.compression import Compression
from jaxinf.compression.projection import Projection
from jaxinf.core.damping import Damping, RelativeDamping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.registry import named
from jaxinf.core.types import Array
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.kinds import EKFAC, KFAC, Diagonal, ExactGGN, Identity, Kind, Shampoo
from jaxinf.curvature.solver import Solver
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine.compute import Compute
from jaxinf.evaluation.replay import Replay, ReplayTraining
from jaxinf.scores.sweep import Sweep


class Attribution(Protocol):
  """A method with its settings."""

  def scores(
    self, *, queries: Examples, train: Examples, draws: Draws = ..., compute: Compute = ...
  ) -> Sweep:
    """Scores at every damping, or the only ones."""


@dataclasses.dataclass(frozen=True)
class Ingredients:
  """What methods are made of; each takes what it needs.

  Attributes:
    model: that is attributed.
    curvature: kind of curvature → the curvature of that kind; None: the usual one.
    dampings: numbers, λ or ρ, of methods that have one.
    measurement: whose gradient is taken at the queries.
    query_draws: of (t, ε) for each query.
    compression: of preconditioned query gradients.
    precision: of the network's products in the pass over training examples.
    clip: whether sampling clipped predicted data to [-1, 1], for Journey-TRAK.
    learning_rate: that the model was trained with, for unlearning.
    unlearning_steps: of fine-tuning a copy of the model, at most.
    projection: of TRAK and its kin.
    journey_steps: timesteps of a sampling trajectory, for Journey-TRAK.
    embed: examples → embeddings, for "clip".
    training: () → the run that made the model, for "replay"; None where it is not known.
  """

  model: DiffusionModel
  curvature: Callable[[Kind | None], Curvature]
  dampings: Sequence[float]
  measurement: str
  query_draws: Draws
  compression: str | Compression | None
  projection: Projection
  journey_steps: int
  embed: Callable[[Examples], Array]
  precision: str | None = None
  clip: bool = True
  learning_rate: float = 1e-4
  unlearning_steps: int = Unlearning.max_steps
  training: Callable[[], ReplayTraining] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
  """A method, and what a user takes where nothing was tuned.

  Attributes:
    make: ingredients → the method.
    default_damping: λ recommended without a benchmark (paper, J.4), or ρ where damping is relative
      to the layers; None: the method has none.
    measures: whether scores depend on the measurement whose gradient is taken.
    kind: of the curvature they depend on; "own" for the usual one, None for none.
    reads: names of settings that scores depend on.
    sweeps: whether damping changes more than the scale of scores.
    loss_power: of training draws; None: the one asked for where the method has a curvature, and
      otherwise its authors'.
    of: what of the queries it needs where it takes no measurement: "examples", "trajectories", or
      "pictures", which are the pixels of queries and training examples, where models of latents
      see others.
    replays: whether it goes through the training again, step by step.
  """

  make: Callable[[Ingredients], Attribution]
  default_damping: float | None = None
  measures: bool = False
  kind: Kind | str | None = None
  reads: tuple[str, ...] = ()
  sweeps: bool = True
  of: str = "examples"
  loss_power: float | None = None
  replays: bool = False

  @property
  def curved(self) -> bool:
    """Whether scores depend on a fitted curvature."""
    return self.kind is not None

  def power(self, asked: float) -> float | None:
    """The loss_power of training draws where `asked` is asked for; None: the method's default."""
    return self.loss_power if self.loss_power is not None or not self.curved else asked

  @property
  def sees_model(self) -> bool:
    """Whether scores depend on the model, so that another training run gives others."""
    return self.of != "pictures" and (self.curved or self.measures or "draws" in self.reads)

  @property
  def other_kind(self) -> Kind | None:
    """The kind of curvature that the method names; None where it takes the usual one, or none."""
    return None if isinstance(self.kind, str) else self.kind

  def dampings(self, sweep: Sequence[float]) -> tuple[float, ...]:
    """Those of a sweep and the default, ascending; none where the method has none."""
    if self.default_damping is None:
      return ()
    return tuple(sorted({*sweep, self.default_damping} if self.sweeps else {self.default_damping}))


def method_named(name: str) -> Method:
  """The method of that name; an unknown one is a ValueError that lists them."""
  return named(METHODS, name, "method")


def _influence(
  given: Ingredients, kind: Kind | None, damping: Callable[[float], Damping] = float
) -> Influence:
  return Influence(
    given.curvature(kind),
    tuple(map(damping, given.dampings)),
    given.measurement,
    given.compression,
    given.precision,
    given.query_draws,
  )


def _layer_weighted(given: Ingredients, weights: str) -> LayerWeighted:
  return LayerWeighted(_influence(given, None), weights)


def _posterior(given: Ingredients) -> PosteriorCovariance:
  return PosteriorCovariance(
    given.curvature(None), tuple(given.dampings), given.measurement, given.query_draws
  )


def _trak(given: Ingredients) -> TRAK:
  return TRAK(
    given.model,
    given.projection,
    tuple(given.dampings),
    measurement=given.measurement,
    query_draws=given.query_draws,
  )


def _d_trak(given: Ingredients) -> TRAK:
  return DTRAK(given.model, given.projection, tuple(given.dampings), given.query_draws)


def _journey_trak(given: Ingredients) -> JourneyTRAK:
  total, num = given.model.process.num_steps, given.journey_steps
  if total is None:
    raise ValueError("journey-trak goes along discrete timesteps, which this process has not.")
  timesteps = np.unique(np.linspace(0, total - 1, num + 2).round().astype(int)[1:-1])
  return JourneyTRAK(
    given.model,
    given.projection,
    tuple(timesteps.tolist()),
    tuple(given.dampings),
    given.query_draws,
    given.clip,
  )


def _das(given: Ingredients) -> DAS:
  return DAS(given.model, given.projection, tuple(given.dampings), given.query_draws)


def _unlearning(given: Ingredients) -> Unlearning:
  # A tenth of training's rate, as published.
  return Unlearning(given.model, given.learning_rate / 10, max_steps=given.unlearning_steps)


def _replay(given: Ingredients) -> Replay:
  if given.training is None:
    raise ValueError(
      "replay goes through the training of the model again: give its ReplayTraining, of a model "
      "that jaxinf.networks.training has trained, or leave the method out."
    )
  return Replay(given.training(), given.measurement, given.query_draws)


_OWN_DRAWS = ("draws", "replicates", "design")
_QUERY_DRAWS = ("query_draws", "query_replicates", "design")
_DRAWS = (*_OWN_DRAWS, "query_draws", "query_replicates")
_PROJECTED = (*_DRAWS, "projection_dim", "projection")


def _curved(kind: Kind | None, sweeps: bool = True, loss_power: float | None = None) -> Method:
  make = functools.partial(_influence, kind=kind)
  reads = (*_DRAWS, "compression", *(("loss_power",) if loss_power is None else ()))
  return Method(make, 1e-8, True, kind or "own", reads, sweeps, loss_power=loss_power)


def _weighted(weights: str) -> Method:
  make = functools.partial(_layer_weighted, weights=weights)
  return dataclasses.replace(_curved(None), make=make)


def _relative(kind: Kind | None) -> Method:
  """With damping ρ · mean(Λ) of each layer; ρ = 0.01 is the middle of what others sweep."""
  make = functools.partial(_influence, kind=kind, damping=RelativeDamping)
  return dataclasses.replace(_curved(kind), make=make, default_damping=1e-2)


METHODS: Mapping[str, Method] = {
  "influence": _curved(None),
  "influence-unweighted": _curved(None, loss_power=1.0),
  "kfac": _curved(KFAC()),
  "ekfac": _curved(EKFAC()),
  "shampoo": _curved(Shampoo()),
  "kfac-empirical": _curved(KFAC(fisher="empirical")),
  "kfac-reduce": _curved(KFAC("reduce")),
  "kfac-reduce-empirical": _curved(KFAC("reduce", "empirical")),
  "diagonal": _curved(Diagonal()),
  "identity": _curved(Identity(), sweeps=False),
  "exact": _curved(ExactGGN()),
  "astra": _curved(ExactGGN(Solver(method="stochastic"))),
  "influence-relative": _relative(None),
  "ekfac-relative": _relative(EKFAC()),
  "shampoo-relative": _relative(Shampoo()),
  "layer-weighted": _weighted("learnt"),
  "layer-balanced": _weighted("balanced"),
  "posterior": Method(_posterior, 1e-8, True, "own", _DRAWS, loss_power=1.0),
  "trak": Method(_trak, 1e-9, measures=True, reads=_PROJECTED),
  "dtrak": Method(_d_trak, 1e-9, reads=_PROJECTED),
  "journey-trak": Method(
    _journey_trak, 1e-9, reads=(*_PROJECTED, "journey_steps"), of="trajectories"
  ),
  "das": Method(_das, 1e-9, reads=_PROJECTED),
  "unlearning": Method(_unlearning, reads=(*_OWN_DRAWS, "unlearning_steps")),
  "replay": Method(_replay, measures=True, reads=_QUERY_DRAWS, replays=True),
  "pixel": Method(lambda given: PixelSimilarity("cosine"), of="pictures"),
  "pixel-l2": Method(lambda given: PixelSimilarity("l2"), of="pictures"),
  "nearest-patch": Method(
    lambda given: NearestPatch(given.model.process), reads=_OWN_DRAWS, of="pictures"
  ),
  "clip": Method(
    lambda given: EmbeddingSimilarity(given.embed, "clip"), reads=("clip",), of="pictures"
  ),
  "random": Method(lambda given: RandomScores(given.query_draws.seed)),
}
