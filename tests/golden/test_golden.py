"""The numbers of today: what was once computed and written down comes out again.

They say that a change of names and places changes no number; that numbers are right, other tests
say. Where one is meant to move, `python -m tests.golden.make_golden` writes them anew.
"""

import numpy as np
import pytest

from tests.golden import make_golden, runs

# Of the largest number of an array. What these exceed is the difference between programs that XLA
# optimises not at all, as here, and at level 3.
TOLERANCES = (
  ("", 1e-4),  # float32 rounding, which training, sampling and small dampings amplify: to 3e-5
  ("digits/attribute/", 5e-3),  # a number may round to the next int8 step of its block: to 6e-4
  ("library/influence/elbo/", 5e-3),  # likewise
  ("digits/query/", 2e-2),  # in the store, and where one of the best images changes: to 2e-3
  ("benchmark/counterfactual/", 1e-3),  # small differences of losses
  ("results/", 1e-9),  # ranks of committed numbers and seeded resampling in float64: sums' order
)


def tolerance(name: str) -> float:
  """That of the longest prefix."""
  return max((p for p in TOLERANCES if name.startswith(p[0])), key=lambda p: len(p[0]))[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Of all runs, which sections share."""
  return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("section", runs.SECTIONS)
def test_the_numbers_are_those_that_were_written_down(folder, section):
  expected = make_golden.read(make_golden.FOLDER / f"{section}.npz")
  found = make_golden.computed(section, folder)
  assert found.keys() == expected.keys()
  moved = [line for n in expected for line in difference(f"{section}/{n}", found[n], expected[n])]
  assert not moved, "\n".join([f"{len(moved)} of {len(expected)} arrays differ:", *moved])


def difference(name: str, found: np.ndarray, expected: np.ndarray) -> list[str]:
  """A line where the arrays differ: floats by more than the tolerance, others at all."""
  if (found.dtype.kind, found.shape) != (expected.dtype.kind, expected.shape):
    return [f"{name}: {found.dtype} {found.shape}, was {expected.dtype} {expected.shape}"]
  if expected.dtype.kind != "f":
    return [] if np.array_equal(found, expected) else [f"{name}: {found!r}, was {expected!r}"]
  if np.array_equal(found, expected, equal_nan=True):
    return []
  largest = np.nanmax(np.abs(expected))
  error = np.abs(found - expected).max() / largest if largest else np.inf
  return [] if error <= tolerance(name) else [f"{name}: by {error:.1e} of the largest number"]
