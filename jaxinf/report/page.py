"""The page of a run: one self-contained HTML file, and its figure as PNG.

Everything shown is worked out here or below; the template page.html.j2 only arranges it.
"""

import base64
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from jaxinf.data.dataset import Dataset
from jaxinf.engine.artifacts import write_bytes
from jaxinf.engine.progress import clock
from jaxinf.layers.coverage import Coverage
from jaxinf.report.figures import TITLES, attribution_figure, png_bytes, sorted_scores_paths
from jaxinf.report.rows import Row, Unit, common_unit, explained_rows
from jaxinf.runs.config import as_dict
from jaxinf.runs.sections import Config
from jaxinf.scores.scores import Scores
from jaxinf.scores.support import SupportCheck, support_check

_CHECKED = 10  # supporting images in the check, fewer where there are not twice as many
_CURVE = {"width": 168.0, "height": 56.0}
_SHARP_BELOW = 128  # pixels; smaller images are enlarged without smoothing


def write_report(
  folder: Path,
  *,
  config: Config,
  dataset: Dataset,
  samples: np.ndarray,
  scores: Scores,
  coverage: Coverage,
  manifests: Mapping[str, Mapping],
) -> list[Path]:
  """Writes index.html and attributions.png into `folder`, each atomically.

  Args:
    folder: made where it does not exist.
    config: of the run; config.report says how much is shown.
    dataset: the training images.
    samples: [Q, H, W, C] float32 in [-1, 1], the queries.
    scores: of all samples and training images.
    coverage: which parameters the curvature covers.
    manifests: stage → manifest of its artefact, in the order of the run.

  Returns:
    The paths, the page first.

  Raises:
    ValueError: the scores belong to other samples or data, or config.report asks for more
      training images than there are.
  """
  rows = explained_rows(
    dataset, samples=samples, scores=scores,
    num_queries=config.report.num_queries, top_k=config.report.top_k,
  )  # fmt: skip
  unit = common_unit(rows)
  check = _check(scores, config.seed)
  page = _template().render(
    dataset=dataset.name,
    num_train=_count(len(dataset)),
    num_queries=len(samples),
    num_shown=len(rows),
    measurement=str(scores.settings["measurement"]).replace("_", " "),
    figures=_headline(dataset, scores, coverage),
    power=_power(unit.exponent) if unit.exponent else None,
    has_errors=not np.isnan(scores.std_errors).all(),
    example=_example(rows[0], len(dataset)),
    top_k=config.report.top_k,
    check=_check_text(check, unit, len(dataset)),
    trust=_trust(scores, manifests.get("attribute", {}).get("notes", {})),
    rows=[_row(row, unit, check, q) for q, row in enumerate(rows)],
    sharp=max(dataset.image_shape[:2]) < _SHARP_BELOW,
    curve=_CURVE,
    settings=_settings(config),
    coverage=_coverage(coverage),
    stages=[_stage(name, manifest) for name, manifest in manifests.items()],
    software=_software(manifests),
  )
  figure = attribution_figure(rows, unit)
  folder.mkdir(parents=True, exist_ok=True)
  files = {folder / "index.html": page.encode(), folder / "attributions.png": figure}
  for path, content in files.items():
    write_bytes(path, content)
  return list(files)


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxinf.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("page.html.j2")


def _headline(dataset: Dataset, scores: Scores, coverage: Coverage) -> list[tuple[str, str]]:
  settings, num_groups = scores.settings, len(scores.group_values)
  groups = f" in {num_groups} groups" if num_groups > 1 else ""
  return [
    ("Data set", dataset.name),
    ("Training images", _count(len(dataset))),
    ("Samples", _count(len(scores.query_ids))),
    ("Model parameters", _count(coverage.num_parameters)),
    ("Draws per image", f"{settings['draws']}{groups}"),
    ("Damping λ", _scientific(settings["damping"])),
  ]


def _example(row: Row, num_train: int) -> dict[str, str]:
  """What the first sample's highest score means: the predicted change of its measurement."""
  best = row.groups["supporting"][0]
  change = best.score / num_train
  verb = "raise" if change >= 0 else "lower"
  return {"train": best.id, "query": row.id, "verb": verb, "change": _scientific(abs(change))}


def _row(row: Row, unit: Unit, check: SupportCheck | None, q: int) -> dict[str, Any]:
  groups = [
    {
      "kind": kind,
      "title": title,
      "images": [
        {
          "src": _data_uri(n.image),
          "id": n.id,
          "label": n.label,
          "score": unit.number(n.score),
          "error": unit.error(n.std_error),
        }
        for n in row.groups[kind]
      ],
    }
    for kind, title in TITLES.items()
  ]
  return {
    "id": row.id,
    "src": _data_uri(row.image),
    "groups": groups,
    "paths": sorted_scores_paths(row.values, **_CURVE),
    "lowest": unit.number(row.values[0]),
    "highest": unit.number(row.values[-1]),
    "check": None if check is None else _comparison(check, unit, q),
  }


def _check(scores: Scores, seed: int) -> SupportCheck | None:
  num_train = len(scores.train_ids)
  if num_train < 2:
    return None
  return support_check(scores, k=min(_CHECKED, num_train // 2), seed=seed)


def _comparison(check: SupportCheck, unit: Unit, q: int) -> dict[str, str]:
  z = check.z[q]
  return {
    "difference": unit.with_error(check.differences[q], check.std_errors[q]),
    "z": f"{z:.1f}".replace("-", "−") if math.isfinite(z) else "undefined",
  }


def _check_text(check: SupportCheck | None, unit: Unit, num_train: int) -> dict[str, Any]:
  if check is None:
    return {"missing": "one training image" if num_train < 2 else "one group of draws"}
  mean, std_error = check.mean_difference, check.mean_std_error
  return {
    "missing": None,
    "k": check.k,
    "is_clipped": check.k < _CHECKED,
    "difference": unit.with_error(mean, std_error),
    "has_mean_error": not math.isnan(std_error),
    "num_clear": check.num_clear,
    "chance": f"{check.chance_of_clear:.0%}",
    "repeats": check.repeats,
  }


def _trust(scores: Scores, notes: Mapping[str, Any]) -> list[str]:
  """What is known of the order of the scores, and of what compression does to it."""
  lines = []
  if "stability" in notes:
    lines.append(f"How far down the order of the training images holds: {notes['stability']}.")
  if "recommended_damping" in notes:
    lines.append(
      f"Of the dampings in attribute.sweep and the one shown, λ = {notes['recommended_damping']:g} "
      "is recommended: the least whose scores are about as faithful as the best, as far as can be "
      "told without retraining."
    )
  check = scores.settings.get("check")
  if check and check["spearman"] is not None:
    lines.append(
      f"Against float32 queries, on {check['num_examples']} of the training images, the scores' "
      f"rank correlation is {check['spearman']:.4f} (least of {check['num_queries']}: "
      f"{check['least_spearman']:.4f})."
    )
  return lines


def _settings(config: Config) -> dict[str, list[tuple[str, str]]]:
  """Section → (field, value); the model's fields stand beside its name."""
  sections = as_dict(config)
  sections["model"] |= sections["model"].pop("fields")
  loose = {name: value for name, value in sections.items() if not isinstance(value, Mapping)}
  own = {name: value for name, value in sections.items() if name not in loose}
  return {
    name: [(field, _value(value)) for field, value in section.items()]
    for name, section in ({"run": loose} | own).items()
  }


def _value(value: Any) -> str:
  if value is None:
    return "not set"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return _count(value)
  if isinstance(value, float):
    return f"{value:g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else _scientific(value)
  if isinstance(value, list):
    return ", ".join(map(_value, value)) or "none"
  return str(value)


def _coverage(coverage: Coverage) -> dict[str, Any]:
  rows = [
    {
      "parameter": row.parameter,
      "shape": " × ".join(map(str, row.shape)) or "scalar",
      "count": _count(math.prod(row.shape)),
      "block": row.block or f"not covered: {row.reason}",
      "is_skipped": row.block in (None, "skipped"),
    }
    for row in coverage.rows
  ]
  return {"summary": coverage.summary(), "rows": rows}


def _stage(name: str, manifest: Mapping) -> dict[str, str]:
  cost = manifest["cost"]
  return {
    "name": name,
    "time": clock(cost["seconds"]) if cost["seconds"] >= 10 else f"{cost['seconds']:.1f} s",
    "host": _memory(cost["peak_host_mib"]),
    "device": _memory(cost["peak_device_mib"]),
  }


def _software(manifests: Mapping[str, Mapping]) -> list[tuple[str, str]]:
  """Versions, devices and revision; where stages differ, each value once."""
  stages = manifests.values()
  packages = dict.fromkeys(name for stage in stages for name in stage["versions"])
  rows = [("devices", _distinct(", ".join(stage["devices"]) for stage in stages))]
  rows += [("git revision", _distinct(stage["git_revision"] or "not recorded" for stage in stages))]
  return rows + [
    (name, _distinct(stage["versions"][name] for stage in stages if name in stage["versions"]))
    for name in packages
  ]


def _distinct(values: Iterable[str]) -> str:
  return "; ".join(dict.fromkeys(values))


def _data_uri(image: np.ndarray) -> str:
  return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _count(number: int) -> str:
  return f"{number:,}"


def _memory(mib: float | None) -> str:
  if mib is None:
    return "–"
  return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def _scientific(value: float) -> str:
  """0.00012 as `1.2 × 10⁻⁴`; numbers between 0.01 and 1000 as they are."""
  if value == 0 or 1e-2 <= abs(value) < 1e3:
    return f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"
  digits, exponent = f"{value:.1e}".split("e")
  digits = digits.removesuffix(".0")
  return _power(int(exponent)) if digits == "1" else f"{digits} × {_power(int(exponent))}"


def _power(exponent: int) -> str:
  return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
