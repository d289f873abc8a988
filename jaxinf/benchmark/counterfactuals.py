"""The stage `counterfactual`: retraining without the images that a method calls most supporting.

For each of a few samples a model is trained on all images but the top 2 % or 10 % of a method, for
as many steps as the full model (paper, J.6), and the sample is measured; likewise without as many
random images. The change is from the model of all images with the same training seed. On request
both models also make the sample anew, of the noise that it was made of, and the two are compared.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from jaxinf.benchmark.measuring import (
  check_measurements,
  key_of_measurement,
  measure_models,
  measured_models,
  of_models,
)
from jaxinf.benchmark.regenerating import Wanted, pictures_of, regenerate, unfinished
from jaxinf.benchmark.retraining import Spec, subset_name, subset_specs, train_models
from jaxinf.benchmark.scoring import at_damping, is_scored, models_of, row_of, score_key
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.evaluation.resemblance import check_metrics, resemblance
from jaxinf.networks.retraining import Member
from jaxinf.runs.output import show
from jaxinf.runs.run import Run, own_settings
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Scores
from jaxinf.scores.statistics import mean_and_error

_LOG = logging.getLogger("jaxinf")

RANDOM = "random"
_MODELS, _MEASURES = "counterfactual/models", "counterfactual/measure"

Specs = Mapping[tuple[int, int, int, int], Spec]  # of (method, share, sample, seed)


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
  arrays, notes = artifact.arrays, artifact.notes
  labels = notes["methods"], notes["shares"]
  predicted = arrays.get("predicted")
  texts = [table_text(arrays["change"], *labels, notes["measurement"], predicted=predicted)]
  texts += [resemblance_text(arrays[metric], *labels, metric) for metric in config.metrics]
  show(run, "\n".join(texts), {**notes, **arrays})  # arrays [methods, shares, samples(, seeds)]


def counterfactual_key(run: Run) -> dict:
  """What the changes depend on."""
  config = run.config.counterfactual
  rows = [row_of(method, config.measurement) for method in config.methods]
  key = {
    "counterfactual": own_settings(run, "counterfactual"),
    "measurement": key_of_measurement(run, config.measurement),
    "scores": {row.name: score_key(run, row) for row in rows},
  }
  if run.config.train.num_models > 1:
    key["models"] = {
      row.name: [score_key(model, row) for model in models_of(run, row)[1:]] for row in rows
    }
  return key


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
  is_pixels = "ssim" not in config.metrics or run.dataset.is_pixels
  check_metrics(config.metrics, run.dataset.image_shape, is_pixels)
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
  name, specs = run.config.counterfactual.measurement, _specs(run)
  lacking = unfinished(run, _wanted(run, specs))
  left = train_models(run, _full(run), done=measured_models(run, name) - lacking)
  done = measured_models(run, name, _MEASURES) - lacking
  without = _different(list(specs.values()))
  return len(left + train_models(run, without, stage=_MODELS, done=done))


def _changes(run: Run) -> Outcome:
  """Measures the models; changes [methods, shares, samples, seeds] from those of all images."""
  config, methods, specs = run.config.counterfactual, _methods(run), _specs(run)
  names, full = (config.measurement,), _full(run)
  measure_models(run, full, names)
  measure_models(run, _different(list(specs.values())), names, _MEASURES, _MODELS)
  before = of_models(run, config.measurement, [spec.name for spec in full])
  rows = of_models(run, config.measurement, [spec.name for spec in specs.values()], _MEASURES)
  changes = [row[q] - before[k, q] for (_, _, q, k), row in zip(specs, rows, strict=True)]
  shape = len(methods), len(config.shares), config.num_queries, config.num_seeds
  samples = artifacts.read(run.folder("sample")).arrays["ids"]
  arrays = {
    "change": np.array(changes, np.float32).reshape(shape),
    "predicted": _predicted(run).astype(np.float32),
    "query_ids": samples[: config.num_queries],
  }
  arrays |= {name: x.reshape(shape) for name, x in _resemblances(run, specs).items()}
  chosen = dict(zip(config.methods, config.dampings, strict=False))
  shown = [f"{m}, λ = {chosen[m]:g}" if m in chosen else m for m in methods]
  notes = {"methods": shown, "shares": config.shares, "measurement": config.measurement}
  return arrays, notes, f"changes by {len(methods)} methods"


def _predicted(run: Run) -> np.ndarray:
  """[methods, shares, samples] changes that the scores predict for these removals.

  NaN of methods whose scores are no changes of a measurement: all that take no curvature.
  """
  config, methods = run.config.counterfactual, _methods(run)
  found = np.full((len(methods), len(config.shares), config.num_queries), np.nan)
  for m, method in enumerate(methods):
    if method == RANDOM or not row_of(method, config.measurement).kind.curved:
      continue
    scores = _scores(run, method)
    for q, order in enumerate(_most_supporting(scores, config.num_queries)):
      for s, share in enumerate(config.shares):
        removed = scores.train_ids[order[: round(share * len(order))]]
        found[m, s, q] = scores.predicted_change(removed).changes[q]
  return found


def _resemblances(run: Run, specs: Specs) -> dict[str, np.ndarray]:
  """Metric → [len(specs)] of each sample by its model and by the model of all images."""
  metrics = run.config.counterfactual.metrics
  if not metrics:
    return {}
  regenerate(run, _wanted(run, specs))
  ours = pictures_of(run, [(spec.name, q) for (_, _, q, _), spec in specs.items()])
  theirs = pictures_of(run, [(subset_name(None, seed), q) for _, _, q, seed in specs])
  return {name: resemblance(ours, theirs, name).astype(np.float32) for name in metrics}


def _wanted(run: Run, specs: Specs) -> dict[str, Wanted]:
  """Model → the samples that it is to make anew; none where they are not compared."""
  config = run.config.counterfactual
  if not config.metrics:
    return {}
  wanted = {spec.name: Wanted(tuple(range(config.num_queries)), "retrain") for spec in _full(run)}
  for (_, _, query, _), spec in specs.items():
    before = wanted.get(spec.name, Wanted((), _MODELS)).numbers
    wanted[spec.name] = Wanted(tuple(sorted({*before, query})), _MODELS)
  return wanted


def _specs(run: Run) -> Specs:
  """(method, share, sample, seed), in this order, → the model without the top images."""
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
  change: np.ndarray,
  methods: Sequence[str],
  shares: Sequence[float],
  measurement: str,
  *,
  predicted: np.ndarray | None = None,
) -> str:
  """Mean change ± standard error over samples of change [methods, shares, samples, seeds].

  Where changes are predicted [methods, shares, samples], and are no NaN, so are their means.
  """
  means, errors = mean_and_error(change.mean(axis=3))
  title = (
    f"change of {measurement} of a sample, from the model of all images ({change.shape[2]} samples)"
  )
  cells = np.vectorize(lambda mean, error: f"{mean:.3g} ± {error:.1g}")(means, errors).tolist()
  names = list(methods)
  for method, row in zip(
    methods, () if predicted is None else predicted.mean(axis=2), strict=False
  ):
    if np.isfinite(row).all():
      names.append(f"{method}, predicted")
      cells.append([f"{mean:.3g}" for mean in row])
  return _table(title, cells, names, shares)


def resemblance_text(
  values: np.ndarray, methods: Sequence[str], shares: Sequence[float], metric: str
) -> str:
  """Mean ± standard error over samples of values [methods, shares, samples, seeds].

  In brackets: the mean relative to that of random removal, the last of the methods, less one.
  """
  means, errors = mean_and_error(values.mean(axis=3))
  title = (
    f"{metric} of a sample and of that by the model of all images, of the same noise "
    f"({values.shape[2]} samples)"
  )
  cell = lambda mean, error, random: f"{mean:.3g} ± {error:.1g} ({mean / random - 1:+.1%})"
  cells = np.vectorize(cell, otypes=[object])(means, errors, means[-1:])
  return _table(title, cells.tolist(), methods, shares)


def _table(
  title: str, cells: Sequence[Sequence[str]], methods: Sequence[str], shares: Sequence[float]
) -> str:
  """A row for each method and a column for each share."""
  heads = "".join(f"{f'without {100 * share:g} %':>26}" for share in shares)
  rows = [
    f"{method:<24}{''.join(f'{cell:>26}' for cell in row)}"
    for method, row in zip(methods, cells, strict=True)
  ]
  return "\n".join([f"\n{title}", f"{'removed by':<24}{heads}", *rows])


def _orders(run: Run, method: str) -> list[np.ndarray]:
  """For each query, positions of the training images from the most supporting down."""
  config = run.config.counterfactual
  if method == RANDOM:
    order = lambda query: np.random.default_rng((run.config.seed, query))
    return [order(query).permutation(len(run.dataset)) for query in range(config.num_queries)]
  return _most_supporting(_scores(run, method), config.num_queries)


def _most_supporting(scores: Scores, num_queries: int) -> list[np.ndarray]:
  """For each of the first queries, positions of the training images from the best score down."""
  return list(np.argsort(-scores.values[:num_queries], axis=1, kind="stable"))


def _scores(run: Run, method: str) -> Scores:
  """The scores of a method at the damping that the config names, or at its default.

  Means over all models, where it sees the model.
  """
  config = run.config.counterfactual
  row = row_of(method, config.measurement)
  damping = dict(zip(config.methods, config.dampings, strict=False)).get(method)
  damping = row.kind.default_damping if damping is None else damping
  return mean_scores([at_damping(model, row, damping) for model in models_of(run, row)])


def _without(run: Run, positions: np.ndarray, seed: int) -> Spec:
  """The model of all images but those; its name follows from which they are."""
  examples = np.setdiff1d(np.arange(len(run.dataset)), positions)
  digest = hashlib.sha256(examples.astype(np.int64).tobytes()).hexdigest()[:16]
  return Spec(f"without-{digest}-seed-{seed}", Member(examples), seed, run.config.train.steps)
