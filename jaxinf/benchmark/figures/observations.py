"""What retrained models show about measurements (paper, Observations 1–3, Fig. 11–19)."""

import dataclasses

import numpy as np

from jaxinf.benchmark.figures.common import (
  Drawn,
  image_measurements,
  math_name,
  plain_name,
  truth_of,
)
from jaxinf.benchmark.measuring import of_models
from jaxinf.benchmark.retraining import subset_name
from jaxinf.benchmark.scoring import at_default, row_of
from jaxinf.diffusion.weightings import WEIGHTINGS
from jaxinf.report.observation_figures import (
  ChangePanel,
  Heatmap,
  changes_figure,
  heatmaps_figure,
  weights_figure,
)
from jaxinf.report.words import percent
from jaxinf.runs.config import settings
from jaxinf.runs.run import Run
from jaxinf.scores.statistics import mean_and_error, spearman, spearman_matrix

_INFLUENCE = "influence"


def timesteps(run: Run) -> Drawn:
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
  weight = run.config.retrain.outside_weight
  trained = f"down-weighted by {weight:g}" if weight else "removed"
  labels = [[math_name(name) for name in names] for names in (true, gradients)]
  maps = [
    Heatmap(
      "Predicted: LDS, %", 100 * scores, labels[0], labels[1], "true measurement",
      "measurement whose gradient is taken", split=len(steps),
    ),
    Heatmap(
      "True: rank correlation over subsets, %", 100 * among, labels[0], labels[0],
      "true measurement", "true measurement", split=len(steps),
    ),
  ]  # fmt: skip
  num = len(steps)
  own = np.diag(scores)[:num]
  beaten = [
    f"{plain_name(true[i])} by {plain_name(gradients[best])} "
    f"({percent(scores[i, best])} % against {percent(own[i])} %)"
    for i in range(num)
    if (best := int(np.argmax(scores[i, :num]))) != i
  ]
  caption = (
    f"Influence functions with the gradient of one loss (columns) for the true change of another "
    f"(rows), where images outside a subset are {trained}; and true changes among themselves. "
    f"ℓ_t is the loss at timestep t, from 1. Means over samples. With the right gradient, LDS are "
    f"{percent(own.min())} … {percent(own.max())} %. "
    + (f"Another ℓ predicts better for {len(beaten)} of {num}: {'; '.join(beaten)}. " if beaten
       else "No other ℓ predicts any of them better. ")
    + f"The gradient of the loss for the loss: {percent(scores[num, num])} %."
  )  # fmt: skip
  header = ("true \\ gradient", *(plain_name(name) for name in gradients))
  rows = [
    (plain_name(name), *(percent(*pair) for pair in zip(scores[i], errors[i], strict=True)))
    for i, name in enumerate(true)
  ]
  return Drawn(
    title="Losses at other timesteps as stand-ins" + (f", images {trained}" if weight else ""),
    caption=caption, figure=heatmaps_figure(maps),
    arrays={"lds": scores, "errors": errors, "between_true": among,
            "num_models": truth.retrained["loss"].trained.sum()},
    header=header, rows=rows, made=truth.made(), inputs=truth.inputs(),
    notes={"true": true, "gradients": gradients},
  )  # fmt: skip


def timesteps_half(run: Run) -> Drawn:
  """`timesteps` of models in which images outside the subset count less but are not removed."""
  section = dataclasses.replace(run.config.retrain, outside_weight=run.config.study.outside_weight)
  config = dataclasses.replace(run.config, retrain=section)
  return timesteps(dataclasses.replace(run, config=config))


def changes(run: Run) -> Drawn:
  """Predicted and actual changes of the loss and of losses at timesteps, sample by sample."""
  config = run.config.study
  targets = ["loss", *(f"loss_at_timestep({t})" for t in config.change_timesteps)]
  truth = truth_of(run, targets)
  panels, rows = [], []
  arrays: dict[str, np.ndarray] = {}
  for target in targets:
    predicted = truth.predicted(at_default(run, row_of(_INFLUENCE, target)))
    actual = _actual_changes(run, target, truth.retrained[target].values[truth.kept])
    slope = _slope_within_samples(predicted, actual)
    rank, _ = mean_and_error(spearman(predicted, actual, axis=0))
    above = (actual > 0).mean(), (predicted > 0).mean()
    numbers = (
      f"{slope:.2g}".replace("-", "−"),
      *(percent(float(share)) for share in (rank, *above)),
    )
    rows.append((plain_name(target), *numbers))
    title = (
      f"{math_name(target)}: slope {numbers[0]}, rank corr. {numbers[1]} %,\n"
      f"actual > 0: {numbers[2]} %, predicted > 0: {numbers[3]} %"
    )
    intercept = float(actual.mean() - slope * predicted.mean())
    panels.append(ChangePanel(title, predicted, actual, (slope, intercept)))
    arrays |= {f"{target}/predicted": predicted, f"{target}/actual": actual}
  steps, weight = (run.config.train.steps, run.config.retrain.steps), truth.outside_weight
  outside = f"with weight {weight:g} for" if weight else "without"
  caption = (
    "Each dot is one sample (its colour) and one subset: the predicted change of its measurement "
    f"{outside} the images outside the subset, and the actual one against the model of all images "
    "with the same training seed, mean over seeds. The line has the slope of least squares within "
    "samples, which were 1 if predictions had the right size; rank correlations are means over "
    "samples. "
    + "; ".join(f"{row[0]}: slope {row[1]}, actual changes positive in {row[3]} %, predicted ones "
                f"in {row[4]} %" for row in rows) + ". "
  )  # fmt: skip
  if steps[0] != steps[1] and not weight:
    caption += (
      f"Models of subsets train for {steps[1]:,} steps, those of all images for {steps[0]:,}: part "
      "of the actual change is that of fewer steps."
    )
  return Drawn(
    title="Predicted and actual changes", caption=caption, figure=changes_figure(panels),
    arrays=arrays, rows=rows,
    header=("measurement", "slope", "rank correlation, %", "actual > 0, %", "predicted > 0, %"),
    made=truth.made(), inputs=truth.inputs(),
  )  # fmt: skip


def correlation(run: Run) -> Drawn:
  """Correlations over samples of the measurements of pairs of models."""
  targets = image_measurements(run)
  truth = truth_of(run, targets)
  firsts = [truth.retrained[name].trained[:, 0] for name in targets]
  subsets = [j for j in truth.kept if all(first[j] for first in firsts)]
  shown = subsets[: run.config.study.num_models - 1]
  labels = ["all", *(f"{j}" for j in shown)]
  maps, rows, found = [], [], []
  arrays: dict[str, np.ndarray] = {}
  for target in targets:
    full = of_models(run, target, [subset_name(None, 0)])
    if np.isnan(full).any():
      raise _nothing_to_compare_with(target)
    values = np.concatenate([full, truth.retrained[target].values[subsets, 0]]).astype(float)
    pearson = np.corrcoef(values)
    ranks = spearman_matrix(values[:, :, None], values[:, :, None])[..., 0]
    size = len(labels)
    table = np.where(
      np.triu(np.ones((size, size), bool)), pearson[:size, :size], ranks[:size, :size]
    )
    maps.append(
      Heatmap(target.replace("_", " "), table, labels, labels, "subset of training images",
              "subset of training images", ".3f", (min(0.9, float(table.min())), 1.0))
    )  # fmt: skip
    pairs = pearson[1:, 1:][np.triu_indices(len(subsets), 1)]
    rank_pairs = ranks[1:, 1:][np.triu_indices(len(subsets), 1)]
    cells = [f"{pairs.mean():.4f} ({pairs.min():.4f})", f"{rank_pairs.mean():.4f}",
             f"{np.nanmean(pearson[0, 1:]):.4f}"]  # fmt: skip
    seeds = _between_seeds(truth.retrained[target].values[truth.kept])
    cells.append("–" if seeds is None else f"{seeds:.4f}")
    rows.append((target, *cells))
    found.append(
      f"{target}: mean r = {pairs.mean():.4f} between models of different subsets (least "
      f"{pairs.min():.4f}), ρ = {rank_pairs.mean():.4f}"
    )
    found[-1] += "" if seeds is None else f"; r = {seeds:.4f} between seeds of one subset"
    arrays |= {f"{target}/pearson": pearson, f"{target}/spearman": ranks}
  caption = (
    "Correlations, over samples, of what two models measure: Pearson's r above the diagonal, the "
    "rank correlation ρ below; models of all images and of random subsets, all of training seed 0, "
    "hence with the same initial weights and random stream. "
    + "; ".join(found)
    + f" (all {len(subsets)} subsets)."
  )
  return Drawn(
    title="How alike models of different images measure the samples", caption=caption,
    figure=heatmaps_figure(maps, columns=2), arrays=arrays, rows=rows,
    header=("measurement", "r between subsets (least)", "ρ between subsets", "r with all images",
            "r between seeds"),
    made=truth.made(), inputs=truth.inputs(), notes={"subsets": [int(j) for j in subsets]},
  )  # fmt: skip


def weights(run: Run) -> Drawn:
  """Weights of the timesteps' losses in the ELBO and in the training loss."""
  schedule = run.process.schedule
  if schedule is None:
    raise ValueError(f"{run.process} is continuous: it has no timesteps to weigh.")
  names = {
    "training loss": "uniform", "ELBO": "elbo", "ELBO of the larger variances": "elbo_large"
  }  # fmt: skip
  found = {label: np.asarray(WEIGHTINGS[name](schedule), float) for label, name in names.items()}
  elbo, num = found["ELBO"], len(found["ELBO"])
  equal = int(np.argmax(elbo < 1)) + 1 if (elbo < 1).any() else None
  half = int(np.searchsorted(np.cumsum(elbo), elbo.sum() / 2)) + 1
  caption = (
    f"Losses are means over the {num:,} timesteps t of weight · ℓ_t, with ℓ_t the mean squared "
    f"error of the noise at t, from 1. The ELBO weighs ℓ_1 by {elbo[0]:.3g} and ℓ_{num} by "
    f"{elbo[-1]:.3g}"
    + ("" if equal is None else f", and less than the training loss's 1 first at t = {equal}")
    + f"; the first {half} timestep{'s' * (half > 1)} hold half of its weight."
  )
  rows = [
    (f"{t + 1}", *(f"{values[t]:.4g}" for values in found.values()))
    for t in np.unique(np.geomspace(1, num, 12).round().astype(int)) - 1
  ]
  config = run.config.diffusion
  return Drawn(
    title="Weights of the timesteps in the ELBO and in the loss", caption=caption,
    figure=weights_figure(found), arrays=found, header=("t", *found), rows=rows,
    made=f"From the {config.schedule} schedule of {num:,} timesteps alone.",
    inputs={"diffusion": settings(config)},
  )  # fmt: skip


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
