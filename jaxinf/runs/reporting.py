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
  """What each sample was made from in words, its class and its caption, where there are such."""
  given, captions = samples.conditioning or {}, artifacts.read(run.folder("sample")).arrays
  parts = []
  if "labels" in given:
    parts.append([label_name(run.dataset, int(label)) for label in given["labels"]])
  if "captions" in captions:
    parts.append(captions["captions"].tolist())
  return [", ".join(words) for words in zip(*parts, strict=True)] if parts else None
