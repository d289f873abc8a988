"""The door between config files and code: the sections as a ConfigDict, and back again.

Config files start from `default_config()`, which is locked: a field that there is not is refused,
with the nearest that there is. Only `model` is open, for the fields of any model's class.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxinf.networks import MODELS
from jaxinf.runs.sections import Config, ModelConfig


def default_config() -> ConfigDict:
  """Every field at its default, locked; of an absent value the type is known."""
  config = _opened(Config())
  config.lock()
  config.model.unlock()
  return config


def typed(config: Mapping | ConfigDict) -> Config:
  """The sections of a config; what it leaves out has its default.

  Raises:
    ValueError: unknown or mistyped fields, or values that a section refuses.
  """
  return _section(Config, config, "config")


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


def settings(section: Any, only: Collection[str] | None = None) -> Any:
  """`as_dict` for the key of a result, of the fields `only` where given.

  Fields that have the value from before they came are left out. Fields that were renamed have the
  name from before.
  """
  if not dataclasses.is_dataclass(section):
    return as_dict(section)
  found = {}
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    came_later = "before" in field.metadata and value == field.metadata["before"]
    if not came_later and (only is None or field.name in only):
      found[field.metadata.get("key", field.name)] = settings(value)
  return found


def refusal(error: AttributeError | KeyError) -> str:
  """What ml_collections says of an unknown field, in one line and without the values of others."""
  cause: Any = error
  while isinstance(cause, Exception):
    cause = cause.args[0]
  text = str(cause)
  name = re.match(r"""(?:Key )?["'](\w+)["']""", text)
  if not name:
    return text.splitlines()[0]
  near = re.search(r"Did you mean .*$", text)
  return f'The config has no field "{name[1]}".' + (f" {near[0]}" if near else "")


def _opened(section: Any) -> ConfigDict:
  """A section as a ConfigDict."""
  hints: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(section)}
  values = {name: getattr(section, name) for name in hints}
  if isinstance(section, ModelConfig):  # its fields stand beside its name
    hints |= {field.name: field.type for field in dataclasses.fields(MODELS[section.name])}
    values = {"name": section.name, **section.fields}
  config = ConfigDict()
  for name, value in values.items():
    if dataclasses.is_dataclass(value):
      config[name] = _opened(value)
    else:
      config[name] = _absent(hints[name]) if value is None else value
  return config


def _absent(hint: Any) -> Any:
  """No value yet, of a known type."""
  present = _present(hint)
  return placeholder(typing.get_origin(present) or present)


def _present(hint: Any) -> Any:
  """The type of a field's values that are there: `tuple[str, ...]` of `tuple[str, ...] | None`."""
  if isinstance(hint, types.UnionType):
    return next(t for t in typing.get_args(hint) if t is not types.NoneType)
  return hint


def _section(cls: type, config: Any, path: str) -> Any:
  if not isinstance(config, Mapping | ConfigDict):
    raise ValueError(f"{path} must be a section of fields; got {config!r}.")
  if cls is ModelConfig:
    return _model_section(config, path)
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(config) - set(hints))
  if unknown:
    raise ValueError(
      f"{path} has no field {', '.join(unknown)}. Its fields are: {', '.join(hints)}."
    )
  return cls(**{k: _value(hints[k], config[k], f"{path}.{k}") for k in config})


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
  if isinstance(expected, types.UnionType) and value is None:
    return None
  kind = _present(expected)
  if typing.get_origin(kind) is tuple:
    if isinstance(value, str) or not isinstance(value, list | tuple):
      raise ValueError(f"{path} must be a sequence; got {value!r}.")
    (item, _) = typing.get_args(kind)
    return tuple(_value(item, element, f"{path}[{i}]") for i, element in enumerate(value))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f"{path} must be {kind.__name__}; got {value!r}.")
  return value
