"""The proof by retraining: subset models, their true measurements, and how scores predict them."""

from jaxinf.benchmark.counterfactuals import counterfactual
from jaxinf.benchmark.evaluating import evaluate
from jaxinf.benchmark.stages import benchmark, measure, retrain
from jaxinf.benchmark.truths import judged, truth

__all__ = ["benchmark", "counterfactual", "evaluate", "judged", "measure", "retrain", "truth"]
