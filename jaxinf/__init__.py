"""jaxinf: training-data attribution for diffusion models in JAX."""

from jaxinf.attribution.auto import AutoDraws
from jaxinf.attribution.das import das
from jaxinf.attribution.influence import influence
from jaxinf.attribution.journey import journey_trak
from jaxinf.attribution.similarity import (
  clip_embeddings,
  embedding_similarity,
  pixel_similarity,
  random_scores,
)
from jaxinf.attribution.trak import dtrak, trak
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.fit import SKIP_NORMALISATION, fit_curvature
from jaxinf.curvature.ggn import Solver
from jaxinf.data.subsets import Subsets, random_subsets
from jaxinf.diffusion.measurements import Measurement, loss_at_timestep, weighted_loss
from jaxinf.diffusion.model import Task
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine.checkpoints import Resume
from jaxinf.evaluation.comparison import compare, damping_lds
from jaxinf.evaluation.lds import Retrained, lds
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.scores.damping import Recommendation, recommend_damping
from jaxinf.scores.scores import Ranking, Scores
from jaxinf.scores.stability import RankStability, rank_stability
from jaxinf.scores.sweep import Sweep
from jaxinf.store.index import build_index, open_index
from jaxinf.store.store import Store

__version__ = "0.1.0"
__all__ = [
  "SKIP_NORMALISATION",
  "AutoDraws",
  "Curvature",
  "DrawDesign",
  "Measurement",
  "RankStability",
  "Ranking",
  "Recommendation",
  "Resume",
  "Retrained",
  "Schedule",
  "Scores",
  "Solver",
  "Store",
  "Subsets",
  "Sweep",
  "Task",
  "build_index",
  "clip_embeddings",
  "compare",
  "damping_lds",
  "das",
  "dtrak",
  "embedding_similarity",
  "fit_curvature",
  "influence",
  "journey_trak",
  "lds",
  "loss_at_timestep",
  "noise_ceiling",
  "open_index",
  "pixel_similarity",
  "random_scores",
  "random_subsets",
  "rank_stability",
  "recommend_damping",
  "retraining_lds",
  "trak",
  "weighted_loss",
]
