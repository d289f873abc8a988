"""Attributes samples of a diffusion model to its training images.

  python -m jaxinf STAGE --config=configs/digits.py --workdir=DIR [--config.train.steps=…]

Any field of the config can be set on the command line, as --config.attribute.damping=1e-6.

Over several processes, say one a host, start this in each with the same arguments and a shared
workdir, and with --coordinator=HOST:PORT --num_processes=N --process_id=I (I = 0, on HOST, to
N − 1); or with --distributed alone, where SLURM, Open MPI or a TPU pod tells these. The first
process writes the files and speaks.
"""

import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from jaxinf.core.registry import named
from jaxinf.engine import processes
from jaxinf.runs.config import refusal, typed
from jaxinf.runs.perform import perform
from jaxinf.runs.run import ADDRESS, Run
from jaxinf.runs.stage import STAGES, Stage, listing


def _stages(chosen: Callable[[Stage], bool]) -> str:
  """Those stages in words."""
  names = [stage.name for stage in STAGES.values() if chosen(stage)]
  return f"the stage{'s' * (len(names) > 1)} {', '.join(names)}"


def _reading(flag: str) -> str:
  return _stages(lambda stage: flag in stage.flags)


_DRY_RUNS = _stages(lambda stage: bool(stage.dry_run))

# The file locks its config, but for `model`, which takes the fields of any model's class.
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The experiment, such as configs/digits.py.",
  lock_config=False,
  accept_new_attributes=True,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry-run", False, f"With {_DRY_RUNS}: print what it would take in memory, and stop."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run's artefacts; not needed to plan."
)
_IMAGES = flags.DEFINE_string(
  "images", None, f"An .npz file or folder of images, for {_reading('images')}."
)
_IDS = flags.DEFINE_list("ids", [], f"Ids of training images, for {_reading('ids')}.")
_TRUTH = flags.DEFINE_string(
  "truth",
  None,
  f"What to judge scores by, for {_reading('truth')}: the name of a truth of the package, all, or "
  "the folder of one.",
)
_SCORES = flags.DEFINE_string(
  "scores",
  None,
  "The scores to judge: an .npz file with values [samples, images], query_ids and train_ids, or "
  "the folder of scores of jaxinf's own.",
)
_SHARD = flags.DEFINE_string(
  "shard",
  "0/1",
  "i/n: of the models to retrain, this process trains the i-th (from 0) of n parts; for "
  f"{_reading('shard')}.",
)
_HOST = flags.DEFINE_string(
  "host",
  ADDRESS[0],
  f"The address to listen on, for {_reading('host')}; others than this machine "
  "reach it where it is not a loopback address.",
)
_PORT = flags.DEFINE_integer(
  "port", ADDRESS[1], f"Its port, for {_reading('port')}; 0: any that is free."
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
      stage, *words = _stage(argv)
      if _TRUTH.value is not None:
        scores = None if _SCORES.value is None else Path(_SCORES.value)
        print(pkgutil.resolve_name(stage.of_truth)(_TRUTH.value, scores))
        return
      run = _run(stage)
      _connect()
      _speak()
      if _DRY_RUN.value:
        print(pkgutil.resolve_name(stage.dry_run)(run))
      else:
        perform(run, stage.name, *words)
    except ValueError as error:
      sys.exit(f"jaxinf: {error}")


def _stage(argv: list[str]) -> tuple[Stage, *tuple[str, ...]]:
  """The stage that the first word names, and the words that follow as it takes them."""
  if len(argv) < 2:
    raise ValueError(f"Name a stage: {', '.join(STAGES)}. See --help.")
  stage, words = named(STAGES, argv[1], "stage"), argv[2:]
  if words and (not stage.takes or len(words) > 1):
    raise ValueError(f"Too many words: {' '.join(argv[1:])}. See --help.")
  if _DRY_RUN.value and not stage.dry_run:
    raise ValueError(f"--dry-run goes with {_DRY_RUNS}.")
  for flag in (_IMAGES, _IDS, _SHARD, _TRUTH, _SCORES, _HOST, _PORT):
    if flag.value != flag.default and flag.name not in stage.flags:
      raise ValueError(f"--{flag.name} goes with {_reading(flag.name)}.")
  if _SCORES.value is not None and _TRUTH.value is None:
    raise ValueError("--scores goes with --truth, which they are judged by. See --help.")
  if _TRUTH.value is not None and (_CONFIG.value is not None or _WORKDIR.value is not None):
    raise ValueError("--truth takes the place of --config and --workdir: leave these out.")
  return stage, *words


def _run(stage: Stage) -> Run:
  """The run that the flags describe; planning needs no folder."""
  return Run(
    typed(_required(_CONFIG)),
    Path((_WORKDIR.value or ".") if stage.name == "plan" else _required(_WORKDIR)),
    images=Path(_IMAGES.value) if _IMAGES.value else None,
    ids=tuple(_IDS.value),
    shard=_shard(),
    address=(_HOST.value, _PORT.value),
  )


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
    rest = app.parse_flags_with_usage(argv)
    _ = _CONFIG.value and _CONFIG.value.keys()  # a file that was not found is an error from here on
  except (AttributeError, KeyError) as error:
    sys.exit(f"jaxinf: {refusal(error)}")
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


def _required(flag: flags.FlagHolder) -> Any:
  if flag.value is None:
    raise ValueError(f"--{flag.name} is missing. See --help.")
  return flag.value


def run() -> None:
  """The console script `jaxinf`."""
  sys.path.insert(0, os.getcwd())  # as `python -m` does: configs import one another
  sys.modules["__main__"].__doc__ = f"{__doc__}\n{listing()}\n"  # what --help shows
  app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
  run()
