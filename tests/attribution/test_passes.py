"""The score pass in pieces: blocks of queries, batches kept on disk, and what it checks itself."""

import numpy as np
import pytest

import jaxinf
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import PartialOutputs, Resume
from tests import nets

NUM_TRAIN, NUM_QUERIES = 11, 3
SETTINGS = dict(damping=[1e-3, 1e-6], draws=4, seed=5, draw_groups=2, batch_size=8)


@pytest.fixture(scope="module")
def problem():
  task = nets.conv_task()
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  return task, jaxinf.fit_curvature(task, train, draws=20, seed=0), queries, train


@pytest.fixture(scope="module")
def whole(problem):
  return jaxinf.influence(*problem, **SETTINGS)


def assert_equal(found, expected):
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours.group_values, theirs.group_values)
    np.testing.assert_array_equal(ours.query_group_values, theirs.query_group_values)


@pytest.mark.parametrize("blocks", [2, 5, 12, 100])
def test_blocks_of_queries_give_the_same_scores(problem, whole, blocks):
  """12 rows (2 dampings, 3 queries, 2 groups), of which one block is on the devices at a time."""
  found = jaxinf.influence(*problem, **SETTINGS, query_blocks=blocks)
  for ours, theirs in zip(found, whole, strict=True):
    # A product with fewer rows may sum in another order: float32 rounding.
    atol = 1e-6 * np.abs(theirs.group_values).max()
    np.testing.assert_allclose(ours.group_values, theirs.group_values, rtol=0, atol=atol)


class Killed(BaseException):
  pass


@pytest.mark.parametrize("every", [1, 2])
def test_a_stopped_pass_goes_on_and_gives_bitwise_the_same(
  problem, whole, tmp_path, monkeypatch, every
):
  """22 rows in batches of 4: six batches, stopped after the second saving."""
  saved = []
  save = PartialOutputs.save

  def save_then_die(self, outputs):
    save(self, outputs)
    saved.append(sum(map(len, outputs)))
    if len(saved) == 2:
      raise Killed

  monkeypatch.setattr(PartialOutputs, "save", save_then_die)
  resume = Resume(tmp_path, every=every)
  with pytest.raises(Killed):
    jaxinf.influence(*problem, **SETTINGS, resume=resume)
  assert_equal(jaxinf.influence(*problem, **SETTINGS, resume=resume), whole)
  assert sum(saved) == NUM_TRAIN * 2  # nothing was computed twice
  again = jaxinf.influence(*problem, **SETTINGS, resume=resume)
  assert_equal(again, whole)
  assert sum(saved) == NUM_TRAIN * 2


def test_kept_rows_of_other_settings_or_damaged_ones_are_refused(problem, tmp_path):
  resume = Resume(tmp_path, every=1)
  jaxinf.influence(*problem, **SETTINGS, resume=resume)
  with pytest.raises(StaleArtifact, match="seed: 5 → 6"):
    jaxinf.influence(*problem, **(SETTINGS | {"seed": 6}), resume=resume)
  task, curvature, queries, train = problem
  with pytest.raises(StaleArtifact, match="inputs"):
    jaxinf.influence(task, curvature, queries[::-1], train, **SETTINGS, resume=resume)
  first = min(tmp_path.rglob("rows-*.npz"))
  first.write_bytes(first.read_bytes()[:-40])
  with pytest.raises(ValueError, match=f"{first} cannot be read"):
    jaxinf.influence(*problem, **SETTINGS, resume=resume)


def test_compression_is_measured_on_a_sample(problem, whole):
  """The check is what comparing with float32 queries gives, on these few images on all of them."""
  exact = jaxinf.influence(*problem, **SETTINGS, compression=None)
  for ours, theirs in zip(whole, exact, strict=True):
    check = ours.settings["check"]
    assert check["num_examples"] == NUM_TRAIN and "check" not in theirs.settings
    assert 0.99 < check["least_pearson"] <= check["pearson"] <= 1
    assert check["pearson"] == pytest.approx(
      np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in query_rows(ours, theirs)]),
      abs=1e-3,
    )


def query_rows(ours, theirs):
  """Scores of each query's group of draws are not public; those of their means are near."""
  return zip(
    np.moveaxis(ours.group_values, 1, 0), np.moveaxis(theirs.group_values, 1, 0), strict=True
  )


def test_rounded_products_are_measured_too(problem):
  settings = SETTINGS | {"damping": 1e-3}
  exact = jaxinf.influence(*problem, **settings, compression=None)
  rounded = jaxinf.influence(*problem, **settings, compression=None, precision="bfloat16")
  assert not np.array_equal(rounded.values, exact.values)
  check = rounded.settings["check"]
  # bfloat16 has 8 bits; sums over pixels and draws average its rounding.
  assert 0.99 < check["least_pearson"] < 1
  np.testing.assert_allclose(
    rounded.values, exact.values, rtol=0, atol=0.05 * np.abs(exact.values).max()
  )
