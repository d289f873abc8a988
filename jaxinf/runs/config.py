"""The door between config files and code: a ConfigDict becomes the typed sections of sections.py.

Unknown and missing fields are errors that name the valid ones. The fields of `model` besides its
name are those of the model's class.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxinf.runs.sections import Config, ModelConfig


def typed(config: ConfigDict) -> Config:
  """The sections of a ConfigDict; raises ValueError for unknown, missing or mistyped fields."""
  return _section(Config, config, "config")


def check_path(path: str) -> None:
  """Raises ValueError unless `path`, such as "train.steps", leads to a field of Config.

  What lies below `model` is left to the model's class.
  """
  *sections, name = path.split(".")
  cls: Any = Config
  for depth, part in enumerate([*sections, name]):
    if cls is ModelConfig:
      return
    above = ".".join(["config", *sections[:depth]])
    if not dataclasses.is_dataclass(cls):
      raise ValueError(f"{above} is a field, not a section: config.{path} does not exist.")
    fields = typing.get_type_hints(cls)
    if part not in fields:
      raise ValueError(f"{above} has no field {part}. Its fields are: {', '.join(fields)}.")
    cls = fields[part]


def as_dict(section: Any) -> Any:
  """A section as plain dicts, lists and numbers, for manifests."""
  if dataclasses.is_dataclass(section):
    fields = dataclasses.fields(section)
    return {field.name: as_dict(getattr(section, field.name)) for field in fields}
  if isinstance(section, Mapping):
    return {key: as_dict(value) for key, value in section.items()}
  if isinstance(section, list | tuple):
    return [as_dict(value) for value in section]
  return section


def _section(cls: type, config: Any, path: str) -> Any:
  if not isinstance(config, Mapping | ConfigDict):
    raise ValueError(f"{path} must be a section of fields; got {config!r}.")
  if cls is ModelConfig:
    return _model_section(config, path)
  types_of = typing.get_type_hints(cls)
  unknown = sorted(set(config) - set(types_of))
  missing = [name for name in types_of if name not in config]
  if unknown or missing:
    complaints = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    complaints += [f"missing: {', '.join(missing)}"] * bool(missing)
    raise ValueError(f"{path} has {'; '.join(complaints)}. Its fields are: {', '.join(types_of)}.")
  return cls(**{k: _value(t, config[k], f"{path}.{k}") for k, t in types_of.items()})


def _model_section(config: Any, path: str) -> ModelConfig:
  fields = dict(config)
  if "name" not in fields:
    raise ValueError(f"{path} needs a field `name`.")
  name = _value(str, fields.pop("name"), f"{path}.name")
  return ModelConfig(name, {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _value(expected: Any, value: Any, path: str) -> Any:
  """`value` as type `expected`: numbers are widened, sequences become tuples."""
  if dataclasses.is_dataclass(expected):
    return _section(typing.cast(type, expected), value, path)
  if isinstance(expected, types.UnionType):
    if value is None:
      return None
    expected = next(t for t in typing.get_args(expected) if t is not types.NoneType)
  if typing.get_origin(expected) is tuple:
    (item, _) = typing.get_args(expected)
    if isinstance(value, str) or not isinstance(value, list | tuple):
      raise ValueError(f"{path} must be a sequence; got {value!r}.")
    return tuple(_value(item, element, f"{path}[{i}]") for i, element in enumerate(value))
  if expected is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
    raise ValueError(f"{path} must be {expected.__name__}; got {value!r}.")
  return value
