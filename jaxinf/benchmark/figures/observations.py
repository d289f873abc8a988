"""What retrained models show about measurements (paper, Observations 1–3, Fig. 11–19)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxinf.benchmark.figures.common import (
  Numbers,
  Truth,
  image_measurements,
  math_name,
  plain_name,
  truth_of,
)
from jaxinf.benchmark.measuring import of_models
from jaxinf.benchmark.retraining import subset_name
from jaxinf.benchmark.scoring import at_default, row_of
from jaxinf.diffusion.weightings import WEIGHTINGS
from jaxinf.report.observation_figures import ChangePanel, Heatmap
from jaxinf.report.words import percent
from jaxinf.runs.config import settings
from jaxinf.runs.run import Run
from jaxinf.scores.statistics import mean_and_error, spearman, spearman_matrix

_INFLUENCE = "influence"


def timesteps(run: Run) -> Numbers:
  """LDS of the gradient of each ℓ_t' for each true ℓ_t, and of true ℓ_t among themselves."""
  steps = [f"loss_at_timestep({t})" for t in run.config.study.timesteps]
  true, gradients = [*steps, "loss"], [*steps, "loss", "square_norm"]
  truth = truth_of(run, true)
  measured = np.stack([truth.means[name] for name in true])
  predicted = np.stack([truth.predicted(at_default(run, row_of(_INFLUENCE, g))) for g in gradients])
  # [true, gradient or true, Q] and their means over samples.
  by_influence = spearman_matrix(predicted, measured).swapaxes(0, 1)
  by_truth = spearman_matrix(measured, measured).swapaxes(0, 1)
  (scores, errors), (among, _) = mean_and_error(by_influence), mean_and_error(by_truth)
  weight = truth.outside_weight
  trained = f"down-weighted by {weight:g}" if weight else "removed"
  rows = [
    (plain_name(name), *(percent(*pair) for pair in zip(scores[i], errors[i], strict=True)))
    for i, name in enumerate(true)
  ]
  return Numbers(
    title="Losses at other timesteps as stand-ins" + (f", images {trained}" if weight else ""),
    caption=_stand_ins_caption(scores, true, gradients, trained),
    shown={"maps": _stand_ins_maps(scores, among, true, gradients)},
    arrays={
      "lds": scores,
      "errors": errors,
      "between_true": among,
      "num_models": truth.retrained["loss"].trained.sum(),
    },
    header=("true \\ gradient", *(plain_name(name) for name in gradients)),
    rows=rows,
    made=truth.made(),
    inputs=truth.inputs(),
    notes={"true": true, "gradients": gradients},
  )


def timesteps_half(run: Run) -> Numbers:
  """`timesteps` of models in which images outside the subset count less but are not removed."""
  section = dataclasses.replace(run.config.retrain, outside_weight=run.config.study.outside_weight)
  config = dataclasses.replace(run.config, retrain=section)
  return timesteps(dataclasses.replace(run, config=config))


def changes(run: Run) -> Numbers:
  """Predicted and actual changes of the loss and of losses at timesteps, sample by sample."""
  targets = ["loss", *(f"loss_at_timestep({t})" for t in run.config.study.change_timesteps)]
  truth = truth_of(run, targets)
  panels, rows = [], []
  arrays: dict[str, np.ndarray] = {}
  for target in targets:
    predicted = truth.predicted(at_default(run, row_of(_INFLUENCE, target)))
    actual = _actual_changes(run, target, truth.retrained[target].values[truth.kept])
    panel, row = _change_panel(target, predicted, actual)
    panels.append(panel)
    rows.append(row)
    arrays |= {f"{target}/predicted": predicted, f"{target}/actual": actual}
  return Numbers(
    title="Predicted and actual changes",
    caption=_changes_caption(run, truth.outside_weight, rows),
    shown={"panels": panels},
    arrays=arrays,
    header=("measurement", "slope", "rank correlation, %", "actual > 0, %", "predicted > 0, %"),
    rows=rows,
    made=truth.made(),
    inputs=truth.inputs(),
  )


def correlation(run: Run) -> Numbers:
  """Correlations over samples of the measurements of pairs of models."""
  targets = image_measurements(run)
  truth = truth_of(run, targets)
  firsts = [truth.retrained[name].trained[:, 0] for name in targets]
  subsets = [int(j) for j in truth.kept if all(first[j] for first in firsts)]
  labels = ["all", *(f"{j}" for j in subsets[: run.config.study.num_models - 1])]
  maps, rows, found = [], [], []
  arrays: dict[str, np.ndarray] = {}
  for target in targets:
    pearson, ranks = _between_models(run, truth, target, subsets)
    maps.append(_correlation_map(target, pearson, ranks, labels))
    of_subsets = np.triu_indices(len(subsets), 1)
    pairs, rank_pairs = pearson[1:, 1:][of_subsets], ranks[1:, 1:][of_subsets]
    seeds = _between_seeds(truth.retrained[target].values[truth.kept])
    rows.append(
      (
        target,
        f"{pairs.mean():.4f} ({pairs.min():.4f})",
        f"{rank_pairs.mean():.4f}",
        f"{np.nanmean(pearson[0, 1:]):.4f}",
        "–" if seeds is None else f"{seeds:.4f}",
      )
    )
    found.append(
      f"{target}: mean r = {pairs.mean():.4f} between models of different subsets (least "
      f"{pairs.min():.4f}), ρ = {rank_pairs.mean():.4f}"
      + ("" if seeds is None else f"; r = {seeds:.4f} between seeds of one subset")
    )
    arrays |= {f"{target}/pearson": pearson, f"{target}/spearman": ranks}
  caption = (
    "Correlations, over samples, of what two models measure: Pearson's r above the diagonal, the "
    "rank correlation ρ below; models of all images and of random subsets, all of training seed 0, "
    "hence with the same initial weights and random stream. "
  )
  header = ("r between subsets (least)", "ρ between subsets", "r with all images")
  return Numbers(
    title="How alike models of different images measure the samples",
    caption=f"{caption}{'; '.join(found)} (all {len(subsets)} subsets).",
    shown={"maps": maps, "columns": 2},
    arrays=arrays,
    header=("measurement", *header, "r between seeds"),
    rows=rows,
    made=truth.made(),
    inputs=truth.inputs(),
    notes={"subsets": subsets},
  )


def weights(run: Run) -> Numbers:
  """Weights of the timesteps' errors of ε in the ELBO and in the training loss."""
  process = run.process
  if process.schedule is None:
    raise ValueError(f"{process} is continuous: it has no timesteps to weigh.")
  of_noise = process.exact_noise_error_scales  # 0 where nothing is left of the data
  if not of_noise.all():
    raise ValueError(
      f"{process} has a timestep of noise alone, where the error of ε has no weight."
    )
  names = {"ELBO": "elbo", "ELBO of the larger variances": "elbo_large"}
  found = {"training loss": process.exact_weights / of_noise} | {
    label: np.asarray(WEIGHTINGS[name](process.schedule), float) for label, name in names.items()
  }
  elbo, num = found["ELBO"], len(found["ELBO"])
  less = elbo < found["training loss"]
  equal = int(np.argmax(less)) + 1 if less.any() else None
  half = int(np.searchsorted(np.cumsum(elbo), elbo.sum() / 2)) + 1
  caption = (
    f"Losses are means over the {num:,} timesteps t of weight · ℓ_t, with ℓ_t the mean squared "
    f"error of the noise at t, from 1. The ELBO weighs ℓ_1 by {elbo[0]:.3g} and ℓ_{num} by "
    f"{elbo[-1]:.3g}"
    + ("" if equal is None else f", and less than the training loss first at t = {equal}")
    + f"; the first {half} timestep{'s' * (half > 1)} hold half of its weight."
  )
  rows = [
    (f"{t + 1}", *(f"{values[t]:.4g}" for values in found.values()))
    for t in np.unique(np.geomspace(1, num, 12).round().astype(int)) - 1
  ]
  return Numbers(
    title="Weights of the timesteps in the ELBO and in the loss",
    caption=caption,
    shown={"weights": found},
    arrays=found,
    header=("t", *found),
    rows=rows,
    made=f"From the {run.config.diffusion.schedule} schedule of {num:,} timesteps alone.",
    inputs={"diffusion": settings(run.config.diffusion)},
  )


def _stand_ins_maps(
  scores: np.ndarray, among: np.ndarray, true: Sequence[str], gradients: Sequence[str]
) -> list[Heatmap]:
  labels = [[math_name(name) for name in names] for names in (true, gradients)]
  split = len(true) - 1  # the last is no timestep's
  return [
    Heatmap(
      "Predicted: LDS, %",
      100 * scores,
      labels[0],
      labels[1],
      "true measurement",
      "measurement whose gradient is taken",
      split=split,
    ),
    Heatmap(
      "True: rank correlation over subsets, %",
      100 * among,
      labels[0],
      labels[0],
      "true measurement",
      "true measurement",
      split=split,
    ),
  ]


def _stand_ins_caption(
  scores: np.ndarray, true: Sequence[str], gradients: Sequence[str], trained: str
) -> str:
  """LDS with the right gradients, and which other ones are better."""
  num = len(true) - 1
  own = np.diag(scores)[:num]
  beaten = [
    f"{plain_name(true[i])} by {plain_name(gradients[best])} "
    f"({percent(scores[i, best])} % against {percent(own[i])} %)"
    for i in range(num)
    if (best := int(np.argmax(scores[i, :num]))) != i
  ]
  others = "No other ℓ predicts any of them better"
  if beaten:
    others = f"Another ℓ predicts better for {len(beaten)} of {num}: {'; '.join(beaten)}"
  return (
    f"Influence functions with the gradient of one loss (columns) for the true change of another "
    f"(rows), where images outside a subset are {trained}; and true changes among themselves. "
    f"ℓ_t is the loss at timestep t, from 1. Means over samples. With the right gradient, LDS are "
    f"{percent(own.min())} … {percent(own.max())} %. {others}. "
    f"The gradient of the loss for the loss: {percent(scores[num, num])} %."
  )


def _change_panel(
  target: str, predicted: np.ndarray, actual: np.ndarray
) -> tuple[ChangePanel, tuple[str, ...]]:
  """Changes [M, Q] as they are drawn, and their row of the table."""
  slope = _slope_within_samples(predicted, actual)
  rank, _ = mean_and_error(spearman(predicted, actual, axis=0))
  above = (actual > 0).mean(), (predicted > 0).mean()
  row = (
    plain_name(target),
    f"{slope:.2g}".replace("-", "−"),
    *(percent(float(share)) for share in (rank, *above)),
  )
  title = (
    f"{math_name(target)}: slope {row[1]}, rank corr. {row[2]} %,\n"
    f"actual > 0: {row[3]} %, predicted > 0: {row[4]} %"
  )
  intercept = float(actual.mean() - slope * predicted.mean())
  return ChangePanel(title, predicted, actual, (slope, intercept)), row


def _changes_caption(run: Run, weight: float, rows: Sequence[Sequence[str]]) -> str:
  outside = f"with weight {weight:g} for" if weight else "without"
  found = (
    f"{name}: slope {slope}, actual changes positive in {actual} %, predicted ones in {predicted} %"
    for name, slope, _, actual, predicted in rows
  )
  caption = (
    "Each dot is one sample (its colour) and one subset: the predicted change of its measurement "
    f"{outside} the images outside the subset, and the actual one against the model of all images "
    "with the same training seed, mean over seeds. The line has the slope of least squares within "
    "samples, which were 1 if predictions had the right size; rank correlations are means over "
    f"samples. {'; '.join(found)}. "
  )
  all_images, subset = run.config.train.steps, run.config.retrain.steps
  if all_images != subset and not weight:
    caption += (
      f"Models of subsets train for {subset:,} steps, those of all images for {all_images:,}: part "
      "of the actual change is that of fewer steps."
    )
  return caption


def _between_models(
  run: Run, truth: Truth, target: str, subsets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Pearson's r and ρ [1 + S, 1 + S] over samples, of the model of all images and of S subsets."""
  full = of_models(run, target, [subset_name(None, 0)])
  if np.isnan(full).any():
    raise _nothing_to_compare_with(target)
  values = np.concatenate([full, truth.retrained[target].values[list(subsets), 0]]).astype(float)
  columns = values[:, :, None]
  return np.corrcoef(values), spearman_matrix(columns, columns)[..., 0]


def _correlation_map(
  target: str, pearson: np.ndarray, ranks: np.ndarray, labels: Sequence[str]
) -> Heatmap:
  """The first models: r above the diagonal and on it, ρ below."""
  size = len(labels)
  above = np.triu(np.ones((size, size), bool))
  table = np.where(above, pearson[:size, :size], ranks[:size, :size])
  return Heatmap(
    target.replace("_", " "),
    table,
    labels,
    labels,
    "subset of training images",
    "subset of training images",
    ".3f",
    (min(0.9, float(table.min())), 1.0),
  )


def _actual_changes(run: Run, target: str, values: np.ndarray) -> np.ndarray:
  """[M, Q] changes from the models of all images with the same seeds, means over seeds [M, K, Q].

  Raises:
    ValueError: of some subset no seed is one of a model of all images.
  """
  seeds = range(values.shape[1])
  full = of_models(run, target, [subset_name(None, seed) for seed in seeds])
  difference = values - full
  if np.isnan(difference).all(axis=(1, 2)).any():
    raise _nothing_to_compare_with(target)
  return np.asarray(np.nanmean(difference, axis=1, dtype=np.float64))


def _nothing_to_compare_with(target: str) -> ValueError:
  return ValueError(
    f"The models of all images ({subset_name(None, 0)}, …) are not measured by {target}, so that "
    "there is nothing to compare with: run retrain and measure to the end."
  )


def _slope_within_samples(predicted: np.ndarray, actual: np.ndarray) -> float:
  """Slope of actual on predicted changes [M, Q] by least squares with an intercept a sample."""
  x, y = predicted - predicted.mean(axis=0), actual - actual.mean(axis=0)
  return float((x * y).sum() / (x * x).sum()) if x.any() else 0.0


def _between_seeds(values: np.ndarray) -> float | None:
  """Mean Pearson correlation over samples of two seeds of a subset [M, K, Q]; None of one seed."""
  if values.shape[1] < 2:
    return None
  pairs = [np.corrcoef(own[0], own[1])[0, 1] for own in values if not np.isnan(own[:2]).any()]
  return float(np.mean(pairs)) if pairs else None
