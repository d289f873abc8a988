"""Attributes samples of a diffusion model to its training images.

  python -m jaxinf STAGE --config=configs/digits.py --workdir=DIR [--config.train.steps=…]

Stages, in order:
  train      train the model; checkpoints, metrics.jsonl and TensorBoard events on the way
  sample     generate the samples to be explained
  curvature  fit the K-FAC curvature over all training images
  attribute  score every training image for every sample
  report     draw DIR/report/index.html
  all        all of these; finished stages are reused

Any field of the config can be set on the command line, as --config.attribute.damping=1e-6.
"""

import logging
import sys
from pathlib import Path

import absl.logging
from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's artefacts.")


def main(argv: list[str]) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)  # the libraries'; ours follow
  _speak()
  from jaxinf import config, stages  # slow to import, so after the flags are parsed

  try:
    stage = _stage_name(argv, list(stages.STAGES))
    run = stages.Run(config.typed(_CONFIG.value), Path(_WORKDIR.value))
    stages.STAGES[stage](run)
  except ValueError as error:
    sys.exit(f"jaxinf: {error}")


def _speak() -> None:
  """Shows jaxinf's own messages, plain, on standard error."""
  log = logging.getLogger("jaxinf")
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(message)s"))
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  log.propagate = False


def _stage_name(argv: list[str], names: list[str]) -> str:
  if len(argv) != 2 or argv[1] not in names:
    got = " ".join(argv[1:]) or "none"
    raise ValueError(f"Name one stage of {', '.join(names)}; got {got}. See --help.")
  for flag in (_CONFIG, _WORKDIR):
    if flag.value is None:
      raise ValueError(f"--{flag.name} is missing. See --help.")
  return argv[1]


def run() -> None:
  """The console script `jaxinf`."""
  app.run(main)


if __name__ == "__main__":
  run()
