"""What commands print: text for people, or with --json one JSON document for programs."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf.engine import processes
from jaxinf.runs.run import Run


def show(run: Run, text: str, data: Any) -> None:
  """Prints what a stage found, in the first process: `text`, or `data` as the run asks for JSON."""
  if processes.is_primary():
    print(as_json(data) if run.as_json else text)


def as_json(data: Any) -> str:
  """Dataclasses, mappings, sequences and arrays as JSON; numbers that are not finite are null."""
  return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return str(value) if isinstance(value, Path) else value
