"""The table of stages: every row is complete, and all that is said of stages follows from it."""

import dataclasses
import pkgutil

import pytest

from jaxinf.runs import stage as table
from jaxinf.runs.config import settings
from jaxinf.runs.run import Run, own_settings
from jaxinf.runs.sections import Config
from jaxinf.runs.stage import STAGES, hint

ROWS = list(STAGES.values())
KEPT = [row for row in ROWS if row.kept]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_complete(row):
  """It says what it does, and names functions, stages and fields that there are."""
  assert row.help and row.group in (table.LINE, table.STORE, table.PROOF, table.BESIDE)
  assert bool(row.does) or bool(row.steps)
  assert not row.does or callable(row.function)
  assert not row.shows or (row.kept and callable(pkgutil.resolve_name(row.shows)))
  assert set(row.needs) | set(row.steps) <= set(STAGES)
  assert row.data in (None, "images", "labelled") and row.models in ("first", "each", "all")
  flags = {"images", "ids", "shard", "json", "truth", "scores", "host", "port"}
  assert set(row.flags) <= flags or not row.of_run
  assert row.also == table.EVERY_SECTION or set(row.also) <= set(vars(Config()))
  assert not row.kept or row.section
  fields = set()
  if row.section:
    fields = {field.name for field in dataclasses.fields(getattr(Config(), row.section))}
  assert {*row.pace, *row.extent} <= fields
  for path in row.reads:
    value = Config()
    for part in path.split("."):
      value = getattr(value, part)


def test_needs_come_earlier_and_in_order():
  names = list(STAGES)
  for row in ROWS:
    assert all(names.index(needed) < names.index(row.name) for needed in row.needs)
    assert [names.index(step) for step in row.steps] == sorted(names.index(s) for s in row.steps)


@pytest.mark.parametrize("row", KEPT, ids=lambda row: row.name)
def test_a_key_holds_the_section_but_for_its_pace(row, tmp_path):
  section = settings(getattr(Config(), row.section))
  own = own_settings(Run(Config(), tmp_path), row.name)
  assert set(section) - set(own) == {*row.pace, *row.extent} & set(section)
  assert own.items() <= section.items()


def test_every_section_is_some_stages():
  """Or of several: seed, data, model and diffusion; and score, which `evaluate` reads."""
  own = {row.section for row in ROWS} - {None}
  others = {"seed", "data", "model", "diffusion", "score"}
  assert own | others == {field.name for field in dataclasses.fields(Config)}
  assert not own & others


def test_hints_follow_the_lines():
  assert [hint(step) for step in STAGES["all"].steps[:-1]] == [
    "next: sample", "next: curvature", "next: attribute", "next: report"
  ]  # fmt: skip
  assert (hint("retrain"), hint("measure")) == ("next: measure", "next: evaluate")
  assert hint("report") == "open {folder}/index.html"
