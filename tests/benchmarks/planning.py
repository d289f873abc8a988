"""What `jaxinf plan` says that the stages take, and what they take, as a table.

  make bench-plan
  make bench-plan ARGS="--rounds=2 --config=digits"   # a config of configs/
  make bench-plan ARGS="--line=benchmark"             # the proof's stages, which take long

Each round plans and then runs the stages in processes of their own, one after the other, so that
neither finds anything compiled. On a shared machine compare the rounds before the ratios.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import absl.logging
from absl import app, flags

from jaxinf import planning
from jaxinf.runs.config import typed
from jaxinf.runs.run import Run

_CONFIG = flags.DEFINE_string("config", "digits", "Name of a config in configs/.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Plans, each followed by a run.")
_LINE = flags.DEFINE_enum("line", "all", ["all", "benchmark"], "What is planned and run.")
_ROUND = flags.DEFINE_string("plan_to", None, "For our own processes: plan, and write it there.")


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  if _ROUND.value:
    write_plan(Path(_ROUND.value))
    return
  for number in range(1, _ROUNDS.value + 1):
    with tempfile.TemporaryDirectory() as folder:
      one_round(number, Path(folder))


def one_round(number: int, folder: Path) -> None:
  """Plans, runs and compares."""
  file, workdir = folder / "plan.json", folder / "run"
  began = time.perf_counter()
  options = (f"--config={_CONFIG.value}", f"--line={_LINE.value}")
  _python("tests.benchmarks.planning", *options, f"--plan_to={file}")
  planning_seconds = time.perf_counter() - began
  found = json.loads(file.read_text())
  took = {}
  for stage in ("all", "index") if _LINE.value == "all" else found:
    began = time.perf_counter()
    _python("jaxinf", stage, f"--config=configs/{_CONFIG.value}.py", f"--workdir={workdir}")
    took[stage] = time.perf_counter() - began
  print(
    f"\nRound {number}: seconds, and MiB on the disk; planning took {planning_seconds:.0f} s.\n"
  )
  print("| stage | predicted s | actual s | ratio | predicted MiB | actual MiB | ratio |")
  print("| --- | --: | --: | --: | --: | --: | --: |")
  total = {"predicted": 0.0, "actual": 0.0}
  for stage, (seconds, disk) in found.items():
    manifest = workdir / stage / "manifest.json"
    # Stages that keep no artefact of their own are timed from outside.
    actual = (
      json.loads(manifest.read_text())["cost"]["seconds"] if manifest.exists() else took[stage]
    )
    files = [path for path in (workdir / stage).rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_size for path in files)
    total["predicted"] += seconds
    total["actual"] += actual
    print(f"| {stage} | {_cells(seconds, actual)} | {_cells(disk / 2**20, on_disk / 2**20)} |")
  print(f"| all | {_cells(total['predicted'], total['actual'])} | | | |")


def write_plan(file: Path) -> None:
  """Plans, prints the table, and writes stage → (seconds, bytes left on the disk)."""
  config = importlib.import_module(f"jaxinf.configs.{_CONFIG.value}").get_config()
  plan = planning.plan(Run(typed(config), file.parent / "run"), _LINE.value)
  print(plan.table())
  left = lambda cost: sum(n for what, n in cost.disk.items() if "partial" not in what)
  content = {cost.stage: (cost.total_seconds, left(cost)) for cost in plan.stages}
  file.write_text(json.dumps(content))


def _cells(predicted: float, actual: float) -> str:
  return f"{predicted:.1f} | {actual:.1f} | {predicted / actual:.2f}"


def _python(*arguments: str) -> None:
  subprocess.run([sys.executable, "-m", *arguments], check=True)


if __name__ == "__main__":
  app.run(main)
