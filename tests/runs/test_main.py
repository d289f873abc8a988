"""The command line: what it does not know it refuses in one line that names what there is."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinf.runs.stage import STAGES

ROOT = Path(__file__).parents[2]
RUN = ("train", "--config=configs/digits.py")
UNKNOWN_FIELD = """
from configs import digits

def get_config():
  config = digits.get_config()
  config.train.stepz = 1
  return config
"""
CASES = {
  "unknown stage": (("trian", *RUN[1:]), f"Unknown stage 'trian'; there are: {', '.join(STAGES)}."),
  "unknown field": (
    (*RUN, "--config.train.stepz=1"),
    'The config has no field "stepz". Did you mean "steps" instead of "stepz"?',
  ),
  "unknown section": (
    (*RUN, "--config.trian.steps=1"),
    'The config has no field "trian". Did you mean "train" instead of "trian"?',
  ),
  "no section": ((*RUN, "--config.train.steps.more=1"), "<class 'int'>.more does not exist"),
  "unknown field in a file": (
    ("train", "--config=UNKNOWN_FIELD"),
    'The config has no field "stepz". Did you mean "steps" instead of "stepz"?',
  ),
  "no stage": (RUN[1:], f"Name a stage: {', '.join(STAGES)}. See --help."),
  "two words": (("train", "digits", *RUN[1:]), "Too many words: train digits."),
  "a flag of other stages": (
    (*RUN, "--shard=0/2"),
    "--shard goes with the stages retrain, counterfactual.",
  ),
  "a dry run of another stage": ((*RUN, "--dry-run"), "--dry-run goes with the stage curvature."),
  "unknown field of the model": ((*RUN, "--config.model.chanels=(8,)"), "'channels'"),
  "unknown data set": (
    (*RUN, "--config.data.name=digitz"),
    "Unknown data set 'digitz'; there are: digits, cifar10,",
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
  file = workdir / "unknown_field.py"
  file.write_text(UNKNOWN_FIELD)
  commands = {
    case: (*(x.replace("UNKNOWN_FIELD", str(file)) for x in words), f"--workdir={workdir / case}")
    for case, (words, _) in CASES.items()
  }
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


def test_help_shows_every_stage_with_what_it_does(finished):
  output = finished["help"].output
  words = " ".join(output.split())  # lines are wrapped
  for stage in STAGES.values():
    assert output.count(f"\n  {stage.name} ") == 1 and stage.help in words
  places = [output.index(f"\n  {name} ") for name in STAGES]
  assert places == sorted(places)
  assert "--config" in output and "--workdir" in output
