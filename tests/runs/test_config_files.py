"""Configs by name and by path; and a new one for data of one's own, which runs."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxinf.networks.training import example_inputs
from jaxinf.runs.config import typed
from jaxinf.runs.config_files import CONFIGS, arranged, config_path
from jaxinf.runs.new_config import new
from jaxinf.runs.run import Run

ROOT = Path(__file__).parents[2]


def test_a_config_is_found_by_its_name_and_by_its_path(tmp_path, monkeypatch):
  assert set(CONFIGS) == {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
  monkeypatch.chdir(tmp_path)  # where there is no configs/
  for given in ("digits", "configs/digits.py"):
    assert config_path(given).read_text() == (ROOT / "configs" / "digits.py").read_text()
  own = tmp_path / "digits.py"
  for unknown in ("digits.py", "digitz", "configs/digitz.py", "elsewhere/digits.py", ""):
    with pytest.raises(
      ValueError, match=re.escape(f"--config={unknown} is no file, and no config")
    ):
      config_path(unknown)
  own.write_text("")
  assert config_path("digits.py") == Path("digits.py") and config_path(str(own)) == own
  assert config_path("digits") != own  # a name stays a name


def test_the_config_comes_first_and_the_rest_as_it_was(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("")
  words = ["train", "--config.a=1", "--workdir=w"]
  first = f"--config={file}"
  assert arranged([*words, first]) == arranged([*words, "--config", str(file)]) == [first, *words]
  assert arranged([*words, f"-config={file}:large"]) == [f"{first}:large", *words]
  assert arranged(["status", "--workdir=w"]) == ["status", "--workdir=w"]
  with pytest.raises(ValueError, match="--config.a=1 changes a field of a config, and none is"):
    arranged(words)


def written(tmp_path, **data) -> tuple[str, Run]:
  """A new config and its run."""
  file = tmp_path / "my_config.py"
  assert "jaxinf plan --config=" in new(str(file), **data)
  names = {}
  exec(file.read_text(), names)
  return file.read_text(), Run(typed(names["get_config"]()), tmp_path)


def output_shape(run: Run) -> tuple[int, ...]:
  """Of the model on one example of the data; nothing is computed."""
  shapes = jax.eval_shape(run.model.init, jax.random.key(0), *example_inputs(run.stand_in))
  inputs = example_inputs(run.stand_in)
  return jax.eval_shape(lambda p: run.model.apply(p, *inputs), shapes).shape[1:]


def test_a_new_config_of_pictures_of_any_size_runs(tmp_path):
  """They are resized, and the config says so, in lines that begin with what it is."""
  for n, size in enumerate([(40, 30), (9, 9), (64, 64)]):
    Image.new("RGB", size, (n, 0, 0)).save(tmp_path / f"it's {n}.png")
  text, run = written(tmp_path, data="folder", path=str(tmp_path))
  assert run.dataset.image_shape == output_shape(run) == (32, 32, 3)
  assert text.startswith(f'"""A diffusion model of {tmp_path}: 3 examples of 32 × 32 × 3.')
  assert "# Pictures are cropped and resized" in text
  assert max(map(len, text.splitlines()[5:])) <= 100 + len(str(tmp_path))


@pytest.mark.parametrize(
  ("shape", "channels"), [((7, 6, 1), (32,)), ((14, 28, 3), (32, 64)), ((28, 28, 1), (32, 64, 64))]
)
def test_a_new_configs_network_is_as_deep_as_pictures_can_be_halved(tmp_path, shape, channels):
  np.savez(tmp_path / "images.npz", images=np.zeros((3, *shape), np.uint8))
  _, run = written(tmp_path, data="arrays", path=str(tmp_path / "images.npz"))
  assert run.config.model.fields["channels"] == channels and output_shape(run) == shape


def test_a_new_config_of_vectors_takes_a_perceptron(tmp_path):
  np.savez(tmp_path / "vectors.npz", images=np.zeros((3, 5), np.float32))
  _, run = written(tmp_path, data="arrays", path=str(tmp_path / "vectors.npz"))
  assert run.config.model.name == "mlp" and output_shape(run) == (5,)


def test_a_new_config_replaces_none_and_needs_data_that_can_be_read(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("mine")
  cases = {
    "is there already": (file, {"data": "digits"}),
    "A config is a Python file": (tmp_path / "mine", {"data": "digits"}),
    "There is no folder": (tmp_path / "no" / "mine.py", {"data": "digits"}),
    "Unknown data set 'foldr'": (tmp_path / "new.py", {"data": "foldr"}),
    "reads files: say where they are --path": (tmp_path / "new.py", {}),
    "does not read files: leave out --path": (tmp_path / "new.py", {"data": "digits", "path": "x"}),
    "expected a folder of images, got none": (tmp_path / "new.py", {"path": str(tmp_path / "no")}),
  }
  for said, (place, data) in cases.items():
    with pytest.raises(ValueError, match=re.escape(said)):
      new(str(place), **data)
  assert file.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["mine.py"]
