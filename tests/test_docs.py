"""The documentation is whole, and its examples run as they stand, on a small model and few draws.

Those of docs/any_model.md are in networks/test_any_model.py, and that of docs/index.md, which is
the README's, in test_readme.py.
"""

import doctest
import importlib
import re
import shutil
import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxinf
from jaxinf.benchmark import judged
from jaxinf.data import DATASETS
from jaxinf.runs.stage import STAGES
from tests.test_architecture import GROUND, LIBRARY, PROGRAMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))
)
EXAMPLES = sorted(  # modules that have any in their docstrings
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in (ROOT / "jaxinf").rglob("*.py")
  if "    >>> " in path.read_text()
)
TINY_AUTOENCODER = Path(__file__).parent / "networks" / "fixtures" / "autoencoder-tiny"
# As few draws as repeat, and dimensions of a projection as the model has.
FEWER = {"Draws(250": "Draws(40", "projection=2048": "projection=8"}


@pytest.fixture(scope="module")
def given() -> dict:
  """What the pages take for granted: a network of 27 parameters, and a few images."""
  rng = np.random.default_rng(0)
  of = lambda *shape: rng.normal(size=shape).astype(np.float32)

  def apply_fn(params, x_t, t):
    hidden = jnp.tanh(x_t.reshape(len(x_t), -1) @ params["w"] + params["b"])
    return (hidden @ params["out"]).reshape(x_t.shape)

  params = {"w": of(4, 3), "b": of(3), "out": of(3, 4)}
  schedule = jaxinf.Schedule.linear(1000, 1e-4, 0.02)
  return {
    "apply_fn": apply_fn,
    "params": params,
    "other_params": {name: array + np.float32(0.1) for name, array in params.items()},
    "retrained_params": [params, {name: 1.1 * value for name, value in params.items()}],
    "schedule": schedule,
    "model": jaxinf.DiffusionModel(apply_fn, params, jaxinf.Process.epsilon(schedule)),
    "images": of(12, 2, 2, 1),
    "samples": of(3, 2, 2, 1),
    "new_images": of(3, 2, 2, 1),
    "more_images": of(2, 2, 2, 1),
    "more_ids": [100, 101],
    "values": of(100, 2, 3),
    "pixels": rng.integers(0, 256, (2, 4, 8, 3)).astype(np.uint8),
  }


@pytest.fixture
def run(given, tmp_path, monkeypatch):
  """page → its names after all of its Python blocks, run one after another in an empty folder."""
  monkeypatch.chdir(tmp_path)

  def names_of(page: str) -> dict:
    text = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    for old, new in FEWER.items():
      text = text.replace(old, new)
    names = dict(given)
    exec(text, names)
    return names

  return names_of


def test_processes_are_made_as_shown(run):
  """v̂ made from ε̂ has the target v where ε̂ is ε, and weights [T] that make the losses equal."""
  names = run("process.md")
  x_t, t = names["images"], np.full(12, 500, np.int32)
  noise, v = names["noise"], names["v"]
  outputs = (model.apply_fn(model.params, x_t, t) for model in (noise, v))
  first, second = (m.process.noise(x_t, t, y) for m, y in zip((noise, v), outputs, strict=True))
  np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
  weight = noise.process.weights(t) * v.process.noise_error_scale(t)
  np.testing.assert_allclose(v.process.weights(t), weight, rtol=1e-6)


def test_a_curvature_is_read_as_it_was_written(run):
  names = run("curvature.md")
  assert names["curvature"].kind == jaxinf.KFAC()
  assert names["exact"].kind == jaxinf.ExactGGN(names["solver"])


def test_gradients_are_spent_and_kept(run):
  names = run("gradients.md")
  assert names["scores"].values.shape == (3, 12)
  assert names["best"].ids.shape == (3, 10)
  assert len(names["store"]) == 13


def test_questions_are_asked(run):
  """Sums over queries and over groups of them are those of the scores that they are made of."""
  names = run("questions.md")
  scores, by_artist = names["scores"], names["by_artist"]
  np.testing.assert_allclose(names["every"].values[0], scores.values.mean(axis=0), rtol=1e-4)
  difference = by_artist.values[0] - by_artist.values[1]
  place = names["most"].positions[0]
  np.testing.assert_allclose(names["most"].values[0], difference[place], rtol=1e-3)
  assert (names["odd"].std_errors > 0).all() and len(names["other"].ids) == 12
  distances = names["moved"].values
  assert distances.shape == (2, 3) and (distances[0] == 0).all() and (distances[1] > 0).all()


def test_data_are_given_with_labels_and_text(run):
  train = run("data.md")["train"]
  found = {name: (x.shape, x.dtype) for name, x in train.conditioning.items()}
  assert found == {"labels": ((4,), np.int32), "text": ((4, 5), np.float32)}
  assert train.data.shape == (4, 4, 4, 3)


def test_methods_are_compared_by_retrained_models(run, capsys):
  names = run("retraining.md")
  assert set(names["ldses"]) == {"influence", "trak"}
  assert names["between"].shape == (3, 10) and (names["between"] > 0).all()
  assert names["change"].model_std_errors.shape == (3,)
  assert "p against influence" in capsys.readouterr().out


def test_the_leaderboard_is_what_the_truths_say(run):
  """The tables letter for letter; and the example, whose pixels are judged as ours were."""
  *_, tables = (DOCS / "leaderboard.md").read_text().partition("-->\n")
  assert tables == judged("all", None) + "\n"
  names = run("leaderboard.md")
  truth, found = names["truth"], names["found"]
  (ours,) = (one.lds["loss"] for one in truth.references if one.name == "pixel")
  # Predictions of ours are kept in float32, where two of a hundred may change places.
  assert found.ldses[0].mean == pytest.approx(ours["mean"], abs=1e-3)
  np.testing.assert_allclose(found.ldses[0].interval, ours["interval"], atol=1e-3)
  np.testing.assert_array_equal(jaxinf.Scores.load("mine.npz").values, names["scores"].values)


def test_images_become_latents_and_images_again(run, tmp_path):
  shutil.copytree(TINY_AUTOENCODER, tmp_path / "stable-diffusion" / "vae")
  names = run("latent.md")
  assert names["train"].data.shape == names["fresh"].shape == (2, 2, 4, 2)
  assert names["decoded"].shape == names["large"].shape == names["pixels"].shape
  assert names["fresh_each_draw"].shape == names["train"].shape
  again = jaxinf.load_autoencoder("my-vae")
  assert again.fingerprint == names["autoencoder"].fingerprint


def text_of(page: Path) -> str:
  """A page without its blocks of code."""
  return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def pages_of(nav) -> list[str]:
  """The pages that a part of mkdocs.yml's nav names."""
  if isinstance(nav, str):
    return [nav]
  parts = nav.values() if isinstance(nav, dict) else nav
  return [page for part in parts for page in pages_of(part)]


def anchors(page: Path) -> set[str]:
  """What headings are linked by: in Python-Markdown, their ASCII words with hyphens between."""
  found = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
  plain = (
    unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode() for title in found
  )
  words = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in plain)
  return {re.sub(r"[-\s]+", "-", title) for title in words}


def test_every_page_is_in_the_site():
  named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
  there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
  assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  """Files are there, and headings in them; pictures too."""
  page = ROOT / page
  for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
    if link.startswith(("https://", "http://")):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.is_file(), link
    assert not anchor or anchor in anchors(target), link


def test_the_reference_has_every_public_name_once():
  text = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
  shown = re.findall(r"^::: jaxinf\.(\w+)$", text, re.MULTILINE)
  assert sorted(shown) == sorted(jaxinf.__all__)


def test_pages_of_tables_have_every_row():
  """Methods, stages, configs, data sets, and folders in the band that holds them."""
  titles = re.findall(r"^### (.*)$", (DOCS / "methods.md").read_text(), re.MULTILINE)
  methods = re.findall(r"`([\w-]+)`", " ".join(titles))
  assert sorted(methods) == sorted(jaxinf.METHODS)
  commands = (DOCS / "command_line.md").read_text()
  names = (path.name for path in (ROOT / "configs").glob("*.py"))
  configs = {f"configs/{name}" for name in names if name != "__init__.py"}
  for name in {*STAGES, *DATASETS, *configs}:
    assert re.search(rf"`{re.escape(name)}[ `]", commands), name
  bands = re.split(r"^\*\*", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE)[1:]
  for text, rooms in zip(bands, (PROGRAMS, LIBRARY, GROUND), strict=True):
    shown = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    assert {name.removesuffix(".py") for name in shown} == rooms


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_hold(module):
  found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
  assert found.attempted and not found.failed


def test_scores_of_the_how_tos(run):
  """Dampings, draws and removals on one model: compiled once, since shapes are the same."""
  swept = run("howto/damping.md")
  assert swept["found"].fidelity.shape == (3, 3)
  drawn = run("howto/draws.md")
  np.testing.assert_array_equal(drawn["scores"].values, swept["sweep"].at(1e-8).values)
  assert drawn["trusted"].shape == (3,)
  assert drawn["scores"].settings["loss_power"] == 0.5


def test_removing_images_is_a_sum_of_scores(run):
  names = run("howto/remove_images.md")
  scores, by_artist = names["scores"], names["by_artist"]
  assert by_artist.train_ids.tolist() == ["ada", "ben", "eva"]
  expected = scores.values[:, ::3].sum(axis=1, dtype=float) / 12
  np.testing.assert_allclose(names["without_ada"], expected, rtol=1e-5)
  assert len(names["kept"]) == 7


def test_a_proof_has_a_ceiling_and_a_baseline(run, capsys):
  names = run("howto/prove_it.md")
  assert len(names["rows"]) == 6
  assert set(names["found"]) == {"influence", "pixels", "one retraining"}
  assert "NoiseCeiling" in capsys.readouterr().out


def test_conditioning_and_arrays_on_disk_are_examples(run):
  assert run("howto/labels_and_text.md")["train"].conditioning_dropout == 0.1
  assert run("howto/large_data.md")["train"].data.dtype == np.uint8
  assert len(run("howto/many_devices.md")["compute"].devices) == 1
