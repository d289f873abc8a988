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
from jaxinf.attribution.similarity import EmbeddingSimilarity, PixelSimilarity, RandomScores
from jaxinf.attribution.trak import DTRAK, TRAK
from jaxinf.compression.compression import Compression
from jaxinf.compression.projection import Projection
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.registry import named
from jaxinf.core.types import Array
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.kinds import EKFAC, KFAC, Diagonal, ExactGGN, Identity, Kind
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine.compute import Compute
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
    dampings: of methods that have one.
    measurement: whose gradient is taken at the queries.
    query_draws: of (t, ε) for each query.
    compression: of preconditioned query gradients.
    precision: of the network's products in the pass over training examples.
    clip: whether sampling clipped predicted data to [-1, 1], for Journey-TRAK.
    projection: of TRAK and its kin.
    journey_steps: timesteps of a sampling trajectory, for Journey-TRAK.
    embed: examples → embeddings, for "clip".
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


@dataclasses.dataclass(frozen=True)
class Method:
  """A method, and what a user takes where nothing was tuned.

  Attributes:
    make: ingredients → the method.
    default_damping: λ recommended without a benchmark (paper, J.4); None: the method has none.
    measures: whether scores depend on the measurement whose gradient is taken.
    kind: of the curvature they depend on; "own" for the usual one, None for none.
    reads: names of settings that scores depend on.
    sweeps: whether damping changes more than the scale of scores.
    of: what of the queries it needs where it takes no measurement: "examples", "trajectories", or
      "pictures", which are the pixels of queries and training examples, where models of latents
      see others.
  """

  make: Callable[[Ingredients], Attribution]
  default_damping: float | None = None
  measures: bool = False
  kind: Kind | str | None = None
  reads: tuple[str, ...] = ()
  sweeps: bool = True
  of: str = "examples"

  @property
  def curved(self) -> bool:
    """Whether scores depend on a fitted curvature."""
    return self.kind is not None

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


def _influence(given: Ingredients, kind: Kind | None) -> Influence:
  return Influence(
    given.curvature(kind),
    tuple(given.dampings),
    given.measurement,
    given.compression,
    given.precision,
    given.query_draws,
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


_DRAWS = ("draws", "replicates", "query_draws", "query_replicates", "design")
_PROJECTED = (*_DRAWS, "projection_dim", "projection")


def _curved(kind: Kind | None, sweeps: bool = True) -> Method:
  make = functools.partial(_influence, kind=kind)
  return Method(make, 1e-8, True, kind or "own", (*_DRAWS, "compression"), sweeps)


METHODS: Mapping[str, Method] = {
  "influence": _curved(None),
  "kfac": _curved(KFAC()),
  "ekfac": _curved(EKFAC()),
  "kfac-empirical": _curved(KFAC(fisher="empirical")),
  "kfac-reduce": _curved(KFAC("reduce")),
  "kfac-reduce-empirical": _curved(KFAC("reduce", "empirical")),
  "diagonal": _curved(Diagonal()),
  "identity": _curved(Identity(), sweeps=False),
  "exact": _curved(ExactGGN()),
  "trak": Method(_trak, 1e-9, measures=True, reads=_PROJECTED),
  "dtrak": Method(_d_trak, 1e-9, reads=_PROJECTED),
  "journey-trak": Method(
    _journey_trak, 1e-9, reads=(*_PROJECTED, "journey_steps"), of="trajectories"
  ),
  "das": Method(_das, 1e-9, reads=_PROJECTED),
  "pixel": Method(lambda given: PixelSimilarity("cosine"), of="pictures"),
  "pixel-l2": Method(lambda given: PixelSimilarity("l2"), of="pictures"),
  "clip": Method(
    lambda given: EmbeddingSimilarity(given.embed, "clip"), reads=("clip",), of="pictures"
  ),
  "random": Method(lambda given: RandomScores(given.query_draws.seed)),
}
