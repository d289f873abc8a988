"""The command line: what it does not know it refuses in one line that names what there is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

import jaxinf
from jaxinf import __main__ as entry
from jaxinf.benchmark import judged as judged_by
from jaxinf.runs.stage import STAGES
from jaxinf.scores.scores import Scores

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
  "unknown truth": (("evaluate", "--truth=digit"), "Unknown truth 'digit'; there are: digits_mlp"),
  "scores without a truth": (
    ("evaluate", "--scores=mine.npz"),
    "--scores goes with --truth, which they are judged by.",
  ),
  "scores that are not there": (
    ("evaluate", "--truth=digits_mlp", "--scores=mine.npz"),
    "mine.npz: expected an .npz file, got none.",
  ),
  "a truth for another stage": ((*RUN, "--truth=digits_mlp"), "--truth goes with the stage eval"),
  "a truth and a config": (
    ("evaluate", "--config=configs/digits.py", "--truth=digits_mlp"),
    "--truth takes the place of --config and --workdir",
  ),
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


@pytest.fixture
def ending(monkeypatch, tmp_path):
  """What the arguments end with; in this process, as JAX takes seconds to import."""
  file = tmp_path / "unknown_field.py"
  file.write_text(UNKNOWN_FIELD)
  monkeypatch.setattr(entry, "_speak", lambda: None)  # loggers stay as they are

  def of(arguments):
    words = [word.replace("UNKNOWN_FIELD", str(file)) for word in arguments]
    place = [] if words[0] == "evaluate" else [f"--workdir={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", ["jaxinf", *words, *place])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
      entry.main(entry._parse_flags(sys.argv))
    return ended.value.code

  return of


@pytest.mark.parametrize("case", CASES)
def test_what_is_unknown_ends_in_one_line_with_the_valid_names(ending, case):
  arguments, complaint = CASES[case]
  (line,) = ending(arguments).splitlines()
  assert line.startswith("jaxinf: ") and complaint in line


def test_a_truth_judges_scores_in_a_file(monkeypatch, tmp_path, capsys):
  """The leaderboard alone, and with a row for the file's scores, which are of no image."""
  truth = jaxinf.load_truth("digits_mlp")
  ids = {"query_ids": truth.samples.ids[::-1], "train_ids": truth.subsets.train_ids}
  rng = np.random.default_rng(0)
  values = rng.normal(size=(len(truth.samples), len(truth.subsets.train_ids)))
  np.savez(tmp_path / "mine.npz", values=values, **ids)
  printed = []
  for words in ([], [f"--scores={tmp_path / 'mine.npz'}"]):
    monkeypatch.setattr(sys, "argv", ["jaxinf", "evaluate", "--truth=digits_mlp", *words])
    with flagsaver.flagsaver():
      entry.main(entry._parse_flags(sys.argv))
    printed.append(capsys.readouterr().out)
  board, judged = printed
  assert board == judged_by("digits_mlp", None) + "\n" and "**mine**" not in board
  assert judged.count("| **mine**") == len(truth.retrained)
  mine = truth.evaluate(Scores.load(tmp_path / "mine.npz"))
  assert f"{100 * mine.ldses[0].mean:.1f} ± {100 * mine.ldses[0].std_error:.1f}" in judged
  assert abs(mine.ldses[0].mean) < 0.1  # chance, of 100 subsets and 100 samples


def test_a_process_shows_one_line_and_no_traceback(tmp_path):
  """The whole way once, as the user types it."""
  arguments, complaint = CASES["unknown field"]
  command = [sys.executable, "-m", "jaxinf", *arguments, f"--workdir={tmp_path}"]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 1
  assert ended.stderr.strip() == f"jaxinf: {complaint}"


def test_help_shows_every_stage_with_what_it_does():
  command = [sys.executable, "-m", "jaxinf", "--help"]
  output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
  words = " ".join(output.split())  # lines are wrapped
  for stage in STAGES.values():
    assert output.count(f"\n  {stage.name} ") == 1 and stage.help in words
  places = [output.index(f"\n  {name} ") for name in STAGES]
  assert places == sorted(places)
  assert "--config" in output and "--workdir" in output
