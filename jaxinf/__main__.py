"""Attributes samples of a diffusion model to its training images.

  python -m jaxinf STAGE --config=configs/digits.py --workdir=DIR [--config.train.steps=…]

Stages, in order:
  plan       tell what each of them will take here: time, memory and disk (not part of all)
  train      train the model; checkpoints, metrics.jsonl and TensorBoard events on the way
  sample     generate the samples to be explained
  curvature  fit the K-FAC curvature over all training images
  curvature-study  compare approximations of the curvature with the exact one (not part of all)
  compress-study   compare compressions of the query gradients (not part of all)
  attribute  score every training image for every sample
  report     draw DIR/report/index.html
  all        all of these; finished stages are reused

On a store of training gradients, which answers new queries without a pass over the training images:
  index         compute the gradients of all training images, and keep them in DIR/index/store
  query         score --images=new.npz (or a folder), at any config.query.damping
  index-append  add --images as training images
  index-delete  delete training images by --ids=ID,ID
  index-verify  read everything and compare the checksums

The proof by retraining, after train and sample:
  retrain         train models on random subsets of the training images, here the part --shard=i/n
  measure         take the true measurements of the samples by each of these models
  evaluate        score by every method, and tell how well each predicts the measurements
  benchmark       all of these, train and sample among them
  counterfactual  retrain without the images that each method calls most supporting
  study NAME      draw one of the paper's figures into DIR/study/NAME/; study all puts those that
                  are there on one page, and any other NAME lists the names

Any field of the config can be set on the command line, as --config.attribute.damping=1e-6.
--dry-run with the stage curvature prints what it takes in memory, layer by layer.

Over several processes, say one a host, start this in each with the same arguments and a shared
workdir, and with --coordinator=HOST:PORT --num_processes=N --process_id=I (I = 0, on HOST, to
N − 1); or with --distributed alone, where SLURM, Open MPI or a TPU pod tells these. The first
process writes the files and speaks.
"""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from jaxinf.engine import processes
from jaxinf.runs import studies
from jaxinf.runs.commands import COMMANDS
from jaxinf.runs.config import check_path, typed
from jaxinf.runs.run import Run

# Unlocked for new attributes, which `typed` refuses in words that name the valid ones.
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The experiment, such as configs/digits.py.",
  lock_config=False,
  accept_new_attributes=True,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry-run", False, "With the stage curvature: print what it would take in memory, and stop."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run's artefacts; not needed to plan."
)
_IMAGES = flags.DEFINE_string(
  "images", None, "An .npz file or folder of images, for the stages query and index-append."
)
_IDS = flags.DEFINE_list("ids", [], "Ids of training images, for the stage index-delete.")
_SHARD = flags.DEFINE_string(
  "shard", "0/1", "i/n: of the models to retrain, this process trains the i-th (from 0) of n parts."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, free there.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Several processes, which the cluster's variables tell of one another."
)


def main(argv: list[str]) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)  # the libraries'; ours follow
  with processes.ending_together():
    try:
      stage = _stage_name(argv, list(COMMANDS))
      images = Path(_IMAGES.value) if _IMAGES.value else None
      workdir = Path((_WORKDIR.value or ".") if stage == "plan" else _required(_WORKDIR))
      if _SHARD.value != "0/1" and stage not in ("retrain", "counterfactual"):
        raise ValueError("--shard goes with the stages retrain and counterfactual.")
      run = Run(
        typed(_required(_CONFIG)), workdir, images=images, ids=tuple(_IDS.value), shard=_shard()
      )
      _connect()
      _speak()
      if not _DRY_RUN.value:
        COMMANDS[stage](run)
      elif stage == "curvature":
        print(studies.curvature_memory(run))
      else:
        raise ValueError("--dry-run goes with the stage curvature.")
    except ValueError as error:
      sys.exit(f"jaxinf: {error}")


def _connect() -> None:
  """Joins the other processes, where there are any."""
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _DISTRIBUTED.value and given != (None, None, None):
    raise ValueError(
      "--distributed leaves --coordinator, --num_processes and --process_id to the cluster's "
      "variables: give it alone, or the three without it."
    )
  if _DISTRIBUTED.value or given != (None, None, None):
    processes.connect(*given)


def _parse_flags(argv: list[str]) -> list[str]:
  """The arguments that are no flags; unknown fields and files end in one line, not a traceback."""
  try:
    for argument in argv[1:]:
      if field := re.match(r"--?(?:no)?config\.([^=]*)", argument):
        check_path(field[1])
    rest = app.parse_flags_with_usage(argv)
    _ = _CONFIG.value and _CONFIG.value.keys()  # a file that was not found is an error from here on
  except ValueError as error:
    sys.exit(f"jaxinf: {error}")
  except ImportError as error:
    sys.exit(f"jaxinf: --config cannot be read: {error}. Run from the folder that holds configs/.")
  except OSError as error:
    sys.exit(f"jaxinf: --config cannot be read: {str(error).splitlines()[-1].strip()}")
  return rest


def _speak() -> None:
  """Shows jaxinf's own messages, plain, on standard error; of the primary but warnings only."""
  log = logging.getLogger("jaxinf")
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(message)s"))
  log.addHandler(handler)
  log.setLevel(logging.INFO if processes.is_primary() else logging.WARNING)
  log.propagate = False


def _shard() -> tuple[int, int]:
  found = re.fullmatch(r"(\d+)/(\d+)", _SHARD.value)
  if not found or not int(found[1]) < int(found[2]):
    raise ValueError(f"--shard is i/n with 0 ≤ i < n, such as 0/2; got {_SHARD.value}.")
  return int(found[1]), int(found[2])


def _stage_name(argv: list[str], names: list[str]) -> str:
  """The stage that the words name: one, or two as in `study lds`."""
  given = " ".join(argv[1:])
  if given in names:
    return given
  what, of = "stage", [name for name in names if " " not in name] + ["study NAME"]
  if argv[1:2] == ["study"]:
    what, of = "study", [name.partition(" ")[2] for name in names if " " in name]
    given = " ".join(argv[2:])
  raise ValueError(f"Name one {what} of {', '.join(of)}; got {given or 'none'}. See --help.")


def _required(flag: flags.FlagHolder) -> Any:
  if flag.value is None:
    raise ValueError(f"--{flag.name} is missing. See --help.")
  return flag.value


def run() -> None:
  """The console script `jaxinf`."""
  sys.path.insert(0, os.getcwd())  # as `python -m` does: configs import one another
  app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
  run()
