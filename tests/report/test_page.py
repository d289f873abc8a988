"""The page writer: what is given is shown once and escaped, and the page needs nothing else."""

import numpy as np
import pytest
from markupsafe import Markup

from jaxinf.report.page import Curve, Figure, Group, Sample, Section, Table, Tile, write_page
from jaxinf.report.pictures import png_bytes, sorted_scores_paths
from tests.report.parsed import Page

PNG = png_bytes(np.zeros((2, 3, 1), np.uint8))
CURVE = Curve("sorted", sorted_scores_paths(np.arange(3.0), width=9, height=3), (9, 3), "0", "2")
TILE = Tile("train 7", "an image", PNG, True, "+1.0", "± 0.1", label="car")
SAMPLE = Sample(
  Tile("sample <1>", "a sample", PNG),
  [
    Group(
      "supporting", "Best", [Tile("train 7", "an image", PNG, True, "+1.0", "± 0.1", label="car")]
    )
  ],
  CURVE,
  note="z = 2",
)
SECTION = Section(
  title="A < B",
  name="first",
  text=["found & kept", Markup("<strong>{}</strong>").format("<b>")],
  facts=[("Models", "8")],
  figures=[Figure(PNG, "Bars by method", "read it so")],
  samples=[SAMPLE],
  tables=[
    Table(("method", "LDS"), [("trak", "1.0 ± 0.2"), ("das", "×")], "Seen at once"),
    Table(("method", "LDS"), [("random", "0.0")], "The numbers", folded=True),
  ],
  note="8 models",
)


def written(folder, title, sections) -> Page:
  (path,) = write_page(folder, title, sections)
  return Page(path.read_text())


@pytest.mark.parametrize(
  "part",
  ["A < B", "found & kept", "<b>", "Models 8", "read it so", "sample <1>", "sorted", "z = 2",
   "Best +1.0 ± 0.1 train 7 car", "method LDS trak 1.0 ± 0.2 das ×", "Seen at once",
   "The numbers method LDS random 0.0", "8 models"],
)  # fmt: skip
def test_every_part_of_a_section_is_shown_once_and_escaped(tmp_path, part):
  page = written(tmp_path, "title", [SECTION])
  assert page.text.count(part) == 1 and len(page.images) == 3


def test_the_page_needs_nothing_but_itself(tmp_path):
  assert written(tmp_path, "title", [SECTION]).needs_nothing_else


def test_empty_sections_show_nothing_but_the_title(tmp_path):
  page = written(tmp_path, "title", [Section(tables=[Table((), ()), Table(("a",), [])])])
  assert page.text.split() == ["title", "title"]  # of the window, then as a heading
  assert not page.tags & {"h2", "table", "figure", "dl", "nav", "img"}


def test_the_title_is_not_repeated_by_a_section_of_its_name(tmp_path):
  section = Section("A < B", "only", text=["words"])
  assert written(tmp_path, "A < B", [section]).headings == [("h1", "A < B")]
  assert written(tmp_path, "C", [section]).headings == [("h1", "C"), ("h2", "A < B")]


def test_pages_of_several_named_sections_begin_with_links_to_them(tmp_path):
  second = Section("Second", "second")
  assert "nav" not in written(tmp_path, "title", [SECTION, Section("no name")]).tags
  page = written(tmp_path, "title", [SECTION, second])
  assert [a for a in page.addresses if a[0] == "#"] == ["#first", "#second"]


def test_columns_of_numbers_are_flush_right_and_others_left():
  rows = [("conv", "3 × 4", "1,234", "skipped"), ("1", "5", "−0.5 ± 0.1", "3 heads")]
  assert Table(("a", "b", "c", "d"), rows).are_numbers == [False, True, True, False]
  assert Table(("a",), [("–",), ("< 0.001",), ("×",)]).are_numbers == [True]


def test_files_stand_beside_the_page_and_are_named_after_it(tmp_path):
  paths = write_page(tmp_path / "new", "title", [SECTION], {"figure.png": PNG})
  assert [path.name for path in paths] == ["index.html", "figure.png"]
  assert sorted(tmp_path.glob("new/*")) == sorted(paths)  # and no unfinished file
  assert paths[1].read_bytes() == PNG
