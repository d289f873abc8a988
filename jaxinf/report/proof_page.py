"""The page of a proof's figures: one self-contained HTML file, of one study or of several."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2

from jaxinf.engine.artifacts import write_bytes


@dataclasses.dataclass(frozen=True)
class Section:
  """A study as a page shows it.

  Attributes:
    name: of the study, which is the section's anchor.
    title: what the figure shows.
    caption: how to read it, and what was found in numbers.
    figure: PNG.
    header, rows: of a table of the same numbers; empty for none.
    made: what it was made of: models, draws, time.
  """

  name: str
  title: str
  caption: str
  figure: bytes
  header: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  made: str = ""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
  """Writes the page of these sections atomically."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxinf", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template("proof.html.j2").render(
    title=title,
    sections=[
      {
        **{field.name: getattr(section, field.name) for field in dataclasses.fields(section)},
        "figure": "data:image/png;base64," + base64.b64encode(section.figure).decode(),
      }
      for section in sections
    ],
  )
  write_bytes(path, page.encode())
