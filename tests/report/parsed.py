"""A page as a browser and a screen reader take it: its text, pictures, addresses and faults."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

_VOID = {"meta", "img", "path", "br"}


class Page(HTMLParser):
  """Text, pictures, headings, cells, and all addresses a browser would fetch or link to.

  Raises:
    AssertionError: tags do not nest, or what a reader who cannot see needs is missing.
  """

  def __init__(self, html: str):
    super().__init__()
    self.html, self.text, self.images, self.addresses, self.tags = html, "", [], [], set()
    self.headings, self.open, self.ids, self.columns, self.cells = [], [], [], [], 0
    self.feed(html)
    self.close()
    self.text = re.sub(r"\s+", " ", self.text)
    assert self.open == [] and len(self.ids) == len(set(self.ids))
    assert [level for level, _ in self.headings].count("h1") == 1
    links = {address for address in self.addresses if address.startswith("#")}
    assert links <= {f"#{name}" for name in self.ids}

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    if tag not in _VOID:
      self.open.append(tag)
    self.tags.add(tag)
    self.ids += [given["id"]] if "id" in given else []
    self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
    if tag == "img":
      assert given["alt"]
      self.images.append(given["src"])
    if tag == "svg":
      assert given["role"] == "img" and given["aria-label"]
    if tag == "th":
      assert given["scope"] == ("col" if "thead" in self.open else "row")
    if tag == "table":
      self.columns.append(0)
    if tag == "tr":
      self.cells = 0
    if tag in ("th", "td"):
      self.cells += 1
    if tag in ("h1", "h2", "h3", "h4"):
      # No level is left out on the way down.
      above = self.headings[-1][0] if self.headings else "h0"
      assert int(tag[1]) <= int(above[1]) + 1
      self.headings.append((tag, ""))

  def handle_endtag(self, tag):
    if tag in _VOID:
      return
    assert self.open.pop() == tag
    if tag == "tr":  # every row has as many cells as the table's head
      self.columns[-1] = self.columns[-1] or self.cells
      assert self.cells == self.columns[-1]

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text += f"{data} "
    if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
      self.headings[-1] = (self.open[-1], self.headings[-1][1] + data)

  @property
  def needs_nothing_else(self) -> bool:
    """Whether a browser shows the page without fetching anything."""
    fetched = [address for address in self.addresses if not address.startswith("#")]
    embedded = all(address.startswith("data:image/png;base64,") for address in fetched)
    runs = self.tags & {"script", "link", "iframe", "object", "embed"}
    return embedded and not runs and "url(" not in self.html and "@import" not in self.html

  def pixels(self) -> list[np.ndarray]:
    """Its images as [H, W] or [H, W, C]."""
    return [decoded(base64.b64decode(src.split(",", 1)[1])) for src in self.images]


def decoded(png: bytes) -> np.ndarray:
  """The pixels of a PNG."""
  return np.asarray(Image.open(io.BytesIO(png)))
