"""jaxinf: training-data attribution for diffusion models in JAX."""

from jaxinf.attribution.auto import AutoDraws
from jaxinf.attribution.index import build_index, open_index
from jaxinf.attribution.influence import influence
from jaxinf.attribution.stability import RankStability, rank_stability
from jaxinf.attribution.store import Store
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.exact import Solver
from jaxinf.curvature.fit import SKIP_NORMALISATION, fit_curvature
from jaxinf.diffusion.draws import DrawDesign
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.task import Task
from jaxinf.evaluation.damping import DampingSweep, recommend_damping
from jaxinf.types import Ranking, Scores
from jaxinf.unfinished import Resume

__version__ = "0.1.0"
__all__ = [
  "SKIP_NORMALISATION",
  "AutoDraws",
  "Curvature",
  "DampingSweep",
  "DrawDesign",
  "RankStability",
  "Ranking",
  "Resume",
  "Schedule",
  "Scores",
  "Solver",
  "Store",
  "Task",
  "build_index",
  "fit_curvature",
  "influence",
  "open_index",
  "rank_stability",
  "recommend_damping",
]
