"""jaxinf: training-data attribution for diffusion models in JAX."""

from jaxinf.attribution.influence import influence
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.exact import Solver
from jaxinf.curvature.fit import SKIP_NORMALISATION, Resume, fit_curvature
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.task import Task
from jaxinf.types import Ranking, Scores

__version__ = "0.1.0"
__all__ = [
  "SKIP_NORMALISATION",
  "Curvature",
  "Ranking",
  "Resume",
  "Schedule",
  "Scores",
  "Solver",
  "Task",
  "fit_curvature",
  "influence",
]
