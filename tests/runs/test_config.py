"""Every config file passes the door and can be run; what is unknown or mistyped passes not."""

import ast
import dataclasses
import functools
import importlib
import json
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from jaxinf import networks
from jaxinf.attribution.methods import method_named
from jaxinf.configs import base
from jaxinf.diffusion.measurements import measurement_named
from jaxinf.engine import artifacts
from jaxinf.runs.config import as_dict, refusal, settings, typed
from jaxinf.runs.run import Run, key_of
from jaxinf.runs.sections import Config, ModelConfig
from jaxinf.runs.stage import STAGES

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
DERIVED = [name for name in CONFIGS if name != "base"]
SECTIONS = typing.get_type_hints(Config)
SECTION_CLASSES = [Config, *(cls for cls in SECTIONS.values() if dataclasses.is_dataclass(cls))]
FIELDS = [
  (section, field.name)
  for section, cls in SECTIONS.items()
  if dataclasses.is_dataclass(cls) and cls is not ModelConfig
  for field in dataclasses.fields(cls)
]


@pytest.fixture
def config():
  return base.get_config()


def load(name: str) -> Config:
  return typed(importlib.import_module(f"jaxinf.configs.{name}").get_config())


def num_params(config: Config) -> int:
  """Of the model, on images as the data set has them; nothing is computed."""
  shape = {"digits": (1, 8, 8, 1)}.get(config.data.name, (1, 32, 32, 3))
  network = networks.build(config.model.name, dict(config.model.fields), out_channels=shape[-1])
  images, t = jnp.zeros(shape), jnp.zeros(1, jnp.int32)
  return networks.num_params(jax.eval_shape(network.init, jax.random.key(0), images, t))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid_and_its_model_builds(name):
  config = load(name)
  json.dumps(as_dict(config))  # as manifests hold it
  assert num_params(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_names_exists_and_finds_what_it_needs(name):
  """Methods and measurements, trajectories for those that are of them, and timesteps."""
  config = load(name)
  study, counter = config.study, config.counterfactual
  methods = (*config.score.methods, *counter.methods, *study.approximations, *study.methods)
  measurements = (
    *config.measure.measurements, *config.score.measurements, config.attribute.measurement,
    config.query.measurement, counter.measurement, study.measurement,
  )  # fmt: skip
  for method in methods:
    method_named(method)
  of_trajectories = [m for m in measurements if measurement_named(m).of == "trajectories"]
  if of_trajectories or "journey-trak" in methods:
    assert config.sample.keep_trajectory
  timesteps = (*study.timesteps, *study.change_timesteps)
  assert all(0 <= t < config.diffusion.num_steps for t in timesteps)


@pytest.mark.parametrize("name", CONFIGS)
def test_draws_split_into_replicates(name, tmp_path):
  run = Run(load(name), tmp_path)
  config, designs = run.config, []
  for section in (config.attribute, config.index, config.measure, config.score):
    designs.append((section.draws, section.replicates, section.design))
  for section in (config.attribute, config.score):
    designs.append((section.query_draws or section.draws, section.query_replicates, section.design))
  designs.append((config.query.draws, config.query.query_replicates, config.index.design))
  for num, replicates, design in designs:
    draws = run.draws(num, replicates, design)
    assert draws.size * replicates == num


@pytest.mark.parametrize("name", DERIVED)
def test_a_config_is_at_most_30_lines_from_the_one_it_starts_from(name):
  tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
  (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
  assert re.search(r"\w+\.get_config\(\)", ast.unparse(function.body[0]))
  assert isinstance(function.body[-1], ast.Return)
  assert function.body[-1].lineno - function.body[0].end_lineno - 1 <= 30


@pytest.mark.parametrize("name", DERIVED)
def test_the_docstring_says_how_to_run_it_and_what_that_costs(name):
  text = importlib.import_module(f"jaxinf.configs.{name}").__doc__
  command = rf"^python -m jaxinf (.+) --config=configs/{name}\.py --workdir=runs/{name}\b"
  assert re.search(command, text, re.M)[1] in STAGES
  assert re.search(r"\d (s|min|h|seconds|minutes|hours)\b|[Nn]ot yet measured", text)
  if size := re.search(r"(\d+\.\d) M parameters", text):
    assert size[1] == f"{num_params(load(name)) / 1e6:.1f}"


def test_the_papers_settings_stand(config):
  """Appendices J.5 – J.7; that decay is cosine for CIFAR-2 is J.7, too."""
  retrain, counter, score = config.retrain, config.counterfactual, config.score
  assert (retrain.num_subsets, retrain.num_seeds, retrain.share) == (100, 5, 0.5)
  assert (config.sample.num_samples, config.measure.draws) == (200, 5_000)
  assert (counter.shares, counter.num_queries) == ((0.02, 0.1), 5)
  assert (config.curvature.draws, score.draws, score.projection_dim) == (250, 250, 32_768)


@pytest.mark.parametrize(
  ("name", "num_train", "steps", "decay", "epochs"),
  [("cifar10", 50_000, 160_000, "constant", 410), ("cifar2", 5_000, 32_000, "cosine", 800)],
)
def test_training_takes_the_papers_steps_and_so_its_epochs(name, num_train, steps, decay, epochs):
  train, retrain = load(name).train, load(name).retrain
  assert (train.steps, train.warmup_steps, train.decay) == (steps, steps // 10, decay)
  assert retrain.steps == steps // 2  # as many epochs of half the images
  assert steps * train.batch_size / num_train == pytest.approx(epochs, rel=0.03)  # it rounds


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


@pytest.mark.parametrize("section", ["attribute", "query"])
def test_a_kind_of_damping_is_checked_at_the_door_and_in_keys_only_where_it_is_new(section):
  plain = base.get_config().to_dict()
  assert "damping_kind" not in settings(getattr(typed(plain), section))
  plain[section]["damping_kind"] = "relative"
  assert settings(getattr(typed(plain), section))["damping_kind"] == "relative"
  plain[section]["damping_kind"] = "layer"
  with pytest.raises(ValueError, match=f"{section}.damping_kind 'layer'; there are: absolute, rel"):
    typed(plain)


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


@pytest.mark.parametrize(
  ("section", "field", "near"),
  [
    ("train", "stepz", "steps"),
    ("curvature_study", "dampngs", "dampings"),
    (None, "trian", "train"),
  ],
)
def test_an_unknown_field_suggests_the_nearest(config, section, field, near):
  """Of a config file; `refusal` is the one line that the user reads."""
  with pytest.raises(AttributeError) as caught:
    setattr(config[section] if section else config, field, 1)
  expected = f'The config has no field "{field}". Did you mean "{near}" instead of "{field}"?'
  assert refusal(caught.value) == expected


def test_an_unknown_field_that_resembles_none_is_said_to_be_unknown(config):
  with pytest.raises(AttributeError) as caught:
    config.train.wxyz = 1
  assert refusal(caught.value) == 'The config has no field "wxyz".'


@pytest.mark.parametrize(
  ("unknown", "complaint"),
  [
    ({"train": {"stepz": 1}}, "config.train has no field stepz. Its fields are: steps,"),
    ({"trian": {"steps": 1}}, "config has no field trian. Its fields .* train, sample"),
  ],
)
def test_an_unknown_field_of_an_unlocked_config_is_refused(unknown, complaint):
  with pytest.raises(ValueError, match=f"^{complaint}"):
    typed(unknown)


def test_what_a_config_leaves_out_has_its_default():
  assert typed({}) == typed(base.get_config()) == Config()
  changed = typed({"train": {"steps": 5}})
  assert changed.train == dataclasses.replace(Config().train, steps=5)


def test_a_model_takes_any_field_of_its_class(config):
  config.model = ConfigDict({"name": "mlp", "hidden": (4,)})
  config.model.time_features = 2
  assert typed(config).model == ModelConfig("mlp", {"hidden": (4,), "time_features": 2})


def test_absent_values_know_their_type(config):
  for path, value in {"data.num_examples": "3", "data.path": 3, "model.head_dim": "3"}.items():
    section, field = path.split(".")
    with pytest.raises(TypeError):
      config[section][field] = value
  config.query.layers = ["dense"]
  assert config.query.layers == ("dense",)


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


# --- keys -------------------------------------------------------------------------------------


def test_a_field_that_came_later_leaves_keys_as_they_were():
  before = {"schedule": "linear", "num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
  assert settings(Config().diffusion) == before
  later = dataclasses.replace(Config().diffusion, prediction="v", shift=3.0)
  assert settings(later) == before | {"prediction": "v", "shift": 3.0}
  assert settings(dataclasses.replace(Config().sample, clip=False))["clip"] is False


def test_keys_hold_the_value_before_a_field_came_once_its_default_is_another():
  @dataclasses.dataclass(frozen=True)
  class Section:
    old: int = 1
    new: int = dataclasses.field(default=2, metadata={"before": 3})

  assert settings(Section()) == {"old": 1, "new": 2}
  assert settings(Section(new=3)) == {"old": 1}
  assert as_dict(Section(new=3)) == {"old": 1, "new": 3}


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "docs" / "results").iterdir()))
def test_committed_results_have_the_keys_of_their_configs(name):
  """What retraining cost hours for is not made again: settings, as manifests hold them."""
  folder = ROOT / "docs" / "results" / name
  run = Run(load(name), folder)
  try:
    assert run.data_content
  except ValueError as error:
    if "CIFAR-10 cannot be read" not in str(error):
      raise
    pytest.skip("needs the real CIFAR-10, which TFDS has not prepared")
  for stage in ("train", "sample"):
    assert artifacts.finished(folder / stage, key_of(run, stage))


# --- one place ---------------------------------------------------------------------------------


def assignments(function: ast.FunctionDef) -> set[str]:
  """The fields that a config file sets, as "train.steps"."""
  targets = [t for node in ast.walk(function) if isinstance(node, ast.Assign) for t in node.targets]
  return {ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)}


def test_base_is_the_defaults_of_the_sections_and_no_more():
  assert typed(base.get_config()) == Config()
  tree = ast.parse((ROOT / "configs" / "base.py").read_text())
  (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
  assert not assignments(function)


@pytest.mark.parametrize("name", DERIVED)
def test_a_config_sets_no_field_to_what_it_is_already(name):
  """Each line changes something, so that a default stands in one place."""
  tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
  (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
  start = ast.unparse(function.body[0].value.func.value)  # such as `base`
  of, now = (importlib.import_module(f"jaxinf.configs.{n}").get_config() for n in (start, name))
  for path in assignments(function):
    value = lambda config: functools.reduce(getattr, path.split(".")[1:], config)  # noqa: B023
    assert value(of) != value(now), f"{path} is so in {start}.py"


@pytest.mark.parametrize("cls", SECTION_CLASSES)
def test_every_field_has_a_default(cls):
  cls()


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
