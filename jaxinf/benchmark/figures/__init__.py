"""The figures of the paper's evaluation, each `python -m jaxinf study NAME` on any config.

Names stand in STUDIES at the foot: a function from a run to what it drew. It loads what the stages
of a proof left, and computes what it needs besides. A study is made anew each time; the scores and
measurements below it are kept.
"""

import logging
from collections.abc import Callable

from jaxinf.benchmark.figures import bars, observations, sweeps
from jaxinf.benchmark.figures.common import Drawn
from jaxinf.benchmark.retraining import folder
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import write_bytes
from jaxinf.engine.progress import clock
from jaxinf.engine.resources import measured
from jaxinf.report.page import Figure, Section, Table, write_page
from jaxinf.runs.config import as_dict
from jaxinf.runs.run import Run

__all__ = ["EVERY", "STUDIES", "study"]

_LOG = logging.getLogger("jaxinf")

EVERY = "all"  # puts the studies that are there on one page


def study(run: Run, name: str) -> None:
  """Draws one study into workdir/study/NAME/, or with `all` those that are there on one page.

  Raises:
    ValueError: there is no study of that name, or it lacks what it is made of.
  """
  if name == EVERY:
    _collect(run)
    return
  if name not in STUDIES:
    raise ValueError(f"Unknown study {name!r}; there are: {', '.join((*STUDIES, EVERY))}.")
  place = folder(run, "study") / name
  with measured() as cost:
    drawn = STUDIES[name](run)
  shown = dict(title=drawn.title, caption=drawn.caption, made=drawn.made,
               header=drawn.header, rows=drawn.rows)  # fmt: skip
  key = {"study": name, "settings": as_dict(run.config.study), **drawn.inputs}
  place.mkdir(parents=True, exist_ok=True)
  write_bytes(place / "figure.png", drawn.figure)
  artifacts.write(place, key, drawn.arrays, notes={**drawn.notes, "shown": shown}, cost=cost)
  write_page(place, drawn.title, [_section(run, name)])
  print(drawn.caption)
  _LOG.info("study: %s in %s; wrote %s", name, clock(cost["seconds"]), place / "index.html")


def _collect(run: Run) -> None:
  """One page of the studies that are there, in the order of STUDIES."""
  root = folder(run, "study")
  names = [name for name in STUDIES if (root / name / "manifest.json").exists()]
  if not names:
    raise ValueError(
      f"{root} holds no study yet: draw some of {', '.join(STUDIES)} first, each by its name."
    )
  title = f"What retraining says about attribution: {run.dataset.name}"
  write_page(root, title, [_section(run, name) for name in names])
  _LOG.info("study: wrote %s with %s", root / "index.html", ", ".join(names))


def _section(run: Run, name: str) -> Section:
  """A finished study as a page shows it."""
  place = folder(run, "study") / name
  shown = artifacts.read_manifest(place)["notes"]["shown"]
  figure = Figure((place / "figure.png").read_bytes(), shown["title"], shown["caption"])
  table = Table(shown["header"], shown["rows"], "The numbers", folded=True)
  return Section(shown["title"], name, figures=[figure], tables=[table], note=shown["made"])


STUDIES: dict[str, Callable[[Run], Drawn]] = {
  "lds": bars.lds,
  "trajectory": bars.trajectory,
  "counterfactual": bars.counterfactual,
  "hessian": sweeps.hessian,
  "damping": sweeps.damping,
  "half-precision": sweeps.half_precision,
  "timesteps": observations.timesteps,
  "timesteps-half": observations.timesteps_half,
  "changes": observations.changes,
  "correlation": observations.correlation,
  "weights": observations.weights,
}
