"""Every config file passes the door; what is unknown, missing or mistyped does not."""

import ast
import dataclasses
import importlib
import json
import typing
from pathlib import Path

import pytest

from configs import base
from jaxinf import models
from jaxinf.config import as_dict, check_path, typed
from jaxinf.sections import Config, ModelConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SECTIONS = typing.get_type_hints(Config)
FIELDS = [
  (section, field.name)
  for section, cls in SECTIONS.items()
  if dataclasses.is_dataclass(cls) and cls is not ModelConfig
  for field in dataclasses.fields(cls)
]


@pytest.fixture
def config():
  return base.get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid(name):
  config = typed(importlib.import_module(f"configs.{name}").get_config())
  assert isinstance(config, Config)
  models.build(config.model.name, dict(config.model.fields), out_channels=3)
  json.dumps(as_dict(config))  # as manifests hold it


def test_values_arrive_as_they_were_set(config):
  config.train.steps = 7
  config.curvature.skip = ["norm", "bias"]
  section = typed(config)
  assert section.train.steps == 7
  assert section.curvature.skip == ("norm", "bias")
  assert section.data.path is None
  assert section.model.fields["channels"] == (128, 256, 256, 256)
  assert as_dict(section)["curvature"]["skip"] == ["norm", "bias"]


def test_integers_widen_to_floats():
  plain = base.get_config().to_dict()
  plain["attribute"]["damping"] = 1
  damping = typed(plain).attribute.damping
  assert damping == 1.0 and isinstance(damping, float)


def test_fields_cannot_be_changed_once_typed(config):
  with pytest.raises(dataclasses.FrozenInstanceError):
    typed(config).seed = 1


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_none_is_allowed_where_declared_and_only_there(section, field):
  plain = base.get_config().to_dict()
  plain[section][field] = None
  hint = typing.get_type_hints(SECTIONS[section])[field]
  if type(None) in typing.get_args(hint):
    assert getattr(getattr(typed(plain), section), field) is None
  else:
    with pytest.raises(ValueError, match=f"^config.{section}.{field} must be .*None"):
      typed(plain)


def test_an_unknown_field_is_named_with_the_valid_ones(config):
  config.train.stepz = 1
  with pytest.raises(ValueError, match="^config.train has unknown: stepz. Its fields .* steps,"):
    typed(config)


def test_an_unknown_section_is_named_with_the_valid_ones(config):
  config.trian = {"steps": 1}
  with pytest.raises(ValueError, match="^config has unknown: trian. Its fields .* train, sample"):
    typed(config)


def test_a_missing_field_is_named_with_the_valid_ones(config):
  del config.data["seed"]
  with pytest.raises(ValueError, match="^config.data has missing: seed. Its fields are: name, "):
    typed(config)


def test_a_missing_model_name_is_named(config):
  del config.model["name"]
  with pytest.raises(ValueError, match="^config.model needs a field `name`"):
    typed(config)


@pytest.mark.parametrize(
  ("section", "field", "value", "complaint"),
  [
    ("train", "steps", "10", "steps must be int; got '10'"),
    ("train", "steps", 1.5, "steps must be int; got 1.5"),
    ("train", "steps", True, "steps must be int; got True"),
    ("train", "learning_rate", "fast", "learning_rate must be float; got 'fast'"),
    ("train", "learning_rate", False, "learning_rate must be float; got False"),
    ("data", "num_examples", 2.0, "num_examples must be int; got 2.0"),
    ("data", "name", 3, "name must be str; got 3"),
    ("model", "name", 3, "name must be str; got 3"),
    ("curvature", "skip", "norm", "skip must be a sequence; got 'norm'"),
    ("curvature", "skip", ("norm", 1), r"skip\[1\] must be str; got 1"),
  ],
)
def test_a_mistyped_field_is_named_with_its_type(section, field, value, complaint):
  plain = base.get_config().to_dict()
  plain[section][field] = value
  with pytest.raises(ValueError, match=rf"^config.{section}.{complaint}"):
    typed(plain)


def test_a_field_in_place_of_a_section_is_refused():
  plain = base.get_config().to_dict() | {"train": 3}
  with pytest.raises(ValueError, match="^config.train must be a section of fields; got 3"):
    typed(plain)


@pytest.mark.parametrize(
  "path", ["seed", "train", "train.steps", "data.num_examples", "model.channels", "model.any.thing"]
)
def test_paths_to_fields_are_known(path):
  check_path(path)


@pytest.mark.parametrize(
  ("path", "complaint"),
  [
    ("trian.steps", "config has no field trian. Its fields are: seed, data, "),
    ("train.stepz", "config.train has no field stepz. Its fields are: steps, batch_size, "),
    ("train.steps.more", "config.train.steps is a field, not a section"),
    ("data.path.more", "config.data.path is a field, not a section"),
    ("", "config has no field "),
  ],
)
def test_other_paths_are_refused_with_the_valid_ones(path, complaint):
  with pytest.raises(ValueError, match=f"^{complaint}"):
    check_path(path)


@pytest.fixture(scope="module")
def read_names():
  """(owner, name) of each `owner.name` in jaxinf outside config.py, such as ("train", "steps")."""
  names = set()
  for path in (ROOT / "jaxinf").rglob("*.py"):
    nodes = ast.walk(ast.parse(path.read_text())) if path.name != "config.py" else ()
    for node in (node for node in nodes if isinstance(node, ast.Attribute)):
      owner = node.value
      names.add((getattr(owner, "id", None) or getattr(owner, "attr", None), node.attr))
  return names


@pytest.mark.parametrize(("section", "field"), [*FIELDS, *(("config", name) for name in SECTIONS)])
def test_every_field_has_a_reader(section, field, read_names):
  # Sections travel under their own name, or as `config` or `section`.
  assert {(owner, field) for owner in (section, "config", "section")} & read_names
