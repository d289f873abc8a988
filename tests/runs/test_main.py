"""The command line: what it does not know it refuses in one line that names what there is."""

import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

import jaxinf
from jaxinf import __main__ as entry
from jaxinf.benchmark import judged as judged_by
from jaxinf.runs.config import typed
from jaxinf.runs.stage import STAGES
from jaxinf.scores.scores import Scores

ROOT = Path(__file__).parents[2]
RUN = ("train", "--config=configs/digits.py")
UNKNOWN_FIELD = """
from jaxinf.configs import digits

def get_config():
  config = digits.get_config()
  config.train.stepz = 1
  return config
"""
FILES = {
  "UNKNOWN_FIELD": UNKNOWN_FIELD,
  "RAISING": "def get_config():\n  raise ValueError('no such thing')\n",
  "MISNAMED": "def get_config():\n  return confg\n",
  "BROKEN": "def get_config(:\n",
  "OUTSIDE": "from confgs import digits\n",
}
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
  "a field without a config": (
    ("train", "--config.train.steps=1"),
    "--config.train.steps=1 changes a field of a config, and none is named: give --config too",
  ),
  "unknown flag": ((*RUN, "--confg=1"), "Unknown command line flag 'confg'. Did you mean: config"),
  "a mistyped value": ((*RUN, "--config.train.steps=few"), "flag --config.train.steps=few: "),
  "a config that raises": (
    ("train", "--config=RAISING"),
    "--config raises ValueError: no such thing",
  ),
  "a config that names what there is not": (
    ("train", "--config=MISNAMED"),
    "MISNAMED, line 2)",
  ),
  "a config that is no Python": (("train", "--config=BROKEN"), "--config cannot be read: "),
  "a config that imports as from a checkout": (
    ("train", "--config=OUTSIDE"),
    "No module named 'confgs'. Configs that come with jaxinf are imported as in `from jaxinf.conf",
  ),
  "a shell that there is not": (("completion", "csh"), "Unknown shell 'csh'; there are: bash, zsh"),
  "no shell": (("completion",), "A word is missing: jaxinf completion SHELL."),
  "JSON of another stage": ((*RUN, "--json"), "--json goes with the stages plan, query, evaluate,"),
  "no stage": (RUN[1:], f"Name a stage: {', '.join(STAGES)}. See --help."),
  "two words": (("train", "digits", *RUN[1:]), "Too many words: train digits."),
  "a flag of other stages": (
    (*RUN, "--shard=0/2"),
    "--shard goes with the stages retrain, counterfactual.",
  ),
  "a dry run of another stage": (
    (*RUN, "--dry-run"),
    "--dry-run goes with the stages curvature, clean.",
  ),
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
    "--config=configs/digitz.py is no file, and no config that comes with jaxinf: artbench,",
  ),
}


@pytest.fixture
def ending(monkeypatch, tmp_path):
  """What the arguments end with; in this process, as JAX takes seconds to import."""
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  monkeypatch.setattr(entry, "_speak", lambda: None)  # loggers stay as they are

  def of(arguments):
    words = [re.sub(r"(?<==)([A-Z_]+)$", rf"{tmp_path}/\1", word) for word in arguments]
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


def test_a_field_may_stand_before_the_config_and_a_config_be_named(monkeypatch):
  """Order does not count, a name is the file of that name, and the later of two values holds."""
  set_before = ("--config.train.steps=7", "--config=digits", "--config.seed=3")
  monkeypatch.setattr(sys, "argv", ["jaxinf", "train", *set_before])
  with flagsaver.flagsaver():
    assert entry._parse_flags(sys.argv) == ["jaxinf", "train"]
    config = typed(entry._CONFIG.value)
  assert config.data.name == "digits" and (config.train.steps, config.seed) == (7, 3)


def test_help_shows_every_stage_with_what_it_does():
  output = entry._asked_for_help(["--help"])
  words = " ".join(output.split())  # lines are wrapped
  for stage in STAGES.values():
    assert output.count(f"\n  {stage.name} ") == 1 and stage.help in words
  places = [output.index(f"\n  {name} ") for name in STAGES]
  assert places == sorted(places)
  assert "--config" in output and "--workdir" in output
  assert max(map(len, output.splitlines())) <= 100


def test_help_of_a_stage_is_what_it_reads():
  """Its own fields with default and meaning, its flags, and none of another stage's."""
  output = entry._asked_for_help(["query", "-h", "--config=digits"])
  assert "--config.query.top_k=10 " in output and "examples shown for each query" in output
  assert "--images" in output and "--json" in output
  assert "--config.train." not in output and "--shard" not in output
  with pytest.raises(ValueError, match="Unknown stage 'qery'"):
    entry._asked_for_help(["qery", "--help"])
  assert entry._asked_for_help(["query"]) is None


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
  for encoding in ("ascii", "cp1252"):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    with warnings.catch_warnings():
      entry._settle()
    print("λ ± 1 …", flush=True)
    assert shown.getvalue().decode(encoding) in ("? ? 1 ?\n", "? ± 1 …\n")


def test_warnings_are_of_jaxinf_alone():
  """Told by the module that warns, whose registry Python consults."""
  with warnings.catch_warnings(record=True) as heard:
    warnings.resetwarnings()
    entry._settle()
    for module in ("jax._src.core", "jaxinf.curvature.fit", "jaxinfo", "orbax"):
      warnings.warn_explicit(f"of {module}", UserWarning, "file.py", 1, module=module)
  assert [str(warning.message) for warning in heard] == ["of jaxinf.curvature.fit"]
