"""jaxinf: training-data attribution for diffusion models in JAX."""

import importlib
import logging

from jaxinf.core.versions import check_versions

check_versions()

_root = logging.getLogger()
_before = list(_root.handlers), _root.level

from jaxinf.attribution.das import DAS, das
from jaxinf.attribution.influence import Influence, influence, influence_sweep
from jaxinf.attribution.journey import JourneyTRAK, journey_trak
from jaxinf.attribution.layer_weights import (
  LayerWeighted,
  LayerWeights,
  balanced_weights,
  layer_scores,
  learn_layer_weights,
)
from jaxinf.attribution.methods import METHODS
from jaxinf.attribution.nearest_patch import NearestPatch, nearest_patch
from jaxinf.attribution.posterior import PosteriorCovariance, posterior_covariance
from jaxinf.attribution.self_influence import self_influence
from jaxinf.attribution.similarity import (
  clip_embeddings,
  embedding_similarity,
  pixel_similarity,
  random_scores,
)
from jaxinf.attribution.trak import DTRAK, TRAK, dtrak, trak
from jaxinf.attribution.unlearning import Unlearning
from jaxinf.compression.projection import Projection
from jaxinf.core.damping import RelativeDamping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.moments import Moments
from jaxinf.curvature.curvature import Curvature
from jaxinf.curvature.fit import fit_curvature
from jaxinf.curvature.kinds import EKFAC, KFAC, Diagonal, ExactGGN, Identity, Shampoo
from jaxinf.curvature.saving import load_curvature
from jaxinf.curvature.solver import Solver
from jaxinf.data.subsets import Subsets, random_subsets
from jaxinf.diffusion.measurements import (
  Measurement,
  loss_at_time,
  loss_at_timestep,
  loss_in_band,
  masked_loss,
  weighted_loss,
)
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine.checkpoints import Checkpointing
from jaxinf.engine.compute import Compute
from jaxinf.evaluation.comparison import compare, damping_lds
from jaxinf.evaluation.lds import Retrained, lds
from jaxinf.evaluation.oracle import noise_ceiling, retraining_lds
from jaxinf.evaluation.replay import Replay, ReplayTraining, replay_scores
from jaxinf.evaluation.truths import Truth, load_truth, truths
from jaxinf.layers.coverage import SKIP_NORMALISATION
from jaxinf.networks.diffusers import load_autoencoder
from jaxinf.networks.latent_cache import encode_moments, open_moments
from jaxinf.networks.latents import Autoencoder
from jaxinf.scores.damping import Recommendation, recommend_damping, weigh_dampings
from jaxinf.scores.layer_scores import LayerScores
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import NEGATIVE_WEIGHT, Prediction, Ranking, Scores
from jaxinf.scores.self_influence import SelfInfluence
from jaxinf.scores.stability import RankStability, rank_stability
from jaxinf.scores.sweep import Sweep
from jaxinf.store.build import build_store, open_store
from jaxinf.store.store import Store

# A library leaves the root logger alone. Some of ours do not when they are imported: then a user's
# own logging.basicConfig would do nothing.
_root.handlers[:], _root.level = _before

__version__ = "0.2.0"
__all__ = [
  "DAS",
  "DTRAK",
  "EKFAC",
  "KFAC",
  "METHODS",
  "NEGATIVE_WEIGHT",
  "SKIP_NORMALISATION",
  "TRAK",
  "Autoencoder",
  "Checkpointing",
  "Compute",
  "Curvature",
  "Diagonal",
  "DiffusionModel",
  "Draws",
  "ExactGGN",
  "Examples",
  "Identity",
  "Influence",
  "JourneyTRAK",
  "LayerScores",
  "LayerWeighted",
  "LayerWeights",
  "Measurement",
  "Moments",
  "NearestPatch",
  "PosteriorCovariance",
  "Prediction",
  "Process",
  "Projection",
  "RankStability",
  "Ranking",
  "Recommendation",
  "RelativeDamping",
  "Replay",
  "ReplayTraining",
  "Retrained",
  "Schedule",
  "Scores",
  "SelfInfluence",
  "Shampoo",
  "Solver",
  "Store",
  "Subsets",
  "Sweep",
  "Truth",
  "Unlearning",
  "balanced_weights",
  "build_store",
  "clip_embeddings",
  "compare",
  "damping_lds",
  "das",
  "dtrak",
  "embedding_similarity",
  "encode_moments",
  "fit_curvature",
  "influence",
  "influence_sweep",
  "journey_trak",
  "layer_scores",
  "lds",
  "learn_layer_weights",
  "load_autoencoder",
  "load_curvature",
  "load_truth",
  "loss_at_time",
  "loss_at_timestep",
  "loss_in_band",
  "masked_loss",
  "mean_scores",
  "nearest_patch",
  "noise_ceiling",
  "open_moments",
  "open_store",
  "pixel_similarity",
  "posterior_covariance",
  "random_scores",
  "random_subsets",
  "rank_stability",
  "recommend_damping",
  "replay_scores",
  "retraining_lds",
  "self_influence",
  "trak",
  "truths",
  "weigh_dampings",
  "weighted_loss",
]

# Names of version 0.1, for one version.
_MOVED = {
  "Task": "jaxinf.DiffusionModel(apply_fn, params, jaxinf.Process.epsilon(schedule))",
  "DrawDesign": "jaxinf.Draws(num, timesteps=…, antithetic=…, shared=…)",
  "AutoDraws": "jaxinf.Draws.until_stable(…)",
  "Resume": "jaxinf.Compute(checkpoint=jaxinf.Checkpointing(folder, every))",
  "DampingSweep": "jaxinf.Recommendation, what recommend_damping(sweep) gives",
  "build_index": "jaxinf.build_store(folder, curvature, train=…)",
  "open_index": "jaxinf.open_store(folder, curvature)",
}


def __getattr__(name: str):
  if name == "plot":  # which loads matplotlib
    return importlib.import_module("jaxinf.plot")
  if name in _MOVED:
    raise AttributeError(f"jaxinf.{name} is now {_MOVED[name]}.")
  raise AttributeError(f"module 'jaxinf' has no attribute {name!r}")
