"""What lies in the folder of a run: what is finished, stale and why, unfinished or running.

A result is a folder with a manifest.json, and one that was begun has a started.json. A finished one
is stale where an input was made anew since, as the inputs' content hashes say, or where a config is
given and asks for another.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinf.engine import artifacts
from jaxinf.engine.progress import clock
from jaxinf.engine.working import is_alive
from jaxinf.planning.limits import size
from jaxinf.runs.output import as_json
from jaxinf.runs.run import Run, key_of
from jaxinf.runs.sections import Config
from jaxinf.runs.stage import STAGES

FINISHED, STALE, UNFINISHED, RUNNING = STATES = ("finished", "stale", "unfinished", "running")
RECENT = 600.0  # seconds within which what writes may still be at work, where no process is known
# Folders of results that hold no results themselves, but what these are made of.
_INNER = {"sums", "checkpoints", "tensorboard", "store", "moments"}
_BEGUN = "unfinished"  # folder of the models that retraining has begun
# Parts of keys that are content hashes of the results of these stages.
_INPUTS = {f"{name}_content": name for name in STAGES} | {
  "samples_content": "sample",
  "latents_content": "encode",
}

Keys = Mapping[Path, Callable[[], Mapping[str, Any]]]  # folder of a result → what it depends on


@dataclasses.dataclass(frozen=True)
class Found:
  """A result in a workdir, or the beginning of one.

  Attributes:
    folder: where it lies.
    state: one of STATES.
    why: what makes it stale, line by line, or how far it is.
    written: when the newest of its files was, in seconds since 1970.
    seconds: that it took; None where it is not finished, or not known.
  """

  folder: Path
  state: str
  why: tuple[str, ...]
  written: float
  seconds: float | None = None


def status(*, workdir: Path, config: Config | None, json: bool = False) -> str:
  """What is in a workdir, as text or JSON; with a config also what it would change.

  Raises:
    ValueError: there is no such folder, or nothing of a run in it.
  """
  found = found_in(workdir, config)
  stages: dict[str, list[Found]] = {}
  for result in found:
    stages.setdefault(_place(workdir, result.folder), []).append(result)
  sizes = {place: bytes_of(workdir / place) for place in stages}
  if json:
    listed = [
      {"folder": place, "bytes": sizes[place], "results": results}
      for place, results in stages.items()
    ]
    return as_json({"workdir": workdir, "bytes": bytes_of(workdir), "stages": listed})
  rows = [_row(place, results, sizes[place]) for place, results in stages.items()]
  return "\n".join(
    [f"{workdir}: {size(bytes_of(workdir))}", *_aligned(rows), *_reasons(found, workdir)]
  )


def found_in(workdir: Path, config: Config | None = None) -> list[Found]:
  """All results in a workdir, in the order of the stages; see `Found`."""
  if not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is no folder: name that of a run.")
  folders = sorted(_folders(workdir), key=lambda folder: _order(workdir, folder))
  if not folders:
    raise ValueError(f"--workdir={workdir} holds nothing of a run: no stage has begun there.")
  keys = {} if config is None else _keys(Run(config, workdir), folders)
  found: dict[Path, Found] = {}
  for folder in folders:
    found[folder] = _looked_at(folder, workdir, keys, found)
  return list(found.values())


def bytes_of(place: Path) -> int:
  """Of a file, or of all files below a folder; links count as themselves."""
  if not place.is_dir() or place.is_symlink():
    return place.lstat().st_size
  parts = (Path(folder) / name for folder, _, names in os.walk(place) for name in names)
  return sum(part.lstat().st_size for part in parts)


def _folders(workdir: Path) -> Iterator[Path]:
  """Those of results, finished or begun."""
  for root in (workdir, *workdir.glob("models/*")):
    for place in root.iterdir():
      if place.is_symlink() or not place.is_dir() or _stage_of(place) is None:
        continue
      for path, names, files in os.walk(place):
        names[:] = [name for name in names if name not in _INNER]
        if {"manifest.json", "started.json"} & set(files):
          yield Path(path)
        elif _BEGUN in names:
          yield Path(path) / _BEGUN
        if _BEGUN in names:
          names.remove(_BEGUN)


def _stage_of(place: Path) -> str | None:
  """The stage whose folder a folder of a run is by its name; None: of none."""
  name = place.name.partition("-weight-")[0]
  return name if name in STAGES or name == "score" else None


def _place(workdir: Path, folder: Path) -> str:
  """The folder of the stage of a result, within the workdir: curvature, or models/1/curvature."""
  parts = folder.relative_to(workdir).parts
  return "/".join(parts[: 3 if parts[0] == "models" else 1])


def _order(workdir: Path, folder: Path) -> tuple[int, str]:
  """Inputs come before what is made of them."""
  names = [*STAGES]
  names.insert(names.index("evaluate"), "score")
  stage = _stage_of(Path(_place(workdir, folder)))
  assert stage is not None
  return names.index(stage), str(folder)


def _keys(run: Run, folders: list[Path]) -> Keys:
  """What the results of a run depend on, of those that are there."""
  keys: dict[Path, Callable[[], Mapping[str, Any]]] = {}
  for stage in STAGES.values():
    for model in run.each_model() if stage.models == "each" else [run]:
      if stage.kept:
        keys[model.folder(stage.name)] = functools.partial(key_of, model, stage.name)
  if not set(folders) <= set(keys):
    from jaxinf.benchmark.results import proof_results  # which imports what runs are made of

    keys |= dict(proof_results(run))
  return keys


def _looked_at(folder: Path, workdir: Path, keys: Keys, before: Mapping[Path, Found]) -> Found:
  written = max((path.lstat().st_mtime for path in folder.rglob("*")), default=0.0)
  if not artifacts.has_manifest(folder):
    return _begun(folder, written)
  manifest = artifacts.read_manifest(folder)
  missing = [name for name in manifest["notes"].get("files", ()) if not (folder / name).exists()]
  if missing:
    return Found(folder, UNFINISHED, (f"{', '.join(missing)} is missing",), written)
  why = _moved_inputs(workdir, folder, manifest["key"], before)
  if not why and folder in keys:
    why = _asked_otherwise(manifest["key"], keys[folder])
  return Found(
    folder, STALE if why else FINISHED, tuple(why), written, manifest["cost"].get("seconds")
  )


def _begun(folder: Path, written: float) -> Found:
  """What is not finished: running where its process lives or, if that is unknown, wrote lately."""
  started = _read_json(folder / "started.json")
  process, why = started.get("process"), list(_progress(folder, started))
  alive = None if process is None else is_alive(process)
  if alive is None:
    alive = time.time() - written < RECENT
  if alive and process is not None:
    why.append(f"process {process['id']} on {process['host']}")
  return Found(folder, RUNNING if alive else UNFINISHED, tuple(why), written)


def _progress(folder: Path, started: Mapping[str, Any]) -> Iterator[str]:
  """How far training is, by its log."""
  log = folder / "metrics.jsonl"
  lines = log.read_text() if log.is_file() else ""
  steps = re.findall(r'^{"step": (\d+),', lines, re.MULTILINE)
  total = started.get("key", {}).get(folder.name, {}).get("steps")
  if steps:
    yield f"step {int(steps[-1]):,}" + (f" of {total:,}" if total else "")


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):  # there is none, or it was cut off
    return {}


def _moved_inputs(
  workdir: Path, folder: Path, key: Mapping[str, Any], before: Mapping[Path, Found]
) -> list[str]:
  """Lines on the inputs that are others now, or stale themselves."""
  own = workdir / Path(_place(workdir, folder)).parent  # that of a further model, or the workdir
  lines = []
  for part, name in _INPUTS.items():
    places = [place for place in (own / name, workdir / name) if place in before]
    if part not in key or not places:
      continue
    now = before[places[0]]
    if now.state == STALE:
      lines.append(f"its {name} is stale")
    elif now.state == FINISHED:
      content = artifacts.read_manifest(now.folder)["content"]
      if content != key[part]:
        lines.append(f"its {name} was made anew: {key[part]} → {content}")
  return lines


def _asked_otherwise(found: Mapping[str, Any], key: Callable[[], Mapping[str, Any]]) -> list[str]:
  """Lines on what differs from the key that is asked for; none where an input is not there yet."""
  try:
    return artifacts.differences(found, artifacts.plain(key()))
  except ValueError:
    return []


def _row(place: str, results: list[Found], num_bytes: int) -> tuple[str, ...]:
  seconds = [result.seconds for result in results if result.seconds is not None]
  ago = clock(max(0.0, time.time() - max(result.written for result in results)))
  counts = [(state, sum(r.state == state for r in results)) for state in STATES]
  states = [state if len(results) == 1 else f"{num} {state}" for state, num in counts if num]
  took = clock(sum(seconds)) if seconds else "–"
  return place, ", ".join(states), size(num_bytes), took, f"{ago} ago"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
  table = [("folder", "state", "disk", "took", "last written"), *rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in table
  ]


def _reasons(found: list[Found], workdir: Path) -> Iterator[str]:
  """Why results are stale, or how far they are; the same of many is said once."""
  reasons = [result for result in found if result.why]
  alike = lambda result: (_place(workdir, result.folder), result.state, result.why)
  for (_, state, why), group in itertools.groupby(reasons, alike):
    first, *others = (str(result.folder.relative_to(workdir)) for result in group)
    more = f" and {len(others)} more" if others else ""
    yield f"{first}{more}: {state}" + ("" if len(why) > 1 else f", {why[0]}")
    yield from (f"  {line}" for line in why if len(why) > 1)
