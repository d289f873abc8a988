"""The stage `counterfactual`: retraining without the images that a method calls most supporting.

For each of a few samples a model is trained on all images but the top 2 % or 10 % of a method, for
as many steps as the full model (paper, J.6), and the sample is measured; likewise without as many
random images. The change is from the model of all images with the same training seed.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from jaxinf.benchmark.measuring import (
  check_measurements,
  key_of_measurement,
  measure_models,
  measured_models,
  of_models,
)
from jaxinf.benchmark.retraining import Spec, subset_name, subset_specs, train_models
from jaxinf.benchmark.scoring import at_damping, at_default, is_scored, row_of, score_key
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.networks.retraining import Member
from jaxinf.runs.run import Run, own_settings
from jaxinf.scores.statistics import mean_and_error

_LOG = logging.getLogger("jaxinf")

RANDOM = "random"
_MODELS, _MEASURES = "counterfactual/models", "counterfactual/measure"


def counterfactual(run: Run) -> None:
  """Trains and measures the models without top images; writes how much their samples change.

  Raises:
    ValueError: impossible settings, or a shard finds no scores: shards remove the same images only
      if they read the same scores, so that `evaluate`, or this stage on one machine, goes first.
  """
  config = run.config.counterfactual
  _check(run)
  if run.shard != (0, 1) and not all(
    is_scored(run, row_of(method, config.measurement)) for method in config.methods
  ):
    raise ValueError("Shards need the scores first: run the stage evaluate, then counterfactual.")
  place, key = run.folder("counterfactual"), counterfactual_key(run)
  if not artifacts.holds(place, key):
    left = _train(run)
    if left:
      _LOG.info("counterfactual: %d models are left to other shards", left)
      return
  artifact = artifacts.cached(place, key, lambda: _changes(run), label="counterfactual", anew=True)
  change, notes = artifact.arrays["change"], artifact.notes
  print(table_text(change, notes["methods"], notes["shares"], notes["measurement"]))


def counterfactual_key(run: Run) -> dict:
  """What the changes depend on."""
  config = run.config.counterfactual
  rows = [row_of(method, config.measurement) for method in config.methods]
  return {
    "counterfactual": own_settings(run, "counterfactual"),
    "measurement": key_of_measurement(run, config.measurement),
    "scores": {row.name: score_key(run, row) for row in rows},
  }


def _methods(run: Run) -> tuple[str, ...]:
  """Those of the config, and random removal last."""
  return (*(m for m in run.config.counterfactual.methods if m != RANDOM), RANDOM)


def _check(run: Run) -> None:
  """Raises ValueError for impossible settings."""
  config, num_train = run.config.counterfactual, len(run.dataset)
  if run.config.retrain.same_batches:
    raise ValueError(
      "counterfactual trains models with seeds of their own: leave out retrain.same_batches."
    )
  check_measurements(run, (config.measurement,))
  num_samples = run.config.sample.num_samples
  if not 1 <= config.num_queries <= num_samples:
    raise ValueError(
      f"counterfactual.num_queries must lie in 1…{num_samples}, the number of samples; "
      f"got {config.num_queries}."
    )
  if not all(1 <= round(share * num_train) < num_train for share in config.shares):
    raise ValueError(
      f"counterfactual.shares must remove some images and leave some; got {config.shares}."
    )
  if len(config.dampings) not in (0, len(config.methods)):
    raise ValueError(
      f"counterfactual.dampings must be one for each of {len(config.methods)} methods, or () for "
      f"their defaults; got {len(config.dampings)}. Set --config.counterfactual.dampings too."
    )
  if not 1 <= config.num_seeds <= run.config.retrain.num_seeds:
    raise ValueError(
      f"counterfactual.num_seeds must lie in 1…{run.config.retrain.num_seeds}, retrain.num_seeds."
    )


def _train(run: Run) -> int:
  """Trains the models that are compared, in this shard's part; how many are still missing."""
  name, specs = run.config.counterfactual.measurement, list(_specs(run).values())
  left = train_models(run, _full(run), done=measured_models(run, name))
  done = measured_models(run, name, _MEASURES)
  return len(left + train_models(run, _different(specs), stage=_MODELS, done=done))


def _changes(run: Run) -> Outcome:
  """Measures the models; changes [methods, shares, samples, seeds] from those of all images."""
  config, methods, specs = run.config.counterfactual, _methods(run), _specs(run)
  names, full = (config.measurement,), _full(run)
  measure_models(run, full, names)
  measure_models(run, _different(list(specs.values())), names, _MEASURES, _MODELS)
  before = of_models(run, config.measurement, [spec.name for spec in full])
  rows = of_models(run, config.measurement, [spec.name for spec in specs.values()], _MEASURES)
  change = np.zeros((len(methods), len(config.shares), config.num_queries, config.num_seeds))
  for (m, s, q, seed), row in zip(specs, rows, strict=True):
    change[m, s, q, seed] = row[q] - before[seed, q]
  samples = artifacts.read(run.folder("sample")).arrays["ids"]
  arrays = {"change": change.astype(np.float32), "query_ids": samples[: config.num_queries]}
  chosen = dict(zip(config.methods, config.dampings, strict=False))
  shown = [f"{m}, λ = {chosen[m]:g}" if m in chosen else m for m in methods]
  notes = {"methods": shown, "shares": config.shares, "measurement": config.measurement}
  return arrays, notes, f"changes by {len(methods)} methods"


def _specs(run: Run) -> dict[tuple[int, int, int, int], Spec]:
  """(method, share, sample, seed) → the model without the top images."""
  config, methods = run.config.counterfactual, _methods(run)
  orders = [_orders(run, method) for method in methods]
  return {
    (m, s, q, seed): _without(run, orders[m][q][: round(share * len(run.dataset))], seed)
    for m in range(len(methods))
    for s, share in enumerate(config.shares)
    for q in range(config.num_queries)
    for seed in range(config.num_seeds)
  }


def _different(specs: Sequence[Spec]) -> list[Spec]:
  """Each model once, where several methods remove the same images."""
  return list({spec.name: spec for spec in specs}.values())


def _full(run: Run) -> list[Spec]:
  """The models of all images with the same seeds, in their order."""
  names = {subset_name(None, seed) for seed in range(run.config.counterfactual.num_seeds)}
  return [spec for spec in subset_specs(run) if spec.name in names]


def table_text(
  change: np.ndarray, methods: Sequence[str], shares: Sequence[float], measurement: str
) -> str:
  """Mean change ± standard error over samples of change [methods, shares, samples, seeds]."""
  means, errors = mean_and_error(change.mean(axis=3))
  num = change.shape[2]
  heads = "".join(f"{f'without {100 * share:g} %':>26}" for share in shares)
  lines = [
    f"\nchange of {measurement} of a sample, from the model of all images ({num} samples)",
    f"{'removed by':<24}{heads}",
  ]
  for method, row, error in zip(methods, means, errors, strict=True):
    cells = (f"{f'{m:.3g} ± {e:.1g}':>26}" for m, e in zip(row, error, strict=True))
    lines.append(f"{method:<24}{''.join(cells)}")
  return "\n".join(lines)


def _orders(run: Run, method: str) -> list[np.ndarray]:
  """For each query, positions of the training images from the most supporting down."""
  config = run.config.counterfactual
  if method == RANDOM:
    order = lambda query: np.random.default_rng((run.config.seed, query))
    return [order(query).permutation(len(run.dataset)) for query in range(config.num_queries)]
  row = row_of(method, config.measurement)
  damping = dict(zip(config.methods, config.dampings, strict=False)).get(method)
  scores = at_default(run, row) if damping is None else at_damping(run, row, damping)
  return list(np.argsort(-scores.values[: config.num_queries], axis=1, kind="stable"))


def _without(run: Run, positions: np.ndarray, seed: int) -> Spec:
  """The model of all images but those; its name follows from which they are."""
  examples = np.setdiff1d(np.arange(len(run.dataset)), positions)
  digest = hashlib.sha256(examples.astype(np.int64).tobytes()).hexdigest()[:16]
  return Spec(f"without-{digest}-seed-{seed}", Member(examples), seed, run.config.train.steps)
