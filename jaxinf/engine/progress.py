"""A progress bar on a terminal; elsewhere a quiet line every so often; and for whoever watches."""

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

_LOG = logging.getLogger("jaxinf")
# Told of labelled progress in this thread: label, units done, all, unit.
Watcher = Callable[[str, int, int, str], None]
_WATCHER: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)
_QUIET_SECONDS = 20.0  # between two lines, so that the log of an hour has 180 of them at most


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
  """Within it, `watcher` is told of the progress of labelled work in this thread as well."""
  token = _WATCHER.set(watcher)
  try:
    yield
  finally:
    _WATCHER.reset(token)


class Progress:
  """Counts units of work and shows rate and time left, or nothing where label is None.

  Use as a context manager.
  """

  def __init__(self, label: str | None, total: int, unit: str, start: int = 0):
    self._label, self._total, self._unit = label, total, unit
    self._done, self._start = start, start
    self._began = self._spoke = time.monotonic()
    self._bar = None
    if label is not None and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total, initial=start, desc=label, unit=f" {unit}", leave=False, dynamic_ncols=True
      )

  def __enter__(self) -> "Progress":
    self._tell()
    return self

  def __exit__(self, *exc_info) -> None:
    if self._bar is not None:
      self._bar.close()

  def advance_to(self, done: int, note: str = "") -> None:
    """Reports that `done` units are finished in all; `note` is a short figure such as a loss."""
    self.advance(done - self._done, note)

  def advance(self, amount: int, note: str = "") -> None:
    """Reports `amount` more finished units."""
    self._done += amount
    self._tell()
    if self._bar is not None:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(amount)
      return
    now = time.monotonic()
    if self._label is not None and now - self._spoke >= _QUIET_SECONDS:
      self._spoke = now
      rate = (self._done - self._start) / (now - self._began)
      left = (self._total - self._done) / rate
      note = f", {note}" if note else ""
      _LOG.info(
        "%s: %d of %d %s, %.3g %s/s, %s left%s",
        self._label,
        self._done,
        self._total,
        self._unit,
        rate,
        self._unit,
        clock(left),
        note,
      )

  def _tell(self) -> None:
    watcher = _WATCHER.get()
    if watcher is not None and self._label is not None:
      watcher(self._label, self._done, self._total, self._unit)


def clock(seconds: float) -> str:
  """A duration in words: `42 s`, `3 min 05 s` or `2 h 07 min`."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60} min {seconds % 60:02d} s"
  return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
