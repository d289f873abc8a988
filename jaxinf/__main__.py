"""jaxinf STAGE --config=digits --workdir=DIR [--config.train.steps=…]

Attributes samples of a diffusion model to its training images. --config is the name of a config
that comes with jaxinf, or the path of one. Any of its fields can be set on the command line, as
--config.attribute.damping=1e-6.

Over several processes, say one a host, start this in each with the same arguments and a shared
workdir, and with --coordinator=HOST:PORT --num_processes=N --process_id=I (I = 0, on HOST, to
N − 1); or with --distributed alone, where SLURM, Open MPI or a TPU pod tells these. The first
process writes the files and speaks.
"""

import contextlib
import io
import logging
import os
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from jaxinf.core.registry import named
from jaxinf.engine import processes
from jaxinf.runs import help as helps
from jaxinf.runs.config import refusal, typed
from jaxinf.runs.config_files import arranged
from jaxinf.runs.perform import perform
from jaxinf.runs.run import ADDRESS, Run
from jaxinf.runs.stage import STAGES, Stage


def _stages(chosen: Callable[[Stage], bool]) -> str:
  """Those stages in words."""
  names = [stage.name for stage in STAGES.values() if chosen(stage)]
  return f"the stage{'s' * (len(names) > 1)} {', '.join(names)}"


def _reading(flag: str) -> str:
  return _stages(lambda stage: flag in stage.flags)


_DRY_RUNS = _stages(lambda stage: bool(stage.dry_run) or "dry-run" in stage.flags)

# The file locks its config, but for `model`, which takes the fields of any model's class.
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The experiment: the name of a config, such as digits, or a file, such as my_config.py.",
  lock_config=False,
  accept_new_attributes=True,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry-run", False, f"With {_DRY_RUNS}: print what it would take in memory, or remove, and stop."
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
_JSON = flags.DEFINE_bool(
  "json", False, f"What is found as JSON on standard output, of {_reading('json')}."
)
_DATA = flags.DEFINE_string(
  "data", "folder", "The data set of a new config, one of jaxinf.data.DATASETS."
)
_PATH = flags.DEFINE_string("path", None, "Where the data of a new config lie.")
_STALE = flags.DEFINE_bool(
  "stale", False, f"For {_reading('stale')}: stale results go too, finished as they are."
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


_FLAGS = (
  _CONFIG, _WORKDIR, _IMAGES, _IDS, _TRUTH, _SCORES, _SHARD, _DRY_RUN, _JSON, _DATA, _PATH, _STALE,
  _HOST, _PORT, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _DISTRIBUTED,
)  # fmt: skip

# What stages that are of no run are given of their flags.
_GIVEN: dict[str, Callable[[], Any]] = {
  "workdir": lambda: Path(_required(_WORKDIR)),
  "config": lambda: None if _CONFIG.value is None else typed(_CONFIG.value),
  "json": lambda: _JSON.value,
  "data": lambda: _DATA.value,
  "path": lambda: _PATH.value,
  "stale": lambda: _STALE.value,
  "dry-run": lambda: _DRY_RUN.value,
}


def main(argv: list[str]) -> None:
  # Of other libraries only errors: TFDS, Orbax and others tell of buckets, caches and shards that
  # nobody asked for. What JAX says of the devices that it finds stays.
  absl.logging.set_verbosity(absl.logging.ERROR)
  with processes.ending_together():
    try:
      stage, *words = _stage(argv)
      if _TRUTH.value is not None:
        scores = None if _SCORES.value is None else Path(_SCORES.value)
        print(pkgutil.resolve_name(stage.of_truth)(_TRUTH.value, scores))
        return
      if not stage.of_run:
        given = {flag.replace("-", "_"): _GIVEN[flag]() for flag in stage.flags}
        print(stage.function(*words, **given))
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
  if stage.takes and not words and not stage.of_run:
    raise ValueError(f"A word is missing: jaxinf {stage.name} {stage.takes}. See --help.")
  read = helps.flags_of(stage)
  if _DRY_RUN.value and "dry-run" not in read:
    raise ValueError(f"--dry-run goes with {_DRY_RUNS}.")
  for flag in (_IMAGES, _IDS, _SHARD, _TRUTH, _SCORES, _JSON, _DATA, _PATH, _STALE, _HOST, _PORT):
    if flag.value != flag.default and flag.name not in read:
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
    as_json=_JSON.value,
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
    sys.argv = [argv[0], *arranged(argv[1:])]  # where ml_collections looks for changed fields
    rest = flags.FLAGS(sys.argv)
    _ = _CONFIG.value and _CONFIG.value.keys()  # a file that was not found is an error from here on
  except (AttributeError, KeyError) as error:
    sys.exit(f"jaxinf: {refusal(error)}")
  except flags.Error as error:
    *before, line = str(error).strip().splitlines()
    # A traceback comes before the line where a config itself raises.
    sys.exit(f"jaxinf: --config raises {line}" if before else f"jaxinf: {line} See --help.")
  except ValueError as error:
    sys.exit(f"jaxinf: {error}")
  except ImportError as error:
    sys.exit(
      f"jaxinf: --config cannot be read: {error}. Configs that come with jaxinf are imported as in "
      "`from jaxinf.configs import digits`."
    )
  except SyntaxError as error:
    sys.exit(f"jaxinf: --config cannot be read: {error}.")
  except OSError as error:
    sys.exit(f"jaxinf: --config cannot be read: {str(error).splitlines()[-1].strip()}")
  except Exception as error:  # whatever a config, which is a program, may raise
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename}, line {where.lineno}"
    sys.exit(f"jaxinf: --config raises {type(error).__name__}: {error} ({place})")
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


def _asked_for_help(words: Sequence[str]) -> str | None:
  """What --help shows, of the stage where one is named; None where help is not asked for."""
  if not {"--help", "-h", "-help", "--helpshort"} & set(words):
    return None
  meanings = {flag.name: str(flags.FLAGS[flag.name].help) for flag in _FLAGS}
  names = [word for word in words if not word.startswith("-")]
  if not names:
    return helps.overview(__doc__, meanings)
  return helps.of_stage(named(STAGES, names[0], "stage"), meanings)


def _settle() -> None:
  """Streams that replace what their encoding lacks, and warnings of jaxinf alone.

  What Python is told of warnings, by -W or PYTHONWARNINGS, holds.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      with contextlib.suppress(io.UnsupportedOperation):
        stream.reconfigure(errors="replace")
  if not sys.warnoptions:
    warnings.filterwarnings("ignore", module=r"(?!jaxinf\b)")


def run() -> None:
  """The console script `jaxinf`."""
  _settle()
  sys.path.insert(0, os.getcwd())  # as `python -m` does: configs import one another
  try:
    shown = _asked_for_help(sys.argv[1:])
  except ValueError as error:
    sys.exit(f"jaxinf: {error}")
  try:
    if shown is None:
      app.run(main, flags_parser=_parse_flags)
    else:
      print(shown, flush=True)
  except BrokenPipeError:  # who read it has enough, as in `jaxinf --help | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  run()
