"""What a user meets around the numbers: names, order of arguments, ids, logs, and messages."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import stats

import jaxinf
from jaxinf import Compute, Draws, Examples
from tests.twins import assert_close

SCORING = {
  "influence": (jaxinf.influence, 1),
  "influence_sweep": (jaxinf.influence_sweep, 1),
  "layer_scores": (jaxinf.layer_scores, 1),
  "posterior_covariance": (jaxinf.posterior_covariance, 1),
  "trak": (jaxinf.trak, 1),
  "dtrak": (jaxinf.dtrak, 1),
  "das": (jaxinf.das, 1),
  "journey_trak": (jaxinf.journey_trak, 1),
  "nearest_patch": (jaxinf.nearest_patch, 1),
  "pixel_similarity": (jaxinf.pixel_similarity, 0),
  "embedding_similarity": (jaxinf.embedding_similarity, 0),
  "random_scores": (jaxinf.random_scores, 0),
}


@pytest.mark.parametrize("name", SCORING)
def test_queries_and_training_examples_are_never_told_apart_by_their_order(problem, name):
  function, num = SCORING[name]
  with pytest.raises(TypeError, match="positional argument"):
    function(*[problem["curvature"]][:num], problem["queries"], problem["train"])


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("Task", "DiffusionModel"),
    ("DrawDesign", "Draws"),
    ("AutoDraws", "Draws.until_stable"),
    ("Resume", "Checkpointing"),
    ("build_index", "build_store"),
    ("open_index", "open_store"),
  ],
)
def test_old_names_say_what_they_are_now(old, new):
  with pytest.raises(AttributeError, match=rf"jaxinf\.{old} is now jaxinf\.") as caught:
    getattr(jaxinf, old)
  (said,) = re.findall(r"jaxinf\.([\w.]+)\(.*", str(caught.value).split("is now ")[1])
  assert new in str(caught.value) and hasattr(jaxinf, said.split(".")[0])


def test_every_public_name_is_there():
  for name in jaxinf.__all__:
    assert getattr(jaxinf, name) is not None
  with pytest.raises(AttributeError, match="has no attribute 'influense'"):
    jaxinf.influense  # noqa: B018


def test_importing_leaves_the_root_logger_to_the_user():
  program = """
import logging
import jaxinf
logging.basicConfig(level=logging.INFO, format="user: %(message)s")
assert len(logging.getLogger().handlers) == 1, logging.getLogger().handlers
logging.getLogger("jaxinf").info("heard")
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert "user: heard" in done.stderr


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    (["a", "b", "a"], "ids must be different; got more than once: 'a'"),
    ([7, 8, 7], "got more than once: 7"),
    (["a", 1, 2], "ids must all be integers or all be strings; got both"),
    ([0.5, 1.5, 2.5], "Ids must be integers or strings, not float64"),
    ([-1, 0, 1], r"lie in \[0, 2\*\*32\)"),
    ([1, 2], r"ids must be 3 different ids, one an example; got shape \(2,\)"),
  ],
)
def test_ids_that_could_not_be_keys_are_refused_by_name(ids, message):
  with pytest.raises(ValueError, match=message):
    Examples(np.zeros((3, 2), np.float32), ids)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(num=True), "the number of draws must be a whole number; got True"),
    (dict(num=0), "the number of draws must be at least 1"),
    (dict(seed=-1), r"seed must be a whole number in \[0, 2\*\*32\); got -1"),
    (dict(seed=2**40), "seed must be"),
    (dict(num=10, replicates=3), "10 draws do not split into 3 equal replicates"),
    (dict(timesteps="strat"), "Unknown timesteps 'strat'; there are: stratified, uniform"),
  ],
)
def test_draws_that_are_none_are_refused_by_name(arguments, message):
  with pytest.raises(ValueError, match=message):
    Draws(**arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(agreement=0.0), "agreement must lie in"),
    (dict(top_k=0), "top_k must be at least 1"),
    (dict(replicates=1), "replicates must be at least 2"),
    (dict(most=0), "most must be at least 1"),
    (dict(most=8), "A round has 32 draws, more than the most, 8"),
  ],
)
def test_impossible_stopping_rules_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Draws.until_stable(**arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(batch_size=0), "batch_size must be at least 1; got 0"),
    (dict(query_chunk=0), "query_chunk must be at least 1; got 0"),
    (dict(block_mib=0), "block_mib must be positive; got 0"),
  ],
)
def test_impossible_ways_of_computing_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Compute(**arguments)


def test_numbers_of_numpy_are_numbers(problem):
  one, other = (
    jaxinf.influence(**problem, damping=1e-3, compression=None, draws=draws)
    for draws in (Draws(np.int32(4), seed=np.uint32(5)), Draws(4, seed=5))
  )
  np.testing.assert_array_equal(one.values, other.values)


def test_a_store_splits_draws_as_influence_does_by_default(problem, tmp_path):
  """The same draws of the same examples, in the same replicates: but for compression, equal."""
  draws = Draws(10, seed=5)
  for compression in (None, "int8"):
    store = jaxinf.build_store(
      tmp_path / f"{compression}", problem["curvature"], train=problem["train"], draws=draws,
      compression=compression,
    )  # fmt: skip
    found = store.query(problem["queries"], damping=1e-3, draws=draws)
    expected = jaxinf.influence(**problem, damping=1e-3, draws=draws, compression=None)
    for name in ("replicates", "query_replicates"):
      assert found.settings[name] == expected.settings[name]
    if compression is None:
      assert_close(found.replicate_values, expected.replicate_values, 1e-5)
    ranks = stats.spearmanr(found.values.ravel(), expected.values.ravel()).statistic
    assert ranks > (0.99999 if compression is None else 0.99)


@pytest.mark.parametrize(
  "flags",
  [
    lambda: jax.enable_x64(True),
    lambda: jax.default_prng_impl("rbg"),
    lambda: jax.threefry_partitionable(False),
  ],
  ids=["x64", "rbg", "partitionable"],
)
def test_global_flags_of_the_user_change_no_number(problem, scores, settings, flags):
  """Curvature and scores, whatever batches they come in."""
  model, train = problem["curvature"].model, problem["train"]
  with flags():
    with pytest.warns(UserWarning, match="worse than predicting zero"):  # the network is random
      curvature = jaxinf.fit_curvature(model, train, draws=Draws(20), compute=Compute(7))
    found = jaxinf.influence(
      curvature, queries=problem["queries"], train=train, **settings, compute=Compute(6)
    )
  # Sums of float32 in another order, conditioned by the damping.
  assert_close(found.replicate_values, scores.replicate_values, 1e-4)
