"""The stage that draws the answer, apart from the others: it alone takes matplotlib to load."""

from jaxinf.core.examples import Examples
from jaxinf.curvature.saving import coverage_from
from jaxinf.engine import artifacts
from jaxinf.engine.artifacts import Outcome
from jaxinf.report.rows import label_name
from jaxinf.report.run_page import write_report
from jaxinf.runs.latents import preparations
from jaxinf.runs.run import Run, load_scores
from jaxinf.runs.sampling import load_samples
from jaxinf.runs.stage import MAIN_LINE


def report(run: Run) -> Outcome:
  """Draws the page report/index.html."""
  line = (*preparations(run), *MAIN_LINE[:-1])
  manifests = {name: artifacts.read_manifest(run.folder(name)) for name in line}
  samples = load_samples(run, "pictures")
  files = write_report(
    run.folder("report"),
    config=run.config,
    dataset=run.dataset,
    samples=samples.data,
    scores=load_scores(run),
    coverage=coverage_from(manifests["curvature"]["notes"]),
    manifests=manifests,
    labels=_made_from(run, samples),
  )
  return {}, {"files": [path.name for path in files]}, " and ".join(path.name for path in files)


def _made_from(run: Run, samples: Examples) -> list[str] | None:
  """The class of each sample in words, where the model is given one."""
  given = samples.conditioning or {}
  if "labels" not in given:
    return None
  return [label_name(run.dataset, int(label)) for label in given["labels"]]
