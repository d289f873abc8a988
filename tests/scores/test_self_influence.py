"""Self-influence from products of replicates: no bias, and errors as large as deviations are."""

import numpy as np
import pytest

from jaxinf.scores.self_influence import SelfInfluence

GRADIENT = np.array([1.0, -2.0, 0.5])
TRUTH = GRADIENT @ GRADIENT


def estimated(num_replicates: int, noise: float, num: int = 40_000) -> SelfInfluence:
  """`num` estimates of TRUTH, each from replicates of a gradient that are off by N(0, noise²)."""
  rng = np.random.default_rng(num_replicates)
  rows = GRADIENT + noise * rng.normal(size=(num, num_replicates, 3))
  products = rows @ rows.swapaxes(1, 2)
  own = np.diagonal(products, axis1=1, axis2=2)
  crossed = products.sum(axis=2) - own
  return SelfInfluence.of_products(
    np.stack([crossed, own], axis=1), np.arange(num), {"damping": 0.1}
  )


@pytest.mark.parametrize("num_replicates", [2, 3, 5])
def test_products_of_different_replicates_have_no_bias_and_squares_that_of_the_noise(
  num_replicates,
):
  noise, num = 2.0, 40_000
  found = estimated(num_replicates, noise)
  assert not found.settings["biased"]
  within = lambda x: 4 * x.std() / np.sqrt(num)  # four sampling errors of a mean of `num`
  values = found.values.astype(float)
  assert abs(values.mean() - TRUTH) < within(values)
  squares = estimated(1, noise)
  assert squares.settings["biased"] and np.isnan(squares.std_errors).all()
  # The square of a noisy gradient is larger by its three variances, here by more than twice itself.
  assert abs(squares.values.mean() - TRUTH - 3 * noise**2) < within(squares.values)


@pytest.mark.parametrize(("noise", "ratio"), [(0.1, 1.0), (2.0, 1.25)])
def test_jackknifed_errors_are_as_large_as_the_deviations_or_larger(noise, ratio):
  """In closed form: 4 σ²|g|²/A + 2 d σ⁴/(A (A − 1)); the second term is jackknifed too large."""
  num_replicates = 5
  found = estimated(num_replicates, noise)
  first = 4 * noise**2 * TRUTH / num_replicates
  second = 2 * 3 * noise**4 / (num_replicates * (num_replicates - 1))
  deviations = (found.values.astype(float) - TRUTH) ** 2
  assert deviations.mean() == pytest.approx(first + second, rel=0.03)  # 40,000 squares
  said = np.mean(found.std_errors.astype(float) ** 2)
  assert 0.97 < said / (first + second) < ratio + 0.35
  assert np.isnan(estimated(2, noise, 3).std_errors).all()


def test_the_top_are_the_largest_in_order():
  products = np.zeros((4, 2, 3))
  products[:, 0] = np.array([1.0, 4.0, 4.0, 3.0])[:, None]
  found = SelfInfluence.of_products(products, np.array(["a", "b", "c", "d"]), {"damping": 1e-8})
  np.testing.assert_array_equal(found.values, [0.5, 2, 2, 1.5])  # three pairs of two replicates
  best = found.top(3)
  assert best.ids.tolist() == ["b", "c", "d"] and best.positions.tolist() == [1, 2, 3]
  np.testing.assert_array_equal(best.std_errors, 0)  # replicates agree
  assert repr(found) == "SelfInfluence(4 training examples; λ = 1e-08)"
  with pytest.raises(ValueError, match="k must lie in 1…4"):
    found.top(5)
