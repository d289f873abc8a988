"""Notebooks are whole, start alike, use what is documented; and the quickstart runs.

`make notebooks` executes all of them and writes their outputs. Here the first runs on a small model
and few draws.
"""

import ast
import json
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

import jaxinf

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"quickstart", "your_own_model", "is_it_true", "choosing", "latent_diffusion"}
MOST_BYTES = 400_000
FEWER = {  # images, widths, steps and draws
  'DataConfig(name="digits")': 'DataConfig(name="digits", num_examples=30)',
  "hidden=(128, 128, 128)": "hidden=(8,)",
  "steps=4000": "steps=4",
  "warmup_steps=400": "warmup_steps=1",
  'sampler="ddim"': 'sampler="ddim", num_steps=2',
  "Draws(100)": "Draws(2)",
  "Draws(200, replicates=5)": "Draws(10, replicates=5)",
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
  return "".join(cell["source"])


def test_these_are_the_notebooks():
  assert {path.stem for path in NOTEBOOKS} == NAMES


@each_notebook
def test_outputs_are_committed(path):
  """A notebook of format 4.5, executed once from top to bottom without errors, with a picture."""
  text = path.read_text()
  notebook, code = json.loads(text), cells(path, "code")
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell["outputs"]]
  assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert len(text.encode()) <= MOST_BYTES


@each_notebook
def test_notebooks_start_alike(path):
  """The title with its badge, which opens this very notebook; then the cell that installs."""
  notebook = json.loads(path.read_text())["cells"]
  title, setup = notebook[0], source(cells(path, "code")[0])
  assert title["cell_type"] == "markdown" and notebook[1]["cell_type"] == "code"
  (repository,) = re.findall(r'SOURCE = "git\+https://github.com/(.*)"', setup)
  place = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
  assert source(title).startswith("# ") and f"]({place})" in source(title)
  assert setup == source(cells(NOTEBOOKS[0], "code")[0])


@each_notebook
def test_notebooks_use_what_is_documented(path):
  """Names are of `jaxinf` itself where it has them, and otherwise of the reference."""
  pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
  documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
  for cell in cells(path, "code"):
    if source(cell).startswith("%%"):
      continue  # a file of another program
    code = "\n".join("" if line[:1] in "%!" else line for line in source(cell).split("\n"))
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.Import):
        assert all(a.name == "jaxinf" for a in node.names if a.name.startswith("jaxinf"))
      elif isinstance(node, ast.ImportFrom) and node.module.startswith("jaxinf"):
        for alias in node.names:
          name = f"{node.module}.{alias.name}"
          assert name in documented or any(one.startswith(f"{name}.") for one in documented), name
      elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxinf":
        assert node.attr in (*jaxinf.__all__, "__version__")


@each_notebook
def test_links_lead_somewhere(path):
  text = "\n".join(source(cell) for cell in cells(path, "markdown"))
  for link in re.findall(r"\]\(([^)\s]+)\)", text):
    if not link.startswith("https://"):
      page, _, anchor = link.partition("#")
      assert (path.parent / page).is_file(), link
      words = re.findall(r"^#+ (.*)$", (path.parent / page).read_text(), re.MULTILINE)
      assert not anchor or anchor in {title.lower().replace(" ", "-") for title in words}, link


@pytest.fixture
def colab(monkeypatch, tmp_path):
  """colab(version of jax) → what pip is asked for there, while nothing is installed."""
  installed, asked = {}, []
  needs = {
    "jaxinf": ["jax<0.9.2,>=0.8.0", "jaxtyping", "kfac-jax>=0.0.8", 'jax[tpu]; extra == "tpu"'],
    "kfac-jax": ["jax>=0.4.27", "jaxlib>=0.4.27", "distrax>=0.1.3"],
  }

  def pip(command, check):
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and check
    asked.append(command[5:])
    installed.update(swapped)

  swapped: dict[str, str] = {}
  distribution = lambda name: types.SimpleNamespace(
    metadata={"Name": name}, version=installed[name]
  )
  jax.devices()  # looks for plugins among the distributions, once
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
  monkeypatch.setattr(subprocess, "run", pip)
  monkeypatch.setattr(metadata, "distributions", lambda: map(distribution, list(installed)))
  monkeypatch.setattr(metadata, "requires", needs.__getitem__)

  def run(version: str, **changes: str) -> list[list[str]]:
    swapped.update(changes)
    installed.update({"jax": version, "jaxlib": version, "jax-cuda12-plugin": version})
    installed.update({"numpy": "2.0", "tqdm": "4.0"})
    exec(source(cells(NOTEBOOKS[0], "code")[0]), {})
    return asked

  return run


@pytest.mark.parametrize("version, is_main", [("0.8.1", False), ("0.9.1", False), ("0.9.2", True)])
def test_colab_keeps_its_jax(colab, version, is_main):
  """pip is never asked for jax, and constrained to it; kfac-jax is the one that goes with it."""
  without, others = colab(version)
  assert without[0] == "--no-deps" and others[:2] == ["--constraint", "kept.txt"]
  assert without[2] == (
    "git+https://github.com/google-deepmind/kfac-jax" if is_main else "kfac-jax==0.0.8"
  )
  assert others[2:] == ["jaxtyping", "distrax>=0.1.3"]
  kept = set(Path("kept.txt").read_text().split())
  pins = {f"{name}=={version}" for name in ("jax", "jaxlib", "jax-cuda12-plugin")}
  assert kept == {*pins, "numpy==2.0"}


def test_colab_says_where_its_jax_was_swapped(colab):
  with pytest.raises(RuntimeError, match="pip changed .* start a new runtime"):
    colab("0.9.1", jaxlib="0.9.0")


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
  """And what it predicts is a sum of scores, negative ones counted half."""
  matplotlib.use("Agg")
  monkeypatch.chdir(tmp_path)
  code = "\n".join(source(cell) for cell in cells(ROOT / "notebooks/quickstart.ipynb", "code"))
  for old, new in FEWER.items():
    assert old in code, old
    code = code.replace(old, new)
  names: dict = {}
  exec(code, names)
  matplotlib.pyplot.close("all")
  scores = names["scores"]
  gone = scores.values[:, scores.top(10).positions[0]]
  sums = np.where(gone < 0, gone / 2, gone).sum(axis=1) / 30
  np.testing.assert_allclose(names["without"].changes, sums, rtol=1e-4, atol=1e-9)
  assert capsys.readouterr().out.count("sample ") == 6
