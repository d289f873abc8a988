"""One pass over the training gradients: several dampings at once, blocks of queries, batches kept
on disk, and what the pass checks itself."""

import dataclasses

import numpy as np
import pytest

import jaxinf
from jaxinf import Checkpointing, Compute, Draws
from jaxinf.compression.compression import LowRank
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.engine.checkpoints import PartialOutputs
from jaxinf.engine.progress import Progress
from tests.twins import INDEPENDENT, Killed, assert_close

DAMPINGS = (1e-3, 1e-8, 1e-1)
DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)
COMPUTE = Compute(batch_size=8)


@pytest.fixture(scope="module")
def sweep(problem):
  """At all dampings, of int8 queries."""

  def found(draws=DRAWS, compute=COMPUTE, compression="int8", **changes):
    return jaxinf.influence_sweep(
      **(problem | changes), dampings=DAMPINGS, draws=draws, compression=compression,
      compute=compute,
    )  # fmt: skip

  return found


@pytest.fixture(scope="module")
def whole(sweep):
  return sweep()


@pytest.fixture(scope="module")
def exact(sweep):
  return sweep(compression=None)


def assert_equal(found, expected):
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours.replicate_values, theirs.replicate_values)
    np.testing.assert_array_equal(ours.query_replicate_values, theirs.query_replicate_values)


def without_check(scores):
  """The compression's check is measured, to float32 rounding."""
  return {name: value for name, value in scores.settings.items() if name != "check"}


def test_a_sweep_equals_separate_calls(problem, whole):
  assert isinstance(whole, jaxinf.Sweep) and whole.dampings.tolist() == list(DAMPINGS)
  for damping, scores in zip(DAMPINGS, whole, strict=True):
    alone = jaxinf.influence(
      **problem, damping=damping, draws=DRAWS, compression="int8", compute=COMPUTE
    )
    assert without_check(scores) == without_check(alone)
    # A product with more query rows may sum in another order: float32 rounding.
    assert_close(scores.replicate_values, alone.replicate_values, 1e-6)
  # And dampings do matter here: no scores are mistaken for others.
  assert not np.allclose(whole[0].values, whole[2].values, rtol=0.1)


def test_a_sweep_does_not_depend_on_batches_or_devices(sweep, exact, devices):
  """Batches so small that queries are preconditioned in several parts."""
  again = sweep(compute=Compute(batch_size=4, devices=devices), compression=None)
  for ours, expected in zip(again, exact, strict=True):
    assert_close(ours.replicate_values, expected.replicate_values, 1e-5)


def test_gradients_are_computed_once_however_many_dampings(sweep, monkeypatch):
  passes = {}

  class Recorded(Progress):
    def __init__(self, label, *args, **kwargs):
      assert label not in passes
      passes[label] = 0
      self._name = label
      super().__init__(label, *args, **kwargs)

    def advance(self, amount):
      passes[self._name] += amount
      super().advance(amount)

  monkeypatch.setattr("jaxinf.engine.maps.Progress", Recorded)
  sweep(compression=None)
  assert passes == {"query gradients": 3 * 2, "training gradients": 11 * 2}


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_queries_in_parts_give_the_same_scores(sweep, whole, chunk):
  for ours, theirs in zip(
    sweep(compute=dataclasses.replace(COMPUTE, query_chunk=chunk)), whole, strict=True
  ):
    # A product with fewer rows may sum in another order: float32 rounding.
    assert_close(ours.replicate_values, theirs.replicate_values, 1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_pass_goes_on_and_gives_bitwise_the_same(
  sweep, whole, tmp_path, monkeypatch, every
):
  """22 rows in batches of 4: six batches, killed after the second saving."""
  saved = []
  save = PartialOutputs.save

  def save_then_die(self, outputs):
    save(self, outputs)
    saved.append(sum(map(len, outputs)))
    if len(saved) == 2:
      raise Killed

  monkeypatch.setattr(PartialOutputs, "save", save_then_die)
  compute = dataclasses.replace(COMPUTE, checkpoint=Checkpointing(tmp_path, every))
  with pytest.raises(Killed):
    sweep(compute=compute)
  assert_equal(sweep(compute=compute), whole)
  assert sum(saved) == 11 * 2  # nothing was computed twice
  assert_equal(sweep(compute=compute), whole)
  assert sum(saved) == 11 * 2


def test_kept_rows_of_other_settings_or_damaged_ones_are_refused(problem, sweep, tmp_path):
  compute = dataclasses.replace(COMPUTE, checkpoint=Checkpointing(tmp_path, every=1))
  sweep(compute=compute)
  with pytest.raises(StaleArtifact, match="seed: 5 → 6"):
    sweep(compute=compute, draws=dataclasses.replace(DRAWS, seed=6))
  with pytest.raises(StaleArtifact, match="inputs"):
    sweep(compute=compute, queries=problem["queries"].take(np.array([2, 1, 0])))
  first = min(tmp_path.rglob("rows-*.npz"))
  first.write_bytes(first.read_bytes()[:-40])
  with pytest.raises(ValueError, match=f"{first} cannot be read"):
    sweep(compute=compute)


def test_compression_is_measured_on_a_sample(whole, exact):
  """The check is what comparing with float32 queries gives, on these few images on all of them."""
  for ours, theirs in zip(whole, exact, strict=True):
    check = ours.settings["check"]
    assert theirs.settings["check"] is None
    assert check["num_examples"] == 11 and check["num_queries"] == 3
    assert 0.99 < check["least_pearson"] <= check["pearson"] <= 1
    # The check is of each query's replicates; those of their means are near.
    each = [np.corrcoef(*rows)[0, 1] for rows in zip(ours.values, theirs.values, strict=True)]
    assert check["pearson"] == pytest.approx(np.mean(each), abs=1e-3)


def test_rounded_products_are_measured_too(problem, exact):
  rounded = jaxinf.influence(
    **problem, damping=DAMPINGS[0], draws=DRAWS, compression=None, precision="bfloat16",
    compute=COMPUTE,
  )  # fmt: skip
  assert not np.array_equal(rounded.values, exact[0].values)
  check = rounded.settings["check"]
  # bfloat16 has 8 bits; sums over pixels and draws average its rounding.
  assert 0.99 < check["least_pearson"] < 1
  assert_close(rounded.values, exact[0].values, 0.05)


def test_a_library_user_is_warned_where_the_order_is_lost(problem):
  """Truncated to rank 1, some layers keep too little. The warning points at the user's line."""
  asked = problem | dict(damping=1e-8, draws=DRAWS, compute=COMPUTE)
  with pytest.warns(UserWarning, match="changed the order of the scores") as warned:
    scores = jaxinf.influence(**asked, compression=LowRank(1))
  assert scores.settings["check"]["spearman"] < 0.95
  assert warned[0].filename == __file__


def test_by_default_queries_are_float32_where_less_would_lose_the_order(problem, monkeypatch):
  asked = problem | dict(damping=DAMPINGS[0], draws=DRAWS, compute=COMPUTE)
  assert jaxinf.influence(**asked).settings["compression"] == "int16"
  monkeypatch.setattr("jaxinf.attribution.influence.keeps_order", lambda check: False)
  fallen_back = jaxinf.influence(**asked)
  expected = jaxinf.influence(**asked, compression=None)
  assert fallen_back.settings == expected.settings
  assert_equal([fallen_back], [expected])


@pytest.mark.parametrize(
  ("dampings", "message"),
  [
    ([], "non-empty sequence"),
    (1e-3, "non-empty sequence"),
    ([[1e-3]], "non-empty sequence"),
    ([1e-3, 0.0], "damping must be positive .*got 0.0"),
    ([1e-3, float("nan")], "damping must be positive"),
    ([1e-3, 1, 1e-3], r"Each damping must be given once; got \[0.001, 1.0, 0.001\]"),
  ],
)
def test_impossible_dampings_are_refused(problem, dampings, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.influence_sweep(**problem, dampings=dampings, draws=DRAWS)
