"""What programs read: JSON that every reader takes, of anything that stages find."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxinf.runs.output import as_json, show
from tests.running import run_of


@dataclasses.dataclass
class Inner:
  where: Path
  share: float


def test_arrays_dataclasses_and_numbers_that_are_not_finite():
  data = {
    1: np.array([[1.5, np.nan]], np.float32),
    "ids": np.array(["a", "b"]),
    "inner": (Inner(Path("x"), np.inf),),
    "number": np.int64(3),
    "none": None,
  }
  assert json.loads(as_json(data)) == {
    "1": [[1.5, None]], "ids": ["a", "b"], "inner": [{"where": "x", "share": None}], "number": 3,
    "none": None,
  }  # fmt: skip


@pytest.mark.parametrize(("given", "printed"), [(False, "text\n"), (True, '{\n  "λ": 1\n}\n')])
def test_a_run_says_which_is_printed(tmp_path, capsys, given, printed):
  show(run_of(tmp_path, as_json=given), "text", {"λ": 1})
  assert capsys.readouterr().out == printed
