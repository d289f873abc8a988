"""What can be asked of a run, by name."""

import functools
from collections.abc import Callable
from typing import Any

from jaxinf import benchmark, planning
from jaxinf.benchmark.figures import EVERY, STUDIES, study
from jaxinf.runs import serving, stages
from jaxinf.runs.run import Run

COMMANDS: dict[str, Callable[[Run], Any]] = {
  "plan": planning.show,
  "train": stages.train,
  "sample": stages.sample,
  "curvature": stages.curvature,
  "curvature-study": stages.curvature_study,
  "compress-study": stages.compress_study,
  "attribute": stages.attribute,
  "report": stages.report,
  "all": stages.everything,
  "index": stages.index,
  "index-append": serving.append,
  "index-delete": serving.delete,
  "index-verify": serving.verify,
  "query": serving.query,
  "retrain": benchmark.retrain,
  "measure": benchmark.measure,
  "evaluate": benchmark.evaluate,
  "benchmark": benchmark.benchmark,
  "counterfactual": benchmark.counterfactual,
  **{f"study {name}": functools.partial(study, name=name) for name in (*STUDIES, EVERY)},
}
