"""What the proof by retraining takes: models of subsets, their measurements, and scores of them."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxinf.benchmark.measuring import check_measurements, measure_models
from jaxinf.benchmark.retraining import groups_of, subset_specs, train_models
from jaxinf.benchmark.scoring import Row, answered, check_rows, ingredients, rows_of
from jaxinf.core.draws import Draws
from jaxinf.curvature.kinds import ExactGGN
from jaxinf.engine.rehearsal import Rehearsal
from jaxinf.planning.cost import StageCost, added
from jaxinf.planning.line import CHECKED, OFTEN, cost_of, eigenbases_bytes, query_row_bytes
from jaxinf.planning.reduced import Reduced, Subject, examples_of_batches
from jaxinf.runs.run import kind_of_config

_EXAMPLES = 256  # to retrain on, in rehearsals
_SIZE = 640  # of matrices whose decomposition and product are timed


def proof_costs(subject: Subject) -> Iterator[StageCost]:
  """Of retrain, measure and evaluate; ValueError where methods or measurements lack something."""
  config = subject.run.config
  check_measurements(subject.run, (*config.measure.measurements, *config.score.measurements))
  check_rows(subject.run)
  cost, retrained = _retrain_cost(subject)
  yield cost
  yield _measure_cost(subject, retrained)
  yield _evaluate_cost(subject)


def _retrain_cost(subject: Subject) -> tuple[StageCost, Reduced]:
  """Steps of all models, from one group of each kind; and the reduced run, with these models."""
  config, num = subject.run.config, subject.num_devices
  at_once = config.retrain.models_at_once * num
  specs = subset_specs(subject.run)
  kind = lambda group: (group[0].steps, math.ceil(len(group) / num))
  groups = Counter(map(kind, groups_of(specs, at_once)))
  most = max(len(group) for group in groups_of(specs, at_once))
  each = math.ceil(most / num)  # models of a device

  draws = _measure_draws(subject)
  rows = subject.run.compute(config.measure.batch_size).rows(draws)
  run = subject.reduced(
    "retrained", _EXAMPLES, examples_of_batches(rows, draws.replicates or 1), states=True,
    train={**OFTEN, "checkpoint_every": config.train.steps},
    retrain={"num_subsets": min(config.retrain.num_subsets, most), "num_seeds": 1},
  )  # fmt: skip
  few = subset_specs(run)
  with subject.rehearsal(run) as found:
    train_models(run, few)
  tried = dict(zip(map(kind, groups_of(few, at_once)), found.passes, strict=True))

  seconds, operations = 0.0, 0.0
  for (steps, models), count in groups.items():
    near = min(tried, key=lambda k: (k[0] != steps, abs(k[1] - models)))
    times = count * steps * models / near[1]
    seconds += times * tried[near].seconds
    operations += times * (tried[near].operations(0) or math.nan)
  state, params = subject.state_bytes, subject.params_bytes
  cost = cost_of(
    subject, "retrain", len(specs), "models", found,
    written=len(specs) * params,
    device={
      "state": state * each, "gradients": params * each, "images": subject.images_bytes,
    },
    host={"state": state * most},
    disk={"parameters": len(specs) * params},
  )  # fmt: skip
  compiling = found.compiling * len(groups) / len(tried)
  spent = {"compiling": compiling, "batches": None if found.too_large else seconds}
  cost = dataclasses.replace(
    cost,
    operations=None if math.isnan(operations) else operations * num,
    seconds={**cost.seconds, **spent},
  )
  return cost, run


def _measure_draws(subject: Subject) -> Draws:
  config = subject.run.config.measure
  return subject.run.draws(config.draws, config.replicates, config.design).split()


def _measure_cost(subject: Subject, retrained: Reduced) -> StageCost:
  """Passes over the samples, one for each group of models and kind of measurement."""
  config, specs = subject.run.config, subset_specs(subject.run)
  names, at_once = config.measure.measurements, config.retrain.models_at_once
  few = subset_specs(retrained)
  with subject.rehearsal(retrained) as found:
    measure_models(retrained, few, names)
  times = math.ceil(len(specs) / at_once) / math.ceil(len(few) / at_once)
  kept = 8 * len(specs) * config.sample.num_samples * len(names)
  cost = cost_of(
    subject, "measure", len(specs), "models", found,
    device={"parameters": at_once * subject.params_bytes},
    host={"parameters": at_once * subject.params_bytes},
    disk={"measurements": kept},
  )  # fmt: skip
  more = {
    part: None if (value := cost.seconds[part]) is None else times * value
    for part in ("batches", "besides")
  }
  operations = None if cost.operations is None else times * cost.operations
  return dataclasses.replace(cost, operations=operations, seconds={**cost.seconds, **more})


def _evaluate_cost(subject: Subject) -> StageCost:
  """Scores by every method: those of a curvature, which is fitted first, and the others."""
  run, config = subject.run, subject.run.config.score
  rows = rows_of(run)
  known = [row for row in rows if not (_is_solved(subject, row) or row.kind.replays)]
  curved = [row for row in known if row.kind.curved]
  draws = run.draws(config.draws, config.replicates, config.design)
  asked = run.draws(config.query_draws, config.query_replicates, config.design)
  passes = min(config.passes, run.config.sample.num_samples)
  at_once = math.ceil(run.config.sample.num_samples / passes)
  dampings = max((len(row.kind.dampings(config.dampings)) for row in curved), default=0)
  query_bytes = (
    (asked.replicates or 1) * dampings * query_row_bytes(subject, config.compression, None)
  )

  # 1. Curvatures, once for each kind; then a pass over the training examples for each part.
  few = _few(subject, "scored", draws.split(), asked.split(), CHECKED, at_once, query_bytes)
  with subject.rehearsal(few) as fits:
    methods = {row: row.kind.make(ingredients(few, row)) for row in curved}
  with subject.rehearsal(few, at_once, scores=True) as scores:
    for number, (row, method) in enumerate(methods.items()):
      answered(few, row, method, subject.folder / f"sums-{number}")

  # 2. The others, whose Fishers are as large as the full training set makes them.
  few = _few(subject, "projected", draws.split(2), asked.split(2), 1, run.config.sample.num_samples)
  others = [row for row in known if not row.kind.curved]
  with subject.rehearsal(few) as plain:
    for number, row in enumerate(others):
      row.scores(few, subject.folder / f"features-{number}")
  projected = [row for row in others if "projection_dim" in row.kind.reads]
  each = _fisher_seconds(subject, draws.split(2), asked.split(2)) if projected else 0.0

  cost = lambda found: _of_scores(subject, found, at_once * query_bytes, bool(projected))
  found = [cost(fits), cost(scores), cost(plain)]
  repeated = [passes * x if x is not None else None for x in (scores.seconds, scores.operations)]
  whole = added([fits.seconds, repeated[0], plain.seconds]) if known == rows else None
  operations = added([fits.operations, repeated[1], plain.operations])
  seconds = {name: added(part.seconds[name] for part in found) for name in found[0].seconds}
  return dataclasses.replace(
    found[0],
    operations=None if operations is None else operations * subject.num_devices,
    seconds={**seconds, "batches": whole, "Fishers": each * len(projected)},
    device=max((part.device for part in found), key=lambda device: sum(device.values())),
    notes=_NOTES[: 1 + (known != rows)],
  )


def _of_scores(
  subject: Subject, found: Rehearsal, query_bytes: int, has_features: bool
) -> StageCost:
  """The cost of a part of evaluate, with the bytes of all."""
  run, config = subject.run, subject.run.config.score
  draws = run.draws(config.draws, config.replicates, config.design)
  num, rows = len(run.dataset), rows_of(run)
  size = math.ceil(run.compute(config.batch_size).rows(draws.split()) / subject.num_devices)
  scores = 4 * run.config.sample.num_samples * num * (1 + len(config.dampings))
  features = 4 * num * (draws.split(2).replicates or 1) * config.projection_dim
  return cost_of(
    subject, "evaluate", len(rows), "methods", found,
    device={"rows of queries": query_bytes, "gradients": size * subject.gradient_bytes},
    host={
      "eigenbases": eigenbases_bytes(subject) * bool(query_bytes), "rows of queries": query_bytes,
      "scores": scores, "features": features * has_features,
    },
    disk={"scores": scores * len(rows)},
  )  # fmt: skip


_NOTES = (
  "the tables that are made of the scores are not counted.",
  "how long solves with the exact curvature and replays of training take is not known beforehand.",
)


def _is_solved(subject: Subject, row: Row) -> bool:
  """Whether a method solves with the exact curvature."""
  kind = row.kind.kind
  own = kind_of_config(subject.run.config.curvature)
  return isinstance(own if kind == "own" else kind, ExactGGN)


def _few(
  subject: Subject, name: str, draws: Draws, asked: Draws, least: int, most: int, row_bytes: int = 0
) -> Reduced:
  """A run to score with, of `least` examples and `most` queries; `row_bytes` are of a query."""
  compute = subject.run.compute(subject.run.config.score.batch_size)
  examples = examples_of_batches(compute.rows(draws), draws.replicates or 1)
  queries = examples_of_batches(compute.rows(asked), asked.replicates or 1, row_bytes)
  score = {"passes": 1}
  return subject.reduced(name, max(least, examples), min(most, queries), states=True, score=score)


def _fisher_seconds(subject: Subject, draws: Draws, asked: Draws) -> float:
  """For the decomposition of one method's Fisher, and the products with it, in float64."""
  config, num = subject.run.config.score, len(subject.run.dataset)
  rows = np.random.default_rng(0).standard_normal((_SIZE, _SIZE))
  began = subject.clock()
  gram = rows @ rows.T
  multiplied = subject.clock()
  np.linalg.eigh(gram)
  product, decomposition = multiplied - began, subject.clock() - multiplied
  smaller = min(num, config.projection_dim)
  every = (asked.replicates or 1) + 3 * (draws.replicates or 1)  # products for a damping
  applied = (1 + len(config.dampings)) * every * subject.run.config.sample.num_samples
  products = num * config.projection_dim * (smaller + applied)
  return decomposition * (smaller / _SIZE) ** 3 + product * products / _SIZE**3
