"""Subsets: exact sizes, and membership that depends on seed, number, share and N alone."""

import re

import numpy as np
import pytest

from jaxinf.data.subsets import Subsets, random_subsets

IDS = np.array([f"image_{n}" for n in range(31)])


def membership(num_subsets, **changes):
  return random_subsets(IDS, num_subsets, **({"share": 0.5, "seed": 3} | changes)).membership


@pytest.mark.parametrize("share, size", [(0.5, 16), (0.1, 3), (0.98, 30)])
def test_a_subset_holds_exactly_its_share(share, size):
  subsets = random_subsets(IDS, 20, share=share, seed=0)
  assert (subsets.membership.sum(axis=1) == size).all()  # 15.5 goes to the even 16
  for j, row in enumerate(subsets.membership):
    np.testing.assert_array_equal(subsets.positions(j), np.flatnonzero(row))


def test_a_subset_depends_on_seed_number_and_size_alone():
  whole = membership(6)
  np.testing.assert_array_equal(membership(3), whole[:3])
  other_ids = random_subsets(np.arange(31), 6, share=0.5, seed=3)
  np.testing.assert_array_equal(other_ids.membership, whole)
  assert (membership(6, share=0.2) <= whole).all()  # a smaller share lies within
  assert len(np.unique(np.concatenate([whole, membership(6, seed=4)]), axis=0)) == 12


def test_subsets_of_published_runs_stay_what_they_are():
  # Measurements of retrained models are kept for years: their subsets must not change.
  subsets = random_subsets(np.arange(10), 2, share=0.5, seed=0)
  assert [subsets.positions(j).tolist() for j in range(2)] == [[1, 4, 5, 6, 8], [2, 6, 7, 8, 9]]


def test_every_pair_of_examples_is_as_likely():
  """Without replacement: P(n) = ½ and P(n and n') = s (s − 1) / (N (N − 1))."""
  num, size, num_subsets = 8, 4, 4000
  rows = random_subsets(np.arange(num), num_subsets, share=0.5, seed=1).membership.astype(float)
  together = rows.T @ rows / num_subsets
  expected = np.full((num, num), size * (size - 1) / (num * (num - 1)))
  np.fill_diagonal(expected, size / num)
  # Four and a half standard errors of a share, for the largest of 36.
  assert (np.abs(together - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4000)).all()


@pytest.mark.parametrize(
  "arrays, message",
  [
    ((np.ones((2, 3)), np.arange(3)), "[M, N] of booleans; got shape (2, 3), float64"),
    ((np.ones((2, 3), bool), np.arange(2)), "each of the 3 columns"),
    ((np.ones((2, 3), bool), np.array([1, 1, 2])), "must be unique"),
    ((np.eye(3, dtype=bool)[[0, 1]] & [True, False, True], np.arange(3)), "Subset 1 is empty"),
  ],
)
def test_arrays_that_are_no_subsets_are_refused(arrays, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    Subsets(*arrays)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(share=0.99), "of 0.99 gives 31"),
    (dict(share=0.01), "of 0.01 gives 0"),
    (dict(seed=-1), "seed must be a whole number in [0, 2**32)"),
  ],
)
def test_impossible_subsets_are_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    membership(2, **changes)
