"""Writing a config for data of one's own: commented, small enough to begin with, and checked."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jaxinf import data as data_sets
from jaxinf.core.registry import named
from jaxinf.data import DATASETS, DataConfig, Dataset
from jaxinf.engine.artifacts import write_text
from jaxinf.runs.config import typed

_SIZE = 32  # pixels that pictures are resized to where they are larger, or differ
_FROM_FILES = ("arrays", "folder", "artbench", "artbench2")  # data sets that read `path`
_LOOKED_AT = ("arrays", "folder", "digits")  # those that are loaded in seconds

_TEMPLATE = '''"""{title}

jaxinf plan --config={file}  # what it will take here
jaxinf all --config={file} --workdir={workdir}  # train, sample, attribute, report

`jaxinf STAGE --help` lists what there is to set, with the defaults that hold where nothing is set.
"""

from ml_collections import ConfigDict

from jaxinf.runs.config import default_config


def get_config() -> ConfigDict:
  config = default_config()
{lines}
  return config
'''


def new(file: str, *, data: str = "folder", path: str | None = None) -> str:
  """Writes a config, and returns what to do next.

  Args:
    file: where, a name that ends in .py; none may be there.
    data: one of jaxinf.data.DATASETS.
    path: of the data, where they lie in files.

  Raises:
    ValueError: the file is there, or the data cannot be read.
  """
  place = Path(file).expanduser()
  if place.suffix != ".py":
    raise ValueError(f"A config is a Python file, such as my_config.py; got {file}.")
  if place.exists():
    raise ValueError(f"{file} is there already: choose another name, or remove it first.")
  if not place.absolute().parent.is_dir():
    raise ValueError(f"There is no folder {place.absolute().parent}: make it first.")
  section, dataset = _section(data, path)
  text = _text(file, section, dataset)
  _check(text)
  write_text(place, text)
  return f"{file} is written. Next: jaxinf plan --config={file}"


def _section(name: str, path: str | None) -> tuple[DataConfig, Dataset | None]:
  """The section `data`, and the data set where that is looked at.

  Pictures of a folder that are large, or differ in size, are resized.
  """
  named(DATASETS, name, "data set")
  if (path is None) == (name in _FROM_FILES):
    raise ValueError(
      f"Data set {name} {'reads' if path is None else 'does not read'} files: "
      f"{'say where they are' if path is None else 'leave out'} --path."
    )
  where = None if path is None else str(Path(path).expanduser().absolute())
  section = DataConfig(name, path=where)
  if name.startswith("artbench"):
    return dataclasses.replace(section, image_size=_SIZE), None
  if name not in _LOOKED_AT:
    return section, None
  try:
    dataset = data_sets.load(section)
  except ValueError as error:
    if "Set data.image_size" not in str(error):
      raise
    dataset = None
  if name == "folder" and (dataset is None or max(dataset.image_shape[:2]) > 2 * _SIZE):
    section = dataclasses.replace(section, image_size=_SIZE)
    dataset = data_sets.load(section)
  return section, dataset


def _text(file: str, section: DataConfig, dataset: Dataset | None) -> str:
  shape = (_SIZE, _SIZE, 3) if dataset is None else dataset.image_shape
  size = "" if dataset is None else f": {len(dataset):,} examples of {' × '.join(map(str, shape))}"
  groups = [_of_data(section), _of_model(shape), _SETTINGS]
  return _TEMPLATE.format(
    title=f"A diffusion model of {section.path or section.name}{size}.",
    file=file,
    workdir=f"runs/{Path(file).stem}",
    lines="\n\n".join("\n".join(f"  {line}".rstrip() for line in group) for group in groups),
  )


def _of_data(section: DataConfig) -> list[str]:
  lines = [f"config.data.name = {json.dumps(section.name)}"]
  if section.path is not None:
    lines.append(f"config.data.path = {json.dumps(section.path, ensure_ascii=False)}")
  if section.image_size is not None:
    lines += [
      "# Pictures are cropped and resized to squares of this side. Larger ones take a larger",
      "# network, more steps and far more time.",
      f"config.data.image_size = {section.image_size}",
    ]
  return [
    *lines,
    "# A subset to try things out; None: all examples.",
    "config.data.num_examples = None",
  ]


def _of_model(shape: tuple[int, ...]) -> list[str]:
  """A small U-Net of images, as deep as their sides can be halved; a perceptron of other data."""
  if len(shape) != 3:
    width = min(512, 64 * math.ceil(math.prod(shape) / 64))
    fields = f'"name": "mlp", "hidden": ({width}, {width}, {width}), "time_features": 32'
    return [
      "# A multilayer perceptron: hidden widths, and sinusoidal features of time.",
      f"config.model = ConfigDict({{{fields}}})",
    ]
  halvings = math.gcd(*shape[:2], 4).bit_length() - 1
  levels = max(1, min(3, halvings + 1))
  return [
    "# A small U-Net: channels of each level, of which each but the last halves the resolution.",
    f"config.model.channels = {(32, 64, 64)[:levels]}",
    "config.model.blocks_per_level = 1",
    f"config.model.attention_levels = {(False,) * levels}",
    "config.model.norm_groups = 8",
    "config.model.dropout = 0.0",
  ]


def _check(text: str) -> None:
  """Raises ValueError where the config is none, or its model cannot be."""
  names: dict[str, Any] = {}
  exec(compile(text, "config", "exec"), names)
  typed(names["get_config"]())


# What a first run on a laptop needs less of than the paper's defaults.
_SETTINGS = [
  "# Enough to see something; sharp samples of photographs take ten times as many and more.",
  "config.train.steps = 5_000",
  "config.train.batch_size = 64",
  "config.train.learning_rate = 5e-4",
  "config.train.warmup_steps = 250",
  'config.train.decay = "cosine"',
  "config.train.checkpoint_every = 1_000",
  "",
  "# The samples that are explained.",
  "config.sample.num_samples = 16",
  "config.sample.batch_size = 16",
  "",
  "# Draws of (t, noise) for each training example, in the curvature and in the scores; more take",
  "# more time and leave less noise. `replicates` of them give the standard errors.",
  "config.curvature.draws = 12",
  "config.attribute.draws = 16",
  "config.attribute.replicates = 4",
  "config.attribute.query_draws = 96",
  "config.index.draws = 16",
  "config.query.draws = 96",
]
