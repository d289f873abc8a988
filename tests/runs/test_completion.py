"""Completion: bash itself is asked for words; the other shells' scripts hold the same ones."""

import shutil
import subprocess

import pytest

from jaxinf.runs.completion import SHELLS, completion, words_of
from jaxinf.runs.config_files import CONFIGS
from jaxinf.runs.stage import STAGES

# What readline does with the line that was typed; it takes = for the end of a word.
_ASK = """
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=(${1//=/ = }) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
case "$1" in *' ') COMP_CWORD=$((COMP_CWORD + 1)) ;; esac
_jaxinf
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
  ("typed", "words"),
  [
    ("jaxinf que", ["query"]),
    ("jaxinf index-", ["index-append", "index-delete", "index-verify"]),
    ("jaxinf train --config=digits_", [n for n in CONFIGS if n.startswith("digits_")]),
    ("jaxinf query --im", ["--images="]),
    ("jaxinf train --im", [""]),
    ("jaxinf train --config.train.st", ["--config.train.steps="]),
    ("jaxinf train --config.attribute.", [""]),
    ("jaxinf all --workdir=", [""]),  # files, as by default
  ],
)
def test_bash_completes(typed, words):
  script = f"{completion('bash')}\n{_ASK}"
  asked = subprocess.run(["bash", "-c", script, "bash", typed], capture_output=True, text=True)
  assert asked.stderr == "" and asked.stdout.splitlines() == words


def test_every_shell_knows_every_stage_and_its_words():
  for shell in SHELLS:
    script = completion(shell)
    for stage in STAGES.values():
      assert stage.name in script
      for word in words_of(stage):
        assert word.strip("-=") in script
  with pytest.raises(ValueError, match="Unknown shell 'csh'; there are: bash, zsh, fish"):
    completion("csh")
