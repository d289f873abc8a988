"""What can be asked of a run, by name."""

import functools
from collections.abc import Callable
from typing import Any

from jaxinf import planning, proof, serving, stages
from jaxinf.proof.studies import EVERY, STUDIES, study
from jaxinf.runs import Run

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
  "retrain": proof.retrain,
  "measure": proof.measure,
  "evaluate": proof.evaluate,
  "benchmark": proof.benchmark,
  "counterfactual": proof.counterfactual,
  **{f"study {name}": functools.partial(study, name=name) for name in (*STUDIES, EVERY)},
}
