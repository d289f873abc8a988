"""The proof by retraining: subset models, their true measurements, and how scores predict them."""

from jaxinf.proof.evaluating import evaluate
from jaxinf.proof.removal import counterfactual
from jaxinf.proof.stages import benchmark, measure, retrain

__all__ = ["benchmark", "counterfactual", "evaluate", "measure", "retrain"]
