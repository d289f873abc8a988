"""Counts, seeds and dampings: what is one, and that every function that takes one says so."""

import numpy as np
import pytest

import jaxinf
from jaxinf import (
  Compute,
  Draws,
  Examples,
  Projection,
  RelativeDamping,
  Schedule,
  random_subsets,
)
from jaxinf.compression.projection import RandomProjection
from jaxinf.core.checks import (
  checked_count,
  checked_damping,
  checked_dampings,
  checked_layer_dampings,
  checked_seed,
)
from jaxinf.data import Dataset
from jaxinf.engine.checkpoints import Checkpointing
from tests import nets


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_whole_numbers_of_any_type_become_ints(value):
  assert checked_count(value, "num") == 3 and type(checked_count(value, "num")) is int
  assert type(checked_seed(value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", None, [3]])
def test_what_is_no_whole_number_is_refused_by_name(value):
  with pytest.raises(ValueError, match="num must be a whole number; got "):
    checked_count(value, "num")
  with pytest.raises(ValueError, match="of_it must be a whole number"):
    checked_seed(value, "of_it")


def test_a_count_has_a_least():
  for least in (0, 1, 2):
    assert checked_count(least, "num", least) == least
    with pytest.raises(ValueError, match=f"num must be at least {least}; got {least - 1}"):
      checked_count(least - 1, "num", least)


def test_seeds_have_32_bits():
  assert (checked_seed(0), checked_seed(2**32 - 1)) == (0, 2**32 - 1)
  for value in (-1, 2**32, 2**40, np.int64(-5)):
    with pytest.raises(ValueError, match=r"seed must be a whole number in \[0, 2\*\*32\); got"):
      checked_seed(value)


def test_dampings_are_positive_and_different():
  assert checked_dampings(np.array([1, 0.5])) == (1.0, 0.5)
  for value in (0, -1e-8, float("nan")):
    with pytest.raises(ValueError, match="damping must be positive"):
      checked_damping(value)
  for values, message in (
    ((), "non-empty"), (1e-8, "non-empty"), ((1, 0), "positive"), ((1, 1.0), "given once"),
  ):  # fmt: skip
    for check in (checked_dampings, checked_layer_dampings):
      with pytest.raises(ValueError, match=message):
        check(values)


def test_dampings_relative_to_layers_are_of_one_kind_and_only_where_there_are_layers():
  some = (RelativeDamping(1), RelativeDamping(0.5))
  assert checked_layer_dampings(list(some)) == some and checked_layer_dampings([1]) == (1.0,)
  for values, message in (
    ((*some, 1.0), "all numbers or all RelativeDamping"),
    ((*some, RelativeDamping(1.0)), "given once"),
    (some[0], "non-empty"),
  ):
    with pytest.raises(ValueError, match=message):
      checked_layer_dampings(values)  # type: ignore[arg-type]
  for refused in (lambda: checked_damping(some[0]), lambda: checked_dampings(some)):
    with pytest.raises(ValueError, match=r"must be a number here; got RelativeDamping\(rho=1.0\)"):
      refused()


# What takes a count or a seed, called with a value for it.

DATASET = Dataset("toy", nets.random_images(4), np.array(list("abcd")))
EXAMPLES = Examples(nets.random_images(4))
SCORES = jaxinf.Scores(
  np.random.default_rng(0).normal(size=(9, 2, 4)).astype(np.float32), np.arange(2), np.arange(4), {}
)
SUBSETS = random_subsets(np.arange(4), 3, share=0.5, seed=0)
RETRAINED = jaxinf.Retrained(np.random.default_rng(1).normal(size=(3, 2, 2)), np.arange(2), "loss")
ALIKE = dict(queries=EXAMPLES, train=EXAMPLES)

SEEDS = {
  "Draws": lambda seed: Draws(seed=seed),
  "Draws.until_stable": lambda seed: Draws.until_stable(seed=seed),
  "Projection": lambda seed: Projection(8, seed),
  "RandomProjection": lambda seed: RandomProjection(0.5, seed),
  "random_subsets": lambda seed: random_subsets(np.arange(4), 3, share=0.5, seed=seed),
  "random_scores": lambda seed: jaxinf.random_scores(**ALIKE, seed=seed),
  "Dataset.sample": lambda seed: DATASET.sample(2, seed),
  "lds": lambda seed: jaxinf.lds(SCORES, SUBSETS, RETRAINED, seed=seed, num_resamples=2),
  "retraining_lds": lambda seed: jaxinf.retraining_lds(RETRAINED, seed=seed, num_resamples=2),
  "noise_ceiling": lambda seed: jaxinf.noise_ceiling(RETRAINED, seed=seed, num_resamples=2),
  "rank_stability": lambda seed: jaxinf.rank_stability(SCORES, seed=seed, num_splits=2),
}
COUNTS = {
  "Draws.num": lambda num: Draws(num),
  "Draws.replicates": lambda num: Draws(12, num),
  "until_stable.top_k": lambda num: Draws.until_stable(top_k=num),
  "until_stable.most": lambda num: Draws.until_stable(most=num, replicates=2, size=1),
  "until_stable.size": lambda num: Draws.until_stable(size=num),
  "Compute.batch_size": lambda num: Compute(num),
  "Compute.query_chunk": lambda num: Compute(query_chunk=num),
  "Checkpointing.every": lambda num: Checkpointing("folder", num),
  "KFAC.samples": lambda num: jaxinf.KFAC(samples=num),
  "Projection.dim": lambda num: Projection(num, 0),
  "Schedule.num_steps": lambda num: Schedule.linear(num, 1e-4, 0.02),
  "random_subsets": lambda num: random_subsets(np.arange(4), num, share=0.5, seed=0),
  "Dataset.sample": lambda num: DATASET.sample(num, 0),
  "Scores.top": lambda num: SCORES.top(num),
  "lds": lambda num: jaxinf.lds(SCORES, SUBSETS, RETRAINED, num_resamples=num),
  "rank_stability": lambda num: jaxinf.rank_stability(SCORES, num_splits=num),
}


@pytest.mark.parametrize("take", SEEDS.values(), ids=SEEDS)
def test_seeds_are_checked_wherever_there_is_one(take):
  take(np.int64(3))
  take(2**32 - 1)
  for value in (2**32, -1, True, 1.0):
    with pytest.raises(ValueError, match=r"seed must be a whole number in \[0, 2\*\*32\)"):
      take(value)


@pytest.mark.parametrize("take", COUNTS.values(), ids=COUNTS)
def test_counts_are_checked_wherever_there_is_one(take):
  take(np.int32(2))
  for value in (True, 2.0, "2"):
    with pytest.raises(ValueError, match="must be a whole number; got"):
      take(value)
  for value in (0, -1):
    with pytest.raises(ValueError, match="must be at least"):
      take(value)
