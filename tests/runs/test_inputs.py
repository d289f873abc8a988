"""Runs on arrays of a user's own: latents, vectors and images that are not square."""

import numpy as np
import pytest

from jaxinf.engine import artifacts
from jaxinf.runs.perform import perform
from jaxinf.runs.run import load_scores
from tests.report.parsed import Page
from tests.running import run_of

NUM = 12


def normal(shape: tuple[int, ...], std: float) -> np.ndarray:
  return (std * np.random.default_rng(0).normal(size=(NUM, *shape))).astype(np.float32)


# Kind → data, whether sampling clips them to [-1, 1], and how the page shows them.
INPUTS = {
  "latents": (normal((8, 8, 4), 4.0), False, "have no picture"),
  "vectors": (normal((5,), 1.0), False, "The examples are vectors (5)"),
  "images that are not square": (np.tanh(normal((4, 9, 3), 1.0)), True, ""),
}


def changes_of(path) -> dict:
  return {
    "data.name": "arrays",
    "data.path": str(path),
    "data.num_examples": None,
    "sample.num_steps": 4,
    "report.num_queries": 1,
  }


@pytest.fixture(scope="module", params=INPUTS)
def finished(request, tmp_path_factory):
  """The name of a kind of inputs, and a finished run on them."""
  folder = tmp_path_factory.mktemp("inputs")
  np.savez(folder / "data.npz", images=INPUTS[request.param][0])
  run = run_of(folder / "work", changes_of(folder / "data.npz"))
  perform(run, "all")
  return request.param, run


def test_every_example_has_a_score_and_the_page_shows_them(finished):
  name, run = finished
  data, _, sentence = INPUTS[name]
  samples = artifacts.read(run.folder("sample")).arrays["images"]
  assert samples.shape == (3, *data.shape[1:]) and np.isfinite(samples).all()
  scores = load_scores(run)
  assert scores.values.shape == (3, NUM) and np.isfinite(scores.values).all()
  assert (np.ptp(scores.values, axis=1) > 0).all()
  page = Page((run.folder("report") / "index.html").read_text(encoding="utf-8"))
  assert sentence in page.text
  shown = 1 + 3 * run.config.report.top_k
  assert len(page.images) == (0 if name == "latents" else shown)
  if name.startswith("images"):
    assert {pixels.shape[:2] for pixels in page.pixels()} == {data.shape[1:3]}


def test_only_pixels_are_clipped_unless_the_config_says_so(finished, tmp_path):
  """sample.clip=None is what the data call for, and either way can be asked for."""
  name, run = finished
  own = artifacts.read(run.folder("sample")).arrays["images"]
  clipped = INPUTS[name][1]
  assert (np.abs(own).max() <= 1) == clipped
  for clip in (True, False):
    before = {"train": run.folder("train")}
    path = run.config.data.path
    again = run_of(tmp_path / f"{clip}", changes_of(path) | {"sample.clip": clip}, folders=before)
    perform(again, "sample")
    found = artifacts.read(again.folder("sample")).arrays["images"]
    assert np.array_equal(found, own) == (clip == clipped)
