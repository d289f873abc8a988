"""The one page writer: sections of words, figures, tables and pictures as one HTML file.

A section holds what is shown, as text and PNG; page.html.j2 arranges it. The page needs no file but
itself. Text is escaped, unless it is markupsafe.Markup.
"""

import base64
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from jaxinf.engine.artifacts import write_bytes

_NUMBER = re.compile(r"[+−±×<≤–]?\s*\d.*|[×–]")


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure.

  Attributes:
    png: its bytes.
    alt: what it shows, for readers who cannot see it.
    caption: how to read it, and what was found in numbers.
  """

  png: bytes
  alt: str
  caption: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text; not shown where it has no rows.

  Attributes:
    header: heads of the columns.
    rows: cells; the first of a row is its head.
    caption: what the table holds.
    folded: whether readers must open it to see more than the caption.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  caption: str = ""
  folded: bool = False

  @property
  def are_numbers(self) -> list[bool]:
    """For each column whether all its cells are numbers, which are set flush right."""
    columns = zip(*self.rows, strict=True)
    return [all(_NUMBER.fullmatch(cell) for cell in cells) for cells in columns]


@dataclasses.dataclass(frozen=True)
class Tile:
  """An example: its picture and what is written below it.

  Attributes:
    name: its id.
    alt: what the picture shows.
    png: the picture; None: it has none.
    sharp: whether it is enlarged without smoothing.
    score, error, between, label: more lines of text; empty for none.
  """

  name: str
  alt: str
  png: bytes | None = None
  sharp: bool = False
  score: str = ""
  error: str = ""
  between: str = ""
  label: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
  """Tiles under a title; `kind` is "supporting", "opposing" or "neutral" and gives the colour."""

  kind: str
  title: str
  tiles: Sequence[Tile]


@dataclasses.dataclass(frozen=True)
class Curve:
  """A small area chart; see `pictures.sorted_scores_paths`.

  Attributes:
    title: what is drawn.
    paths: "supporting", "opposing" and "zero" → SVG path.
    size: (width, height) of their box.
    lowest, highest: the numbers at both ends.
  """

  title: str
  paths: Mapping[str, str]
  size: tuple[float, float]
  lowest: str
  highest: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """A sample, and beside it groups of training examples."""

  tile: Tile
  groups: Sequence[Group]
  curve: Curve
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a page. What is empty is not shown; the rest comes in the order of the attributes.

  Attributes:
    title: its heading; not repeated where it is the page's title.
    name: its anchor. Pages of several named sections begin with links to them.
    text: paragraphs.
    facts: (name, value), set large.
    figures: one below another.
    samples: one below another.
    tables: likewise.
    note: what it was made of, or how far to trust it; set small.
  """

  title: str = ""
  name: str = ""
  text: Sequence[str] = ()
  facts: Sequence[tuple[str, str]] = ()
  figures: Sequence[Figure] = ()
  samples: Sequence[Sample] = ()
  tables: Sequence[Table] = ()
  note: str = ""


def write_page(
  folder: Path,
  title: str,
  sections: Sequence[Section],
  files: Mapping[str, bytes] | None = None,
) -> list[Path]:
  """Writes index.html, and files by name beside it, each atomically.

  Args:
    folder: made where it does not exist.
    title: of the page.
    sections: in their order.
    files: name → content, such as a figure to put into a paper.

  Returns:
    The paths, the page first.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxinf", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["uri"] = _data_uri
  links = [section for section in sections if section.name] if len(sections) > 1 else []
  page = environment.get_template("page.html.j2").render(
    title=title, sections=sections, links=links
  )
  folder.mkdir(parents=True, exist_ok=True)
  contents = {"index.html": page.encode()} | dict(files or {})
  for name, content in contents.items():
    write_bytes(folder / name, content)
  return [folder / name for name in contents]


def _data_uri(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode()
