"""Draws: how they split into replicates, what queries get of them, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.draws import INDEPENDENT, TIMESTEPS, Draws


@pytest.mark.parametrize(
  ("num", "train", "queries"),
  [
    (1, 1, 1),
    (2, 2, 2),  # replicates to compare come before whole pairs
    (3, 3, 1),
    (4, 2, 2),
    (6, 3, 2),
    (7, 1, 1),
    (8, 4, 2),
    (10, 5, 2),
    (12, 3, 2),  # 4 of 3 draws would leave half a pair
    (15, 5, 1),
    (250, 5, 2),
    (256, 4, 2),
  ],
)
def test_replicates_are_the_most_of_whole_pairs(num, train, queries):
  draws = Draws(num)
  split, asked = draws.split(), draws.of_queries(None)
  assert (split.replicates, asked.replicates) == (train, queries)
  assert split.size * train == asked.size * queries == num
  assert draws.replicates is None and split == dataclasses.replace(draws, replicates=train)


def test_replicates_that_are_asked_for_stay():
  assert Draws(12, 6).split().replicates == 6
  assert Draws(12, 6).of_queries(Draws(12, 6)).replicates == 6
  assert Draws(12, 12).size == 1


def test_queries_have_as_many_draws_by_the_same_design_unless_asked_otherwise():
  draws = Draws(8, 4, "uniform", antithetic=False, shared=False, seed=3)
  assert draws.of_queries(None) == dataclasses.replace(draws, replicates=2)
  assert draws.of_queries(Draws(6, seed=5)) == Draws(6, 2, seed=5)
  # Rounds go on for training draws; a query's are taken once.
  rounds = Draws.until_stable(seed=3)
  assert rounds.of_queries(None) == Draws(256, 2, seed=3)
  with pytest.raises(ValueError, match="give query_draws a fixed number of draws"):
    draws.of_queries(rounds)


def test_rounds_until_stable_are_replicates_of_a_size():
  draws = Draws.until_stable(top_k=5, agreement=0.9, most=100, replicates=3, size=6, seed=7)
  assert (draws.num, draws.replicates, draws.size, draws.seed) == (18, 3, 6, 7)
  assert (draws.stop.top_k, draws.stop.agreement, draws.stop.most) == (5, 0.9, 100)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(num=0), "the number of draws must be at least 1; got 0"),
    (dict(num=2.0), "the number of draws must be a whole number; got 2.0"),
    (dict(num=12, replicates=5), r"12 draws do not split into 5 .*\(as 1, 2, 3, 4, 6, 12 do\)"),
    (dict(num=12, replicates=24), "do not split into 24"),
    (dict(timesteps="random"), "Unknown timesteps 'random'; there are: stratified, uniform"),
    (dict(seed=2**32), "seed must be a whole number"),
  ],
)
def test_what_are_no_draws_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Draws(**arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(agreement=0), r"agreement must lie in \(0, 1\]; got 0"),
    (dict(agreement=1.01), "agreement must lie in"),
    (dict(replicates=1), "replicates must be at least 2; got 1"),  # halves of them are compared
    (dict(most=31), "A round has 32 draws, more than the most, 31"),
  ],
)
def test_rounds_that_cannot_stop_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Draws.until_stable(**arguments)


def test_shared_draws_have_one_number_for_all_examples():
  ids = jnp.array([3, 0, 2**32 - 1], jnp.uint32)
  assert Draws().numbers(ids).tolist() == [0, 0, 0]
  assert Draws(shared=False).numbers(ids).tolist() == ids.tolist()
  assert Draws().numbers(ids).dtype == ids.dtype


def test_equal_draws_are_one_key_of_compiled_programs():
  assert hash(Draws(np.int64(4), np.int32(2))) == hash(Draws(4, 2))
  assert Draws(np.int64(4)) == Draws(4) != Draws(4, seed=1)


def test_the_paper_draws_each_pair_by_itself():
  assert INDEPENDENT.design == {"timesteps": "uniform", "antithetic": False, "shared": False}
  assert INDEPENDENT.num == 1 and set(TIMESTEPS) == {"uniform", "stratified"}
  assert jax.tree.leaves(INDEPENDENT) == [INDEPENDENT]  # a value, and no pytree of traced numbers
