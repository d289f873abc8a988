"""Removing from the folder of a run what is not finished, and what no stage needs any more.

Finished results stay, unless they are stale and that is asked for. What is running stays, too.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jaxinf.planning.limits import size
from jaxinf.runs.sections import Config
from jaxinf.runs.status import FINISHED, RECENT, RUNNING, STALE, Found, bytes_of, found_in

# Of a finished result: what it went on from while it was made, and files that were being written.
_LEFT = ("sums", "checkpoints", "arrays.partial.npz", "*.partial")
_SCRATCH = ".jaxinf-plan-*"  # of plans that were killed


def clean(
  *, workdir: Path, config: Config | None, stale: bool = False, dry_run: bool = False
) -> str:
  """Removes it, and returns what was removed, a line each.

  Args:
    workdir: of the run.
    config: by which results are judged stale; None: by their inputs alone.
    stale: whether stale results go too.
    dry_run: nothing is removed.

  Raises:
    ValueError: the workdir is no folder of a run.
  """
  found = found_in(workdir, config)
  total, lines = 0, []
  for place in dict.fromkeys([*_removable(found, stale), *_scratch(workdir)]):
    num_bytes = bytes_of(place)
    total += num_bytes
    lines.append(f"  {place.relative_to(workdir)} ({size(num_bytes)})")
    if not dry_run:
      _remove(place)
  running = [str(r.folder.relative_to(workdir)) for r in found if r.state == RUNNING]
  kept = [f"Running, and left alone: {', '.join(running)}."] if running else []
  what = "would be removed" if dry_run else "removed"
  head = f"{workdir}: {size(total)} {what}" + (":" if lines else "")
  return "\n".join([head, *lines, *kept])


def _removable(found: list[Found], stale: bool) -> Iterator[Path]:
  folders = [result.folder for result in found]
  for result in found:
    if result.state == RUNNING:
      continue
    if result.state == FINISHED or (result.state == STALE and not stale):
      yield from (path for name in _LEFT for path in result.folder.glob(name))
    else:
      yield from _own(result.folder, folders)


def _own(folder: Path, folders: list[Path]) -> list[Path]:
  """A result's folder; where other results lie below it, what lies beside them."""
  inner = [other for other in folders if folder in other.parents]
  if not inner:
    return [folder]
  return [p for p in folder.iterdir() if p not in inner and not any(p in i.parents for i in inner)]


def _scratch(workdir: Path) -> Iterator[Path]:
  """What plans left that are not at work any more."""
  for place in workdir.glob(_SCRATCH):
    if time.time() - place.lstat().st_mtime > RECENT:
      yield place


def _remove(place: Path) -> None:
  if place.is_dir() and not place.is_symlink():
    shutil.rmtree(place)
  else:
    place.unlink(missing_ok=True)
