"""The command line: what it does not know it refuses in one line that names what there is."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ("train", "--config=configs/digits.py")
STAGES = (
  "plan, train, sample, curvature, curvature-study, compress-study, attribute, report, all, index, "
  "index-append, index-delete, index-verify, query, retrain, measure, evaluate, benchmark, "
  "counterfactual, study NAME"
)
CASES = {
  "unknown stage": (("trian", *RUN[1:]), f"Name one stage of {STAGES}; got trian."),
  "unknown field": (
    (*RUN, "--config.train.stepz=1"),
    "config.train has no field stepz. Its fields are: steps, batch_size, learning_rate,",
  ),
  "unknown field of the model": ((*RUN, "--config.model.chanels=(8,)"), "'channels'"),
  "unknown data set": (
    (*RUN, "--config.data.name=digitz"),
    "unknown data set 'digitz'; the data sets are digits, cifar10,",
  ),
  "unknown config file": (
    ("train", "--config=configs/digitz.py", "--config.train.steps=1"),
    "--config cannot be read: [Errno 2] No such file or directory: 'configs/digitz.py'",
  ),
}


@dataclasses.dataclass(frozen=True)
class Finished:
  status: int
  output: str
  errors: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Command lines → how they ended; run side by side, since each takes seconds to import JAX."""
  workdir = tmp_path_factory.mktemp("runs")
  commands = {case: (*CASES[case][0], f"--workdir={workdir / case}") for case in CASES}
  commands["help"] = ("--help",)
  started = {
    case: subprocess.Popen(
      [sys.executable, "-m", "jaxinf", *arguments],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for case, arguments in commands.items()
  }
  ended = {case: process.communicate(timeout=120) for case, process in started.items()}
  return {case: Finished(started[case].returncode, *texts) for case, texts in ended.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_is_unknown_ends_in_one_line_with_the_valid_names(finished, case):
  ended = finished[case]
  assert ended.status == 1
  (line,) = ended.errors.strip().splitlines()
  assert line.startswith("jaxinf: ") and CASES[case][1] in line


def test_help_shows_the_stages_in_order(finished):
  output = finished["help"].output
  main, _, store = output.partition("On a store")
  for part, stages in ((main, STAGES.split(", ")[:9]), (store, STAGES.split(", ")[9:])):
    assert sorted(part.count(f"\n  {stage} ") for stage in stages) == [1] * len(stages)
  places = [main.index(f"\n  {stage} ") for stage in STAGES.split(", ")[:9]]
  assert places == sorted(places)
  assert "--config" in output and "--workdir" in output
