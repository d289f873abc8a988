"""The figures of the paper's evaluation, each `python -m jaxinf study NAME` on any config.

Names stand in STUDIES at the foot: a function from a run to numbers, and the figure of them. It
loads what the stages of a proof left, and computes what it needs besides. A study is made anew each
time; the scores and measurements below it are kept.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinf.benchmark.figures import bars, observations, sweeps
from jaxinf.benchmark.figures.common import Numbers
from jaxinf.benchmark.retraining import folder
from jaxinf.core.registry import named
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import write_bytes
from jaxinf.engine.progress import clock
from jaxinf.engine.resources import measured
from jaxinf.report.method_figures import bars_figure, counterfactual_figure, sweeps_figure
from jaxinf.report.observation_figures import changes_figure, heatmaps_figure, weights_figure
from jaxinf.report.page import Figure, Section, Table, write_page
from jaxinf.runs.run import Run, own_settings

__all__ = ["EVERY", "STUDIES", "Study", "study"]

_LOG = logging.getLogger("jaxinf")

EVERY = "all"  # puts the studies that are there on one page


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: what it finds, and the PNG of `Numbers.shown`."""

  numbers: Callable[[Run], Numbers]
  figure: Callable[..., bytes]


def study(run: Run, name: str = "") -> None:
  """Makes one study in workdir/study/NAME/, or with `all` one page of those that are there.

  Raises:
    ValueError: there is no study of that name, or it lacks what it is made of.
  """
  if name == EVERY:
    _collect(run)
    return
  of = named(STUDIES, name, "study")
  with measured() as cost:
    found = of.numbers(run)
    figure = of.figure(**found.shown)
  place = folder(run, "study") / name
  key = {"study": name, "settings": own_settings(run, "study"), **found.inputs}
  page = {field: getattr(found, field) for field in ("title", "caption", "header", "rows", "made")}
  place.mkdir(parents=True, exist_ok=True)
  write_bytes(place / "figure.png", figure)
  artifacts.write(place, key, found.arrays, notes={**found.notes, "shown": page}, cost=cost)
  _write_page(place, found.title, run, [name])
  print(found.caption)
  _LOG.info("study: %s in %s; open %s", name, clock(cost["seconds"]), place / "index.html")


def _collect(run: Run) -> None:
  """One page of the studies that are there, in the order of STUDIES."""
  root = folder(run, "study")
  names = [name for name in STUDIES if artifacts.has_manifest(root / name)]
  if not names:
    raise ValueError(
      f"{root} holds no study yet: draw some of {', '.join(STUDIES)} first, each by its name."
    )
  _write_page(root, f"What retraining says about attribution: {run.dataset.name}", run, names)
  _LOG.info("study: %s; open %s", ", ".join(names), root / "index.html")


def _write_page(place: Path, title: str, run: Run, names: Sequence[str]) -> None:
  """The page of finished studies."""
  sections = []
  for name in names:
    own = folder(run, "study") / name
    shown = artifacts.read_manifest(own)["notes"]["shown"]
    figure = Figure((own / "figure.png").read_bytes(), shown["title"], shown["caption"])
    table = Table(shown["header"], shown["rows"], "The numbers", folded=True)
    note = shown["made"]
    sections.append(Section(shown["title"], name, figures=[figure], tables=[table], note=note))
  write_page(place, title, sections)


STUDIES: dict[str, Study] = {
  "lds": Study(bars.lds, bars_figure),
  "trajectory": Study(bars.trajectory, bars_figure),
  "counterfactual": Study(bars.counterfactual, counterfactual_figure),
  "hessian": Study(sweeps.hessian, bars_figure),
  "damping": Study(sweeps.damping, sweeps_figure),
  "half-precision": Study(sweeps.half_precision, sweeps_figure),
  "timesteps": Study(observations.timesteps, heatmaps_figure),
  "timesteps-half": Study(observations.timesteps_half, heatmaps_figure),
  "changes": Study(observations.changes, changes_figure),
  "correlation": Study(observations.correlation, heatmaps_figure),
  "weights": Study(observations.weights, weights_figure),
}
