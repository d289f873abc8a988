"""What --help says of fields: all that a stage reads, each with its default and a meaning."""

import dataclasses

import pytest

from jaxinf.runs.fields import fields_read, meanings, sections_read
from jaxinf.runs.sections import Config
from jaxinf.runs.stage import STAGES


def test_every_field_of_every_section_has_a_meaning_and_its_default():
  fields = fields_read(STAGES["plan"])
  assert [field.path for field in fields if not field.meaning] == []
  found = {field.path: field.default for field in fields}
  assert len(found) == len(fields)
  assert found["attribute.stop.size"] == Config().attribute.stop.size
  assert found["model.channels"] == Config().model.fields["channels"]
  sections = {path.partition(".")[0] for path in found}
  assert sections == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_reads_its_own_section_first_and_its_steps_read_no_more(stage):
  read = sections_read(stage)
  assert len(set(read)) == len(read)
  assert not stage.section or read[0] == stage.section
  for name in stage.steps:
    assert set(sections_read(STAGES[name])) <= set(read)
  assert bool(read) == stage.of_run


def test_meanings_stand_beside_above_or_in_the_docstring():
  @dataclasses.dataclass
  class Section:
    """Made up.

    Attributes:
      first, second: shared, and long enough
        for two lines.
      third: from here.

    Raises:
      ValueError: never.
    """

    first: int = 1
    second: int = 2
    third: int = 3  # not from here
    # above, in
    # two lines
    fourth: int = 4
    fifth: tuple[int, ...] = (
      5,  # within
    )  # fmt: skip
    sixth: int = 6

  shared = "shared, and long enough for two lines."
  assert meanings(Section) == {
    "first": shared,
    "second": shared,
    "third": "from here.",
    "fourth": "above, in two lines",
    "fifth": "within",
    "sixth": "",
  }
