"""The kinds of curvature, as values: what of the GGN is kept, and how it is estimated.

A kind says which passes a fit makes: the first sums Kronecker factors (or squared gradients where a
layer is diagonal), the second the eigenvalues in the eigenbasis of those factors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxinf.core.checks import checked_count
from jaxinf.core.registry import named
from jaxinf.curvature.solver import Solver
from jaxinf.curvature.targets import FISHERS
from jaxinf.layers.coverage import Selection
from jaxinf.layers.factors import APPROXIMATIONS, GRADIENTS


@dataclasses.dataclass(frozen=True)
class KFAC:
  """Kronecker factors A and G of every layer (Martens and Grosse 2015): H ≈ G ⊗ A.

  Attributes:
    approx: over positions, "expand" or "reduce" (Eschenhagen et al. 2023).
    fisher: targets of the squared gradients: "mc" (sampled from the model's own Gaussian: the GGN
      in expectation), "empirical" (the true targets, which is not the GGN) or "exact" (every
      output, for small networks only).
    samples: targets for each draw, of "mc".

  Raises:
    ValueError: an unknown name, or samples of another Fisher than "mc".

  Examples:
    >>> KFAC("reduce", samples=4)
    KFAC(approx='reduce', fisher='mc', samples=4)
    >>> KFAC(fisher="empirical", samples=4)
    Traceback (most recent call last):
      ...
    ValueError: samples counts model-sampled targets: 'empirical' has one; got 4.
  """

  approx: str = "expand"
  fisher: str = "mc"
  samples: int = 1
  name: ClassVar[str] = "kfac"
  corrects: ClassVar[bool] = False  # eigenvalues, by a second pass

  def __post_init__(self):
    named(dict.fromkeys(APPROXIMATIONS), self.approx, "approx")
    _check_fisher(self.fisher, self.samples)

  @property
  def passes(self) -> bool:
    """Whether a fit goes over the training examples at all."""
    return True

  def selection(self, asked: Selection) -> Selection:
    """Which parameters are covered and how, from what a user asks for."""
    return asked


@dataclasses.dataclass(frozen=True)
class EKFAC(KFAC):
  """K-FAC with eigenvalues corrected in its eigenbasis (George et al. 2018): a second pass."""

  name: ClassVar[str] = "ekfac"
  corrects: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Shampoo:
  """Eigenvectors of E[V Vᵀ] and E[VᵀV], V a layer's gradient of one draw, and the true Λ there.

  (Gupta, Koren and Singer 2018; eigenvalues corrected by a second pass, as of EK-FAC.) V is the sum
  over a layer's positions, so that none is taken as independent of the others: for convolutions
  this drops the assumptions of K-FAC's factors. Fields as of `KFAC`.
  """

  fisher: str = "mc"
  samples: int = 1
  approx: ClassVar[str] = GRADIENTS
  name: ClassVar[str] = "shampoo"
  corrects: ClassVar[bool] = True
  passes: ClassVar[bool] = True

  def __post_init__(self):
    _check_fisher(self.fisher, self.samples)

  def selection(self, asked: Selection) -> Selection:
    """As asked."""
    return asked


@dataclasses.dataclass(frozen=True)
class Diagonal:
  """The diagonal of the GGN: mean squared gradients of every parameter."""

  fisher: str = "mc"
  samples: int = 1
  approx: ClassVar[str] = "expand"
  name: ClassVar[str] = "diagonal"
  corrects: ClassVar[bool] = False
  passes: ClassVar[bool] = True

  def __post_init__(self):
    _check_fisher(self.fisher, self.samples)

  def selection(self, asked: Selection) -> Selection:
    """All covered layers are diagonal."""
    return dataclasses.replace(asked, diagonal=(".",))


@dataclasses.dataclass(frozen=True)
class Identity:
  """H = I, without a pass: scores are inner products of gradients divided by 1 + λ."""

  approx: ClassVar[str] = "expand"
  fisher: ClassVar[str] = "mc"
  samples: ClassVar[int] = 1
  name: ClassVar[str] = "identity"
  corrects: ClassVar[bool] = False
  passes: ClassVar[bool] = False

  def selection(self, asked: Selection) -> Selection:
    """As asked."""
    return asked


@dataclasses.dataclass(frozen=True)
class ExactGGN:
  """The GGN itself, by products with vectors: a referee, and stochastic solves (ASTRA).

  Attributes:
    solver: how systems are solved, and what preconditions them.
  """

  solver: Solver = dataclasses.field(default_factory=Solver)
  approx: ClassVar[str] = "expand"
  fisher: ClassVar[str] = "mc"
  samples: ClassVar[int] = 1
  name: ClassVar[str] = "exact"

  @property
  def corrects(self) -> bool:
    """Whether it is preconditioned by EK-FAC."""
    return self.solver.parts.corrected

  @property
  def passes(self) -> bool:
    """Whether it is preconditioned by anything that is fitted."""
    return self.solver.parts.kronecker

  def selection(self, asked: Selection) -> Selection:
    """As asked."""
    return asked


Kind = KFAC | EKFAC | Shampoo | Diagonal | Identity | ExactGGN


def settings_of(kind: Kind) -> dict[str, Any]:
  """A kind as JSON, which `kind_of` understands."""
  if isinstance(kind, ExactGGN):
    return {"name": kind.name, "solver": kind.solver.settings}
  return {"name": kind.name, **dataclasses.asdict(kind)}


def kind_of(settings: Mapping[str, Any]) -> Kind:
  """The kind with these settings, of which it takes its own; ValueError for unknown names."""
  fields = dict(settings)
  cls = named(KINDS, fields.pop("name", None), "kind of curvature")
  if cls is ExactGGN:
    fields = {"solver": Solver(**fields.get("solver", {}))}
  known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
  return cls(**{name: value for name, value in fields.items() if name in known})


def _check_fisher(fisher: str, samples: int) -> None:
  named(FISHERS, fisher, "fisher")
  if checked_count(samples, "samples") != 1 and fisher != "mc":
    raise ValueError(f"samples counts model-sampled targets: {fisher!r} has one; got {samples}.")


KINDS: dict[str, Callable[..., Kind]] = {
  kind.name: kind for kind in (KFAC, EKFAC, Shampoo, Diagonal, Identity, ExactGGN)
}
