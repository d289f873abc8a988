"""Several dampings in one pass over the training gradients."""

import numpy as np
import pytest

import jaxinf
from jaxinf.engine.progress import Progress
from tests import nets

NUM_TRAIN, NUM_QUERIES = 11, 3
DAMPINGS = [1e-3, 1e-8, 1e-1]
SETTINGS = dict(draws=4, seed=5, draw_groups=2)


@pytest.fixture(scope="module")
def problem():
  task = nets.conv_task()
  train, queries = nets.random_images(NUM_TRAIN), nets.random_images(NUM_QUERIES, seed=1)
  return task, jaxinf.fit_curvature(task, train, draws=20, seed=0), queries, train


@pytest.fixture(scope="module", params=["int8", None])
def compression(request):
  return request.param


@pytest.fixture(scope="module")
def sweep(problem, compression):
  return jaxinf.influence(*problem, **SETTINGS, damping=DAMPINGS, compression=compression)


def without_check(settings):
  """The compression check is measured, to float32 rounding."""
  return {name: value for name, value in settings.items() if name != "check"}


def test_a_sweep_equals_separate_calls(problem, compression, sweep):
  assert isinstance(sweep, tuple) and len(sweep) == len(DAMPINGS)
  for damping, scores in zip(DAMPINGS, sweep, strict=True):
    alone = jaxinf.influence(*problem, **SETTINGS, damping=damping, compression=compression)
    assert isinstance(alone, jaxinf.Scores) and without_check(scores.settings) == without_check(
      alone.settings
    )
    assert scores.settings["damping"] == damping
    # A product with more query rows may sum in another order: float32 rounding.
    atol = 1e-6 * np.abs(alone.group_values).max()
    np.testing.assert_allclose(scores.group_values, alone.group_values, rtol=0, atol=atol)
    np.testing.assert_array_equal(scores.query_ids, alone.query_ids)
    np.testing.assert_array_equal(scores.train_ids, alone.train_ids)
  # And dampings do matter here: no scores are mistaken for others.
  assert not np.allclose(sweep[0].values, sweep[2].values, rtol=0.1)


def test_a_sweep_does_not_depend_on_batches_or_devices(problem, devices, compression, sweep):
  """Batches so small that queries are preconditioned in several parts."""
  again = jaxinf.influence(
    *problem, **SETTINGS, damping=DAMPINGS, compression=compression, batch_size=4, devices=devices
  )
  for ours, expected in zip(again, sweep, strict=True):
    # int8: a number at the border of two steps may be rounded either way.
    tolerance = 1e-5 if compression is None else 1e-2
    atol = tolerance * np.abs(expected.group_values).max()
    np.testing.assert_allclose(ours.group_values, expected.group_values, rtol=0, atol=atol)


@pytest.mark.parametrize("damping", [1e-3, DAMPINGS, np.array(DAMPINGS), tuple(DAMPINGS)])
def test_gradients_are_computed_once_however_many_dampings(problem, damping, monkeypatch):
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
  scores = jaxinf.influence(*problem, **SETTINGS, damping=damping)
  del passes[None]  # of the sample on which compression is checked
  assert passes == {"query gradients": NUM_QUERIES * 2, "training gradients": NUM_TRAIN * 2}
  assert isinstance(scores, tuple) == isinstance(damping, list | tuple | np.ndarray)


def test_a_sequence_of_one_gives_a_tuple_of_one(problem):
  (scores,) = jaxinf.influence(*problem, **SETTINGS, damping=[1e-3])
  assert scores.values.shape == (NUM_QUERIES, NUM_TRAIN)


@pytest.mark.parametrize(
  ("damping", "message"),
  [
    ([], "a number or a non-empty sequence"),
    ([[1e-3]], "a number or a non-empty sequence"),
    ([1e-3, 0.0], "damping must be positive .*got 0.0"),
    ([-1.0], "damping must be positive"),
    ([1e-3, float("nan")], "damping must be positive"),
    ([1e-3, 1, 1e-3], r"Each damping must be given once; got \[0.001, 1.0, 0.001\]"),
  ],
)
def test_impossible_dampings_are_refused(problem, damping, message):
  with pytest.raises(ValueError, match=message):
    jaxinf.influence(*problem, **SETTINGS, damping=damping)
