"""The page of a run: which training examples made its samples, and how far to trust the answer."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from jaxinf.core.damping import damping_of, number_of, symbol_of
from jaxinf.data.dataset import Dataset
from jaxinf.engine.progress import clock
from jaxinf.layers.coverage import Coverage
from jaxinf.report.attribution_figure import attribution_figure
from jaxinf.report.canvas import png
from jaxinf.report.page import Curve, Group, Sample, Section, Table, Tile, write_page
from jaxinf.report.pictures import how_shown, is_image, png_bytes, sorted_scores_paths
from jaxinf.report.rows import TITLES, Neighbour, Row, common_unit, explained_rows
from jaxinf.report.words import Unit, count, memory, number, power, scientific
from jaxinf.runs.config import as_dict
from jaxinf.runs.sections import Config
from jaxinf.scores.models import shared_top
from jaxinf.scores.scores import NEGATIVE_WEIGHT, Scores
from jaxinf.scores.support import SupportCheck, support_check

_CHECKED = 10  # supporting examples in the check, fewer where there are not twice as many
_SAME_ORDER = 0.99  # rank correlation with float32 scores below which the page says what was lost
_CURVE = (168.0, 56.0)  # width and height
_SHARP_BELOW = 128  # pixels; smaller pictures are enlarged without smoothing


@dataclasses.dataclass(frozen=True, eq=False)
class _Answer:
  """What the page is made of.

  Attributes:
    dataset: the training examples.
    scores: of all samples.
    rows: of the samples that are shown.
    unit: of all scores on the page.
    check: of the scores on held-out draws; None: there is one replicate of draws or one example.
    noun: what a training example is called.
  """

  dataset: Dataset
  scores: Scores
  rows: list[Row]
  unit: Unit
  check: SupportCheck | None
  noun: str


def write_report(
  folder: Path,
  *,
  config: Config,
  dataset: Dataset,
  samples: np.ndarray,
  scores: Scores,
  coverage: Coverage,
  manifests: Mapping[str, Mapping],
  labels: Sequence[str] | None = None,
) -> list[Path]:
  """Writes index.html and attributions.png into `folder`, each atomically.

  Args:
    folder: made where it does not exist.
    config: of the run; config.report says how much is shown. Where it asks for more than there is,
      all is shown.
    dataset: the training examples.
    samples: [Q, …], the queries.
    scores: of all samples and training examples.
    coverage: which parameters the curvature covers.
    manifests: stage → manifest of its artefact, in the order of the run.
    labels: [Q] what each sample was made from, in words; None: from nothing else.

  Returns:
    The paths, the page first.

  Raises:
    ValueError: the scores belong to other samples or data, or config.report asks for less than 1.
  """
  rows = explained_rows(
    dataset,
    samples=samples,
    scores=scores,
    num_queries=config.report.num_queries,
    top_k=config.report.top_k,
    labels=labels,
  )
  answer = _Answer(
    dataset,
    scores,
    rows,
    unit=common_unit(rows),
    check=_support(scores, config.seed),
    noun="image" if is_image(np.asarray(dataset.images[0])) else "example",
  )
  trust = [
    *_noise(answer),
    *_models(answer),
    *_rounding(scores.settings, answer.noun),
    *_order(manifests.get("attribute", {}).get("notes", {}), answer.noun),
  ]
  tables = [_costs(manifests), _settings(config), _coverage(coverage), _software(manifests)]
  sections = [
    Section(text=_introduction(answer), facts=_facts(answer, coverage)),
    Section("Are the scores more than noise?", text=trust),
    _samples(answer, top_k=config.report.top_k),
    Section("How it was computed", tables=tables),
  ]
  title = f"Which training {answer.noun}s made these {dataset.name} samples?"
  figure = png(attribution_figure(rows, answer.unit, answer.noun))
  return write_page(folder, title, sections, {"attributions.png": figure})


def _introduction(answer: _Answer) -> list[str]:
  """What a score means, with the first sample's highest as an example, and its unit and error."""
  dataset, scores, noun, unit = answer.dataset, answer.scores, answer.noun, answer.unit
  num, measurement = len(dataset), str(scores.settings["measurement"]).replace("_", " ")
  article = "An" if noun[0] in "aeiou" else "A"
  replicates = scores.query_replicate_values
  whose = "(those of the sample itself are not in it)"
  if replicates is not None and len(replicates) > 1:
    whose = "and for the sample itself"
  errors = Markup(
    "± is one standard error over the random draws of noise for the training {noun}s {whose}; a "
    "score smaller than twice its ± can hardly be told from zero."
  ).format(noun=noun, whose=whose)
  if np.isnan(scores.std_errors).all():
    errors = Markup(
      "The scores come without standard errors, which need at least two replicates of draws "
      "(attribute.replicates ≥ 2)."
    )
  units = f"Scores are in units of {power(unit.exponent)}. " if unit.exponent else ""
  return [
    f"A diffusion model learnt from {count(num)} training {noun}s ({dataset.name}) and then "
    f"generated the samples below. Every training {noun} has a score for every sample: an estimate "
    "of what the sample owes to it.",
    Markup(
      '{article} {noun} with a positive score <b class="supporting">supports</b> the sample: had '
      "the model been trained without it, it would fit the sample worse. One with a negative score "
      '<b class="opposing">opposes</b> it: without it, the model would fit the sample better. '
      "Leaving one {noun} out is predicted to change the sample’s {measurement} by its score "
      "divided by {num}; leaving several out, by the sum of theirs. Negative scores count "
      "{weight:g} times in such a sum, because models trained anew without {noun}s seldom fit a "
      "sample better. {example}"
    ).format(
      article=article,
      noun=noun,
      measurement=measurement,
      num=count(num),
      weight=NEGATIVE_WEIGHT,
      example=_example(answer, measurement),
    ),
    units + errors,
  ]


def _example(answer: _Answer, measurement: str) -> str:
  """What leaving out the first sample's most supporting examples is predicted to do."""
  row, scores = answer.rows[0], answer.scores
  num = len(row.groups["supporting"])
  best = scores.top(num).ids[0]

  def predicted(ids: np.ndarray) -> str:
    found = scores.predicted_change(ids)
    change, error = found.changes[0], found.std_errors[0]
    known = "" if math.isnan(error) else f" ± {scientific(error)}"
    return f"{'raise' if change >= 0 else 'lower'} it by {scientific(abs(change))}{known}"

  text = f"Of the {measurement} of {row.id}: leaving out {best[0]} is predicted to "
  text += predicted(best[:1])
  return (
    f"{text}, and all {num} that support it most, to {predicted(best)}." if num > 1 else f"{text}."
  )


def _facts(answer: _Answer, coverage: Coverage) -> list[tuple[str, str]]:
  dataset, scores, noun = answer.dataset, answer.scores, answer.noun
  settings, num_replicates = scores.settings, len(scores.replicate_values)
  replicates = f" in {num_replicates} replicates" if num_replicates > 1 else ""
  return [
    ("Data set", dataset.name),
    (f"Training {noun}s", count(len(dataset))),
    ("Samples", count(len(scores.query_ids))),
    ("Model parameters", count(coverage.num_parameters)),
    (f"Draws per {noun}", f"{settings['draws']}{replicates}"),
    (f"Damping {symbol_of(damping_of(settings))}", scientific(settings["damping"])),
  ]


def _support(scores: Scores, seed: int) -> SupportCheck | None:
  num_train = len(scores.train_ids)
  if num_train < 2:
    return None
  return support_check(scores, k=min(_CHECKED, num_train // 2), seed=seed)


def _noise(answer: _Answer) -> list[str]:
  """What held-out draws say of the examples that the others chose."""
  check, unit, noun = answer.check, answer.unit, answer.noun
  num_queries, num_train = len(answer.scores.query_ids), len(answer.scores.train_ids)
  if check is None:
    has = f"one training {noun}" if num_train < 2 else "one replicate of draws"
    return [
      f"This run cannot tell: it has {has} only. The check chooses {noun}s by one half of the "
      "draws and looks at them with the other half, so it needs attribute.replicates ≥ 2 and at "
      f"least two training {noun}s."
    ]
  few = f"({check.k} and not {_CHECKED}, as there are {num_train} training {noun}s.) "
  found = Markup("<strong>{}</strong>").format(
    unit.with_error(check.mean_difference, check.mean_std_error)
  )
  if not math.isnan(check.mean_std_error):
    found += (
      f" (mean over {num_queries} samples ± its standard error); it exceeds two of its standard "
      f"errors in {check.num_clear} of {num_queries} samples, which chance alone would do in "
      f"{check.chance_of_clear:.0%} of them"
    )
  verdict = (
    "So the ranking repeats under fresh draws for the training "
    f"{noun}s: it is not an accident of the noise drawn for them. (The draws of the sample itself "
    "were the same in both halves.)"
    if check.repeats
    else "Taken together, the ranking does not clearly repeat under fresh draws: read the rows "
    "below as noise, and use more draws (attribute.draws, in more attribute.replicates)."
  )
  return [
    f"One half of the draws chose the {check.k} most supporting {noun}s of each sample; the other "
    f"half, which had no say in the choice, scored them and {check.k} random other {noun}s. Then "
    f"the halves swapped roles. {few if check.k < _CHECKED else ''}The mean score of the chosen "
    f"{noun}s less that of the random ones is " + found + ".",
    f"{verdict} The check does not show that leaving those {noun}s out would change the samples as "
    "predicted; only retraining without them proves that.",
  ]


def _models(answer: _Answer) -> list[str]:
  """Which supporting examples survive a new training run, where there are several models."""
  scores, noun = answer.scores, answer.noun
  if scores.model_values is None:
    return []
  num_models, num_queries, num_train = scores.model_values.shape
  k = min(_CHECKED, num_train)
  best, shared = scores.top(k), k * shared_top(scores, k)
  mean, worst = (number(x, ".1f") for x in (shared.mean(), shared.mean(axis=1).min()))
  clear = int((best.values > 2 * best.model_std_errors).sum())
  return [
    f"The scores are means over {num_models} models, which differ in the seed of their training "
    "alone; “models ±” is one standard error between them, which is what another training run may "
    f"move. Of the {k} {noun}s that support a sample most, {mean} are among the {k} of a single "
    f"model (mean over samples and models; in the worst sample {worst}, by chance "
    f"{number(k * k / num_train, '.1f')}). {count(clear)} of all {count(k * num_queries)} have a "
    "score above twice its error between models: these survive a new training run."
  ]


def _rounding(settings: Mapping[str, Any], noun: str) -> list[str]:
  """What rounding the samples' gradients did to the order of the scores, where it was measured."""
  check = settings.get("check")
  if not check or check["spearman"] is None:
    return []
  num_train, num_queries = check["num_examples"], check["num_queries"]
  mean, least = check["spearman"], check["least_spearman"]
  if least >= _SAME_ORDER:
    return [
      f"Against float32 queries, on {num_train} of the training {noun}s, the scores' rank "
      f"correlation is {mean:.4f} (least of {num_queries}: {least:.4f})."
    ]
  done = [settings[name] for name in ("compression", "precision") if settings.get(name)]
  return [
    Markup(
      "<strong>Rounding changed the order of these scores, and a comparison of halves of the draws "
      "cannot see it.</strong> The gradients are rounded{done}, and the rounding error is common "
      "to both halves: it repeats from half to half as signal does, and it is not part of any ±. "
      "Scores in float32, on {num_train} of the training {noun}s, order them differently: the rank "
      "correlation of these scores with them is {mean:.4f} on average over {num_queries} samples "
      "and {least:.4f} for the worst sample, where 1 is the same order. Scores with "
      "attribute.compression=None and attribute.precision=None are free of this error; a larger "
      "damping makes it smaller."
    ).format(
      done=f" ({', '.join(map(str, done))})" if done else "",
      num_train=num_train,
      noun=noun,
      mean=mean,
      num_queries=num_queries,
      least=least,
    )
  ]


def _order(notes: Mapping[str, Any], noun: str) -> list[str]:
  """How far down the order holds, and which damping is recommended, where they were found."""
  lines = []
  if "stability" in notes:
    lines.append(f"How far down the order of the training {noun}s holds: {notes['stability']}.")
  if "recommended_damping" in notes:
    damping = damping_of(notes["settings"] | {"damping": notes["recommended_damping"]})
    lines.append(
      f"Of the dampings in attribute.sweep and the one shown, {symbol_of(damping)} = "
      f"{number_of(damping):g} is recommended: the least whose scores are about as faithful as the "
      "best, as far as can be told without retraining."
    )
  return lines


def _samples(answer: _Answer, *, top_k: int) -> Section:
  """Every row with its groups, and sentences on what is not shown as asked."""
  num_train, num_queries, noun = len(answer.dataset), len(answer.scores.query_ids), answer.noun
  text = [how_shown(answer.dataset.images[0])]
  if top_k > num_train:
    text.append(
      f"Each group shows all of the training {noun}s: there are {count(num_train)}, and "
      f"report.top_k asks for {count(top_k)}."
    )
  few = f" – the first {len(answer.rows)} of {num_queries}" * (len(answer.rows) < num_queries)
  return Section(
    title=f"The samples{few}",
    text=[sentence for sentence in text if sentence],
    samples=[_sample(answer, row, q) for q, row in enumerate(answer.rows)],
  )


def _sample(answer: _Answer, row: Row, q: int) -> Sample:
  check, unit, noun = answer.check, answer.unit, answer.noun
  note = ""
  if check is not None:
    z = check.z[q]
    note = Markup(
      "On held-out draws, its top {k} less {k} random {noun}s: <strong>{found}</strong> "
      "<span>(z = {z}).</span>"
    ).format(
      k=check.k,
      noun=noun,
      found=unit.with_error(check.differences[q], check.std_errors[q]),
      z=number(z, ".1f") if math.isfinite(z) else "undefined",
    )
  return Sample(
    tile=_with_picture(
      Tile(row.id, alt=f"generated sample {row.id}", label=row.label or ""), row.picture
    ),
    groups=[
      Group(
        kind=kind,
        title=title,
        tiles=[_neighbour_tile(n, unit, noun) for n in row.groups[kind]],
      )
      for kind, title in TITLES.items()
    ],
    curve=Curve(
      title=f"All {count(len(row.values))} scores, sorted",
      paths=sorted_scores_paths(row.values, width=_CURVE[0], height=_CURVE[1]),
      size=_CURVE,
      lowest=unit.number(row.values[0]),
      highest=unit.number(row.values[-1]),
    ),
    note=note,
  )


def _neighbour_tile(neighbour: Neighbour, unit: Unit, noun: str) -> Tile:
  between = neighbour.model_std_error
  tile = Tile(
    neighbour.id,
    alt=f"training {noun} {neighbour.id}",
    score=unit.number(neighbour.score),
    error=unit.error(neighbour.std_error),
    between="" if math.isnan(between) else f"models {unit.error(between)}",
    label=neighbour.label or "",
  )
  return _with_picture(tile, neighbour.picture)


def _with_picture(tile: Tile, picture: np.ndarray | None) -> Tile:
  if picture is None:
    return tile
  sharp = max(picture.shape[:2]) < _SHARP_BELOW
  return dataclasses.replace(tile, png=png_bytes(picture), sharp=sharp)


def _costs(manifests: Mapping[str, Mapping]) -> Table:
  def row(name: str, cost: Mapping) -> tuple[str, ...]:
    seconds = cost["seconds"]
    time = clock(seconds) if seconds >= 10 else f"{seconds:.1f} s"
    return name, time, memory(cost["peak_host_mib"]), memory(cost["peak_device_mib"])

  return Table(
    header=("Stage", "Time", "Peak host memory", "Peak device memory"),
    rows=[row(name, manifest["cost"]) for name, manifest in manifests.items()],
  )


def _settings(config: Config) -> Table:
  """A row a field, named as on the command line; the model's fields stand beside its name."""
  sections = as_dict(config)
  sections["model"] |= sections["model"].pop("fields")
  return Table(("Field", "Value"), list(_fields(sections)), "Settings", folded=True)


def _fields(section: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
  for name, value in section.items():
    if isinstance(value, Mapping):
      yield from _fields(value, f"{path}{name}.")
    else:
      yield f"{path}{name}", _value(value)


def _value(value: Any) -> str:
  if value is None:
    return "not set"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return count(value)
  if isinstance(value, float):
    return f"{value:g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else scientific(value)
  if isinstance(value, list):
    return ", ".join(map(_value, value)) or "none"
  return str(value)


def _coverage(coverage: Coverage) -> Table:
  return Table(
    header=("Parameter", "Shape", "Count", "Block"),
    rows=[
      (
        row.parameter,
        " × ".join(map(str, row.shape)) or "scalar",
        count(math.prod(row.shape)),
        row.block or f"not covered: {row.reason}",
      )
      for row in coverage.rows
    ],
    caption=f"Curvature coverage – {coverage.summary()}",
    folded=True,
  )


def _software(manifests: Mapping[str, Mapping]) -> Table:
  """Versions, devices and revision; where stages differ, each value once."""
  stages = manifests.values()
  packages = dict.fromkeys(name for stage in stages for name in stage["versions"])
  rows = [("devices", _distinct(", ".join(stage["devices"]) for stage in stages))]
  rows += [("git revision", _distinct(stage["git_revision"] or "not recorded" for stage in stages))]
  rows += [
    (name, _distinct(stage["versions"][name] for stage in stages if name in stage["versions"]))
    for name in packages
  ]
  return Table(("Name", "Version"), rows, "Versions and devices", folded=True)


def _distinct(values: Iterable[str]) -> str:
  return "; ".join(dict.fromkeys(values))
