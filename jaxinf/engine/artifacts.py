"""Artefacts on disk: arrays with a manifest, written atomically and reused only where they match.

A stage's folder holds `arrays.npz`, whatever files it adds, and last of all `manifest.json`, with
  key:      what the result depends on (config sections, content hashes of inputs);
  content:  a hash of the arrays;
  versions, git revision, cost and shapes, for the reader.
A folder without a manifest is unfinished and never read as a result. `cached` is the life of an
artefact: reused where it is there, or else begun, computed and written.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxinf.core.arrays import fingerprint
from jaxinf.core.types import PyTree
from jaxinf.engine import processes
from jaxinf.engine.progress import clock
from jaxinf.engine.resources import measured
from jaxinf.engine.working import this_process

# What a stage computes: the arrays and notes of its artefact, and what they are in a few words.
Outcome = tuple[Mapping[str, np.ndarray], Mapping[str, Any], str]

_LOG = logging.getLogger("jaxinf")
_PACKAGES = ("jaxinf", "jax", "jaxlib", "kfac-jax", "flax", "optax", "numpy")


class StaleArtifact(ValueError):
  """A folder holds the result of other settings or inputs than those asked for."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """One finished stage: its arrays and its manifest."""

  arrays: Mapping[str, np.ndarray]
  manifest: Mapping[str, Any]

  @property
  def content(self) -> str:
    """Hash of the arrays, by which later stages know their input."""
    return self.manifest["content"]

  @property
  def notes(self) -> Mapping[str, Any]:
    """What the stage recorded besides arrays: tables, settings."""
    return self.manifest["notes"]


def cached(
  folder: Path,
  key: Mapping[str, Any],
  compute: Callable[[], Outcome],
  *,
  label: str,
  alone: bool = False,
  anew: bool = False,
  then: str = "",
) -> Artifact:
  """The artefact of `key` in `folder`: the one that is there, or what `compute` gives, written.

  Unfinished work that `compute` keeps in `folder`/sums is deleted once the result is written.

  Args:
    folder: of the artefact.
    key: what it depends on, alike in all processes.
    compute: its arrays and notes, and a word on them. All processes compute; the first one writes,
      and they go on when all is written.
    label: what is computed, in messages.
    alone: the first process computes alone.
    anew: the result of another key is replaced.
    then: what to do next, in messages.

  Raises:
    StaleArtifact: the folder holds the result of another key, and `anew` is not set.
  """
  processes.check_same(json.dumps(plain(key)), f"what the stage {label} depends on")
  after = f"; {then}" if then else ""
  if processes.agreed((holds if anew else finished)(folder, key)):
    _LOG.info("%s: reused %s%s", label, folder, after)
    return read(folder)
  if processes.is_primary():
    begin(folder, key)
  _LOG.info("%s: begins (its functions are compiled first)", label)
  with measured() as cost:
    arrays, notes, what = compute() if processes.is_primary() or not alone else ({}, {}, "")
  artifact = None
  if processes.is_primary():
    artifact = write(folder, key, arrays, notes=notes, cost=cost)
    shutil.rmtree(folder / "sums", ignore_errors=True)
    _LOG.info("%s: wrote %s to %s in %s%s", label, what, folder, clock(cost["seconds"]), after)
  processes.wait_for_all(f"{label} written")
  return artifact or read(folder)


def finished(folder: Path, key: Mapping[str, Any]) -> bool:
  """Whether `folder` holds the finished result of exactly `key`.

  Raises:
    StaleArtifact: it holds all or part of the result of something else; with the difference.
  """
  files = {path.name for path in folder.iterdir()} if folder.exists() else set()
  if files == {"started.json"}:
    return False  # it stopped before anything was saved, so there is nothing to mix up
  for name in ("manifest.json", "started.json"):
    if name in files:
      refuse_stale(folder, json.loads((folder / name).read_text())["key"], key, "folder")
  if "manifest.json" not in files:
    return False
  return files.issuperset(read_manifest(folder)["notes"].get("files", ()))


def begin(folder: Path, key: Mapping[str, Any]) -> None:
  """Marks `folder` as belonging to `key`, so that unfinished work resumes only under it.

  It also tells which process is at work on it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  started = {"key": plain(key), "process": this_process()}
  write_text(folder / "started.json", json.dumps(started, indent=2))


def write(
  folder: Path,
  key: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  *,
  notes: Mapping[str, Any],
  cost: Mapping[str, Any],
) -> Artifact:
  """Writes arrays and manifest atomically; returns the artefact."""
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  partial = folder / "arrays.partial.npz"
  np.savez(partial, allow_pickle=False, **arrays)
  os.replace(partial, folder / "arrays.npz")
  manifest = {
    "key": plain(key),
    "content": fingerprint(arrays),
    "notes": plain(notes),
    "cost": plain(cost),
    "shapes": {name: [str(a.dtype), *a.shape] for name, a in arrays.items()},
    "versions": versions(),
    "devices": [device.device_kind for device in jax.devices()],
    "git_revision": git_revision(),
  }
  write_text(folder / "manifest.json", json.dumps(manifest, indent=2))
  return Artifact(arrays, manifest)


def holds(folder: Path, key: Mapping[str, Any]) -> bool:
  """Whether the folder holds the finished result of exactly `key`; no error where of another."""
  if not has_manifest(folder):
    return False
  manifest = read_manifest(folder)
  there = all((folder / name).exists() for name in manifest["notes"].get("files", ()))
  return there and manifest["key"] == plain(key)


def has_manifest(folder: Path) -> bool:
  """Whether the folder holds a finished result, of whatever."""
  return (folder / "manifest.json").exists()


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of a finished artefact, without its arrays; ValueError where there is none."""
  if not (folder / "manifest.json").exists():
    raise ValueError(
      f"{folder} holds no finished result: it has no manifest.json. Compute it first."
    )
  return json.loads((folder / "manifest.json").read_text())


def read(folder: Path) -> Artifact:
  """Reads a finished artefact; ValueError where it is none or its arrays are not as written."""
  manifest = read_manifest(folder)
  try:
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    damaged = fingerprint(arrays) != manifest["content"]
  except Exception as error:  # zipfile and NumPy raise many kinds for damaged files
    raise ValueError(f"{folder / 'arrays.npz'} cannot be read ({error}). {_REMEDY}") from error
  if damaged:
    raise ValueError(f"{folder / 'arrays.npz'} differs from its manifest. {_REMEDY}")
  return Artifact(arrays, manifest)


_REMEDY = "Delete the folder and compute it again."


def fingerprint_of(value: Any) -> str:
  """A hash of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_of_files(path: Path) -> str:
  """A hash of a file's bytes, or of names and bytes of all files below a folder."""
  files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
  digest = hashlib.sha256()
  for file in files:
    digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()[:32]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """Lines `path: old → new` for everything in which two nested dicts differ."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    names = [*old, *(name for name in new if name not in old)]
    parts = (
      differences(old.get(n, "(absent)"), new.get(n, "(absent)"), f"{path}.{n}".lstrip("."))
      for n in names
    )
    return [line for part in parts for line in part]
  return [] if old == new else [f"{path}: {old!r} → {new!r}"]


def file_name(name: str) -> str:
  """A name as a folder's: runs of other characters than letters, digits, _, ., + are one hyphen."""
  return re.sub(r"[^\w.+-]+", "-", name).strip("-")


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file atomically."""
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  os.replace(partial, path)


class Checkpoints:
  """Training states by step, kept by Orbax; the two newest stay.

  With several processes all of them call, with equal states of NumPy arrays; the primary writes.
  """

  def __init__(self, folder: Path):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def save(self, step: int, state: PyTree) -> None:
    self._manager.save(step, args=ocp.args.StandardSave(state))

  def latest(self) -> int | None:
    """The newest step that was saved, or None."""
    return self._manager.latest_step()

  def restore(self, step: int, like: PyTree) -> PyTree:
    """The state of a step, with the structure, shapes and types of `like`."""
    # NumPy's arrays, because JAX's name devices, and every process has others.
    abstract = jax.tree.map(np.asarray, like)
    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

  def close(self) -> None:
    self._manager.close()


class MetricsLog:
  """Metrics as JSON lines and TensorBoard events; a resumed run drops the lines it redoes.

  Only the primary process writes and reads them.
  """

  def __init__(self, folder: Path, resumed_step: int):
    from tensorboardX import SummaryWriter

    self._events = None
    if not processes.is_primary():
      return
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / "metrics.jsonl"
    if self._path.exists():
      lines = self._path.read_text().splitlines(keepends=True)
      whole = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
      kept = [line for line in whole if json.loads(line)["step"] <= resumed_step]
      write_text(self._path, "".join(kept))
    self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._events is None:
      return
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)

  def last(self) -> dict[str, float]:
    """The newest line; empty in processes that write none."""
    return json.loads(self._path.read_text().splitlines()[-1]) if self._events else {}

  def close(self) -> None:
    if self._events is not None:
      self._events.close()


@functools.cache
def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed as a package"
  return found


@functools.cache  # of the code that runs, which does not change any more
def git_revision() -> str | None:
  """The revision of the jaxinf checkout that runs, or None outside one."""
  checkout = Path(__file__).parents[2]
  if not (checkout / ".git").exists():  # installed: a repository further up is another project's
    return None
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return result.stdout.strip() or None


def refuse_stale(place: Path, found: Any, key: Mapping[str, Any], what: str) -> None:
  """Raises StaleArtifact with the difference where the `what` at `place` has another key."""
  different = differences(found, plain(key))
  if different:
    lines = "\n".join(f"  {line}" for line in different)
    raise StaleArtifact(
      f"{place} was made with other settings:\n{lines}\n"
      f"Use another folder (--workdir), undo the change, or delete that {what} to make it again."
    )


def plain(value: Any) -> Any:
  """The value as JSON would give it back, so that comparisons are like with like."""
  return json.loads(json.dumps(value))
