"""The stage `counterfactual`: retraining without the images that a method calls most supporting.

For each of a few samples a model is trained on all images but the top 2 % or 10 % of a method, for
as many steps as the full model (paper, J.6), and the sample is measured; likewise without as many
random images. The change is from the model of all images with the same training seed.
"""

import hashlib
import itertools
import logging

import numpy as np

from jaxinf import artifacts
from jaxinf.costs import measured
from jaxinf.proof.measures import key_of_measurement, measure_models, of_models
from jaxinf.proof.models import Spec, subset_name, subset_specs, train_models
from jaxinf.proof.scoring import Row, scored
from jaxinf.retraining import Member
from jaxinf.runs import Run
from jaxinf.types import Scores

_LOG = logging.getLogger("jaxinf")

RANDOM = "random"
_MODELS, _MEASURES = "counterfactual/models", "counterfactual/measure"


def counterfactual(run: Run) -> None:
  """Trains and measures the models without top images; writes how much their samples change."""
  config, num_train = run.config.counterfactual, len(run.dataset)
  samples = artifacts.read(run.folder("sample")).arrays["ids"]
  if not 1 <= config.num_queries <= len(samples):
    raise ValueError(
      f"counterfactual.num_queries must lie in 1…{len(samples)}, the number of samples; "
      f"got {config.num_queries}."
    )
  if not all(1 <= round(share * num_train) < num_train for share in config.shares):
    raise ValueError(
      f"counterfactual.shares must remove some images and leave some: {config.shares}."
    )
  methods = (*config.methods, RANDOM)
  with measured() as cost:
    removed = {
      (method, share, query): top[: round(share * num_train)]
      for method in methods
      for query, top in enumerate(_orders(run, method))
      for share in config.shares
    }
    seeds = range(config.num_seeds)
    specs = {
      (*place, seed): _without(run, positions, seed)
      for (place, positions), seed in itertools.product(removed.items(), seeds)
    }
    full = [spec for spec in subset_specs(run) if spec.name.startswith("full")][: config.num_seeds]
    if len(full) < config.num_seeds:
      raise ValueError("counterfactual.num_seeds must not exceed retrain.num_seeds.")
    different = list({spec.name: spec for spec in specs.values()}.values())
    left = train_models(run, full, shard=run.shard)
    left += train_models(run, different, stage=_MODELS, shard=run.shard)
    if left:
      _LOG.info("counterfactual: %d models are left to other shards", len(left))
      return
    names = (config.measurement,)
    measure_models(run, full, names)
    measure_models(run, different, names, _MEASURES, _MODELS)
    before = of_models(run, config.measurement, [subset_name(None, seed) for seed in seeds])
    rows = of_models(run, config.measurement, [spec.name for spec in specs.values()], _MEASURES)
    change = np.zeros((len(methods), len(config.shares), config.num_queries, config.num_seeds))
    for (method, share, query, seed), row in zip(specs, rows, strict=True):
      place = methods.index(method), config.shares.index(share), query, seed
      change[place] = row[query] - before[seed, query]
  arrays = {"change": change.astype(np.float32), "query_ids": samples[: config.num_queries]}
  notes = {"methods": methods, "shares": config.shares, "measurement": config.measurement}
  key = {"measurement": key_of_measurement(run, config.measurement), **notes}
  artifacts.write(run.folder("counterfactual"), key, arrays, notes=notes, cost=cost)
  print(table_text(change, methods, config.shares, config.measurement))


def table_text(
  change: np.ndarray, methods: tuple[str, ...], shares: tuple[float, ...], measurement: str
) -> str:
  """Mean change ± standard error over samples of change [methods, shares, samples, seeds]."""
  over_seeds = change.mean(axis=3)
  means = over_seeds.mean(axis=2)
  num = over_seeds.shape[2]
  errors = over_seeds.std(axis=2, ddof=1) / num**0.5 if num > 1 else np.full(means.shape, np.nan)
  heads = "".join(f"{f'without {100 * share:g} %':>26}" for share in shares)
  lines = [f"\nchange of {measurement} of a sample ({num} samples)\n{'method':<24}{heads}"]
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
  row = Row(method, config.measurement)
  if not row.kind.measures:
    row = Row(method, None)
  scores = _at_default(scored(run, row), row)
  return list(np.argsort(-scores.values[: config.num_queries], axis=1, kind="stable"))


def _at_default(sweep: list[Scores], row: Row) -> Scores:
  default = row.kind.default_damping
  if default is None:
    return sweep[0]
  return next(scores for scores in sweep if scores.settings["damping"] == default)


def _without(run: Run, positions: np.ndarray, seed: int) -> Spec:
  """The model of all images but those; its name follows from which they are."""
  examples = np.setdiff1d(np.arange(len(run.dataset)), positions)
  digest = hashlib.sha256(examples.astype(np.int64).tobytes()).hexdigest()[:16]
  return Spec(f"without-{digest}-seed-{seed}", Member(examples), seed, run.config.train.steps)
