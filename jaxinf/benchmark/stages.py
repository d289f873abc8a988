"""The stages of a proof: retrain → measure → evaluate, which scores, and counterfactual.

Each extends what is there: more subsets, seeds, methods or measurements cost only themselves.
"""

import logging

from jaxinf.benchmark.measuring import check_measurements, measure_models, measured_everywhere
from jaxinf.benchmark.retraining import subset_specs, train_models
from jaxinf.benchmark.scoring import check_rows
from jaxinf.runs.perform import perform, steps_of
from jaxinf.runs.run import Run
from jaxinf.runs.stage import hint

_LOG = logging.getLogger("jaxinf")


def retrain(run: Run) -> None:
  """Trains this shard's part of the subset models that are neither trained nor measured."""
  check_measurements(run, run.config.measure.measurements)
  measured = measured_everywhere(run, run.config.measure.measurements)
  specs = subset_specs(run)
  left = train_models(run, specs, done=measured)
  there = len(specs) - len(left)
  then = f"{len(left)} are left to other shards" if left else hint("retrain")
  _LOG.info("retrain: %d of %d models are there; %s", there, len(specs), then)


def measure(run: Run) -> None:
  """Takes the true measurements of the samples by every model that is trained."""
  config, specs = run.config.measure, subset_specs(run)
  measure_models(run, specs, config.measurements)
  there = measured_everywhere(run, config.measurements)
  missing = [spec.name for spec in specs if spec.name not in there]
  if len(missing) == len(specs):
    raise ValueError("There are no retrained models to measure: run the stage retrain first.")
  then = f"{len(missing)} are not trained yet" if missing else hint("measure")
  done = len(specs) - len(missing)
  _LOG.info("measure: %d of %d models are measured; %s", done, len(specs), then)


def benchmark(run: Run) -> None:
  """All of a proof: train, sample, retrain, measure, score and evaluate.

  Raises:
    ValueError: before anything begins, where methods or measurements are unknown or lack something.
  """
  check_measurements(run, (*run.config.measure.measurements, *run.config.score.measurements))
  check_rows(run)
  if run.config.retrain.num_subsets < 2:
    raise ValueError("Rank correlations need retrain.num_subsets of at least 2; 100 is usual.")
  for stage in steps_of(run, "benchmark"):
    perform(run, stage)
