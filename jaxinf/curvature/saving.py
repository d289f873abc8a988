"""Curvatures as arrays and JSON, and in folders."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.core.arrays import fingerprint
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.types import Eigenbasis
from jaxinf.curvature.curvature import Curvature, ExactCurvature
from jaxinf.curvature.ggn import GGN
from jaxinf.curvature.kinds import ExactGGN, kind_of
from jaxinf.diffusion.content import content_of
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.engine import artifacts
from jaxinf.engine.compute import Compute
from jaxinf.layers.coverage import Coverage, Row, Selection
from jaxinf.layers.specs import Layer

_PARTS = tuple(field.name for field in dataclasses.fields(Eigenbasis))


def arrays_of(curvature: Curvature) -> dict[str, np.ndarray]:
  """The eigenbases by name."""
  return {
    f"{name}/{part}": np.asarray(getattr(basis, part))
    for name, basis in curvature.bases.items()
    for part in _PARTS
    if getattr(basis, part) is not None
  }


def notes_of(curvature: Curvature) -> dict[str, Any]:
  """The rest of a curvature, as JSON."""
  return {
    "layers": [dataclasses.asdict(layer) for layer in curvature.layers],
    "coverage": [dataclasses.asdict(row) for row in curvature.coverage.rows],
    "settings": curvature.settings,
    "diagnostics": curvature.diagnostics,
  }


def curvature_from(
  arrays: Mapping[str, np.ndarray],
  notes: Mapping[str, Any],
  model: DiffusionModel,
  train: Examples | None = None,
  compute: Compute = Compute(),
) -> Curvature:
  """The curvature that was written as `arrays_of` and `notes_of`.

  Args:
    arrays, notes: what was written.
    model: what it was fitted for.
    train: the training examples, which the exact GGN goes through again.
    compute: batch size and devices of the exact GGN's products.

  Raises:
    ValueError: the exact GGN is asked for without training examples.
  """
  layers = tuple(_from_json(Layer, layer) for layer in notes["layers"])
  bases = {
    layer.name: Eigenbasis(*(arrays.get(f"{layer.name}/{part}") for part in _PARTS))
    for layer in layers
  }
  settings = dict(notes["settings"])
  kind = kind_of(settings["kind"])
  fitted = Curvature(
    model,
    kind,
    layers,
    bases,
    coverage_from(notes),
    Selection(**settings["selection"]),
    settings,
    dict(notes["diagnostics"]),
  )
  return exact_curvature(fitted, train, compute) if isinstance(kind, ExactGGN) else fitted


def exact_curvature(fitted: Curvature, train: Examples | None, compute: Compute) -> ExactCurvature:
  """The exact GGN over these training examples, preconditioned by a fitted curvature."""
  if train is None:
    raise ValueError("An exact curvature goes through the training examples: give train.")
  assert isinstance(fitted.kind, ExactGGN)
  draws = Draws(fitted.settings["draws"], seed=fitted.settings["seed"])
  ggn = GGN(
    fitted.model, fitted.layers, train, draws=draws, solver=fitted.kind.solver, compute=compute
  )
  fields = {field.name: getattr(fitted, field.name) for field in dataclasses.fields(Curvature)}
  return ExactCurvature(**fields, ggn=ggn)


def coverage_from(notes: Mapping[str, Any]) -> Coverage:
  """The coverage table of a curvature that was written."""
  return Coverage(tuple(_from_json(Row, row) for row in notes["coverage"]))


def save_curvature(folder: Path, curvature: Curvature) -> None:
  """Writes a curvature to a folder of its own."""
  key = {"curvature": content_of(curvature.model)}
  notes = notes_of(curvature)
  if isinstance(curvature, ExactCurvature):
    notes["train"] = fingerprint(curvature.ggn.content)
  artifacts.write(folder, key, arrays_of(curvature), notes=notes, cost={})


def load_curvature(
  folder: str | Path,
  model: DiffusionModel,
  train: Examples | None = None,
  compute: Compute = Compute(),
) -> Curvature:
  """Reads a curvature that `Curvature.save` wrote.

  Args:
    folder: where it lies.
    model: what it was fitted for.
    train, compute: of the exact GGN alone, which goes through the training examples again.

  Raises:
    ValueError: the folder holds none, it is damaged, it is that of another model, or an exact GGN
      is given no training examples or others than it was made with.
  """
  artifact = artifacts.read(Path(folder))
  if artifact.manifest["key"] != artifacts.plain({"curvature": content_of(model)}):
    raise ValueError(
      f"{folder} holds the curvature of a model with other parameters or another process: load the "
      "model that it was fitted for."
    )
  curvature = curvature_from(artifact.arrays, artifact.notes, model, train, compute)
  examples = fingerprint(curvature.ggn.content) if isinstance(curvature, ExactCurvature) else None
  if examples != artifact.notes.get("train"):
    raise ValueError(
      f"{folder} holds the exact GGN over other training examples, or the same without or with "
      "random_flip: give the examples that it was made with."
    )
  return curvature


def _from_json(cls: type, fields: Mapping[str, Any]) -> Any:
  """A dataclass from its fields as JSON keeps them: lists were tuples."""
  return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
