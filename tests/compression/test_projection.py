"""The random projection of long vectors: its entries, and that nothing else moves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.compression.projection import ENTRIES, Projection

KINDS = sorted(ENTRIES)
SIZE = 1000  # numbers of a vector: no whole number of words


def matrix(projection: Projection, size: int = SIZE) -> np.ndarray:
  """R [dim, size], from the columns of the identity: products with 0 and 1 are exact."""
  project = jax.jit(lambda rows: projection(rows, projection.key))
  return np.asarray(project(jnp.eye(size))).T


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_mean_zero_and_are_uncorrelated(kind):
  """Means, and products of different rows and of different columns, within 5 standard errors.

  699 rows are made in two tiles of 350, of which the second is cut.
  """
  entries = matrix(Projection(699, 3, kind)) * np.sqrt(699)
  assert abs(entries.mean()) <= 5 / np.sqrt(entries.size)
  for rows in (entries, entries.T):
    gram = rows @ rows.T / rows.shape[1]
    # The variance of an entry's square is 0 or 2.
    np.testing.assert_allclose(np.diag(gram), 1, atol=5 * np.sqrt(2 / rows.shape[1]))
    others = gram[~np.eye(len(gram), dtype=bool)]
    assert abs(others.std() * np.sqrt(rows.shape[1]) - 1) <= 0.02  # of some 500,000 of them
    assert np.abs(others).max() <= 6.5 / np.sqrt(rows.shape[1])
  if kind == "normal":
    assert abs(np.mean(entries**4) - 3) <= 5 * np.sqrt(96 / entries.size)


def test_signs_are_one_over_the_root_of_the_dimension():
  np.testing.assert_allclose(np.abs(matrix(Projection(699, 3))), 699**-0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_does_not_depend_on_how_much_of_it_is_made_at_once(kind):
  """Products with unit vectors are single entries, so they are equal to the last bit."""
  whole = matrix(Projection(600, 0, kind))
  for at_once in (1, 32 * 600, 2**17):
    np.testing.assert_array_equal(matrix(Projection(600, 0, kind, at_once)), whole)
  np.testing.assert_array_equal(matrix(Projection(600, 0, kind), size=77), whole[:, :77])


def test_seeds_and_kinds_make_other_matrices():
  """Correlations of 64,000 entries, within 5 standard errors of zero."""
  first = matrix(Projection(64, 0))
  for other in (Projection(64, 1), Projection(64, 0, "normal")):
    assert abs(np.corrcoef(first.ravel(), matrix(other).ravel())[0, 1]) <= 5 / np.sqrt(first.size)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_the_variance_of_the_docstring(kind):
  """400 seeds, each its own R: mean within 5 standard errors, variance within 5 · √(2 / 400)."""
  u, v = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
  v += u
  dim, num = 16, 400

  @jax.jit
  def products(seed):
    projection = Projection(dim, seed, kind)
    a, b = projection(jnp.stack([u, v]), projection.key)
    return a @ b

  found = np.array([products(seed) for seed in range(num)], np.float64)
  variance = (u @ u) * (v @ v) + (u @ v) ** 2
  if kind == "rademacher":
    variance -= 2 * np.sum(u**2 * v**2)
  variance /= dim
  assert abs(found.mean() - u @ v) <= 5 * np.sqrt(variance / num)
  assert abs(found.var() / variance - 1) <= 5 * np.sqrt(2 / num)


def test_impossible_projections_are_refused():
  with pytest.raises(ValueError, match="dim must be at least 1"):
    Projection(0, 0)
  with pytest.raises(ValueError, match="there are: rademacher, normal"):
    Projection(8, 0, "gaussian")
