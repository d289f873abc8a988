"""The library examples of docs/ run as they stand, on a small model and few draws.

Those of docs/any_model.md are in networks/test_any_model.py.
"""

import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf.benchmark import judged

DOCS = Path(__file__).parents[1] / "docs"
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
