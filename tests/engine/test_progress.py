"""Progress: a bar on a terminal, a quiet line elsewhere, and no word without a label."""

import io
import sys
import threading
import time

import pytest

from jaxinf.engine import progress
from jaxinf.engine.progress import Progress, clock, watched


class Terminal(io.StringIO):
  """Standard error on a terminal."""

  def isatty(self) -> bool:
    return True


@pytest.fixture
def on_terminal(monkeypatch):
  """on_terminal() → standard error from now on; pytest has its own until the test begins."""

  def begin() -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream

  return begin


def test_a_terminal_shows_a_bar_although_nobody_configured_logging(on_terminal, caplog):
  terminal = on_terminal()
  with Progress("query gradients", 8, "rows") as bar:
    bar.advance(6)
    time.sleep(0.2)  # tqdm draws no more often than every 0.1 s
    bar.advance_to(8, "loss 0.5")
  shown = terminal.getvalue()
  assert "query gradients" in shown and "8/8" in shown and " rows" in shown and "loss 0.5" in shown
  assert not caplog.records


def test_a_bar_goes_on_where_the_work_was(on_terminal):
  terminal = on_terminal()
  with Progress("fit", 8, "pairs", start=6) as bar:
    bar.advance(1)
  assert "6/8" in terminal.getvalue() and "0/8" not in terminal.getvalue()


def test_without_a_label_a_terminal_shows_nothing(on_terminal):
  terminal = on_terminal()
  with Progress(None, 8, "rows") as bar:
    bar.advance(8)
  assert terminal.getvalue() == ""


def test_who_watches_is_told_of_labelled_work_in_the_thread_alone():
  told = []
  with watched(lambda *step: told.append(step)):
    for label in ("work", None):
      with Progress(label, 5, "steps", start=1) as progress:
        progress.advance(2)
        progress.advance_to(5)
    thread = threading.Thread(target=lambda: Progress("other", 1, "steps").advance(1))
    thread.start()
    thread.join()
  Progress("after", 1, "steps").advance(1)
  assert told == [("work", done, 5, "steps") for done in (1, 3, 5)]


def test_elsewhere_there_is_a_line_every_so_often(monkeypatch, caplog):
  caplog.set_level("INFO", logger="jaxinf")
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  with Progress("fit", 1000, "pairs", start=400) as bar:
    for seconds in (19, 2, 5, 15):
      now[0] += seconds
      bar.advance(100, "loss 0.5")
  # After 21 and 41 seconds: 200 and 400 more than when it began.
  assert caplog.messages == [
    "fit: 600 of 1000 pairs, 9.52 pairs/s, 42 s left, loss 0.5",
    "fit: 800 of 1000 pairs, 9.76 pairs/s, 20 s left, loss 0.5",
  ]


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7600, "2 h 06 min")],
)
def test_durations_in_words(seconds, text):
  assert clock(seconds) == text
