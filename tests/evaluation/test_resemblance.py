"""Measures of how alike pictures are, in closed form; what they are not for is refused."""

import re
import sys

import numpy as np
import pytest

from jaxinf.evaluation.resemblance import check_metrics, resemblance
from tests import nets


def test_squared_errors_are_means_over_elements():
  pictures, others = nets.random_images(3, (4, 5, 2)), nets.random_images(3, (4, 5, 2), seed=1)
  found = resemblance(pictures, others, "mse")
  expected = [np.square(p.astype(float) - o).mean() for p, o in zip(pictures, others, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  series = nets.random_images(2, (6, 2))
  np.testing.assert_array_equal(resemblance(series, series, "mse"), 0)


@pytest.mark.parametrize("side", [4, 8], ids=["smaller_than_a_window", "larger"])
def test_structural_similarity_of_flat_pictures_is_that_of_their_means(side):
  """(2 μ ν + C) / (μ² + ν² + C) with C = (0.01 · 2)², as nothing varies; a mean over channels."""
  pytest.importorskip("skimage")
  levels = np.array([[0.5, -0.2], [0.3, 0.4]])  # of two channels, in both pictures
  one, other = np.broadcast_to(levels[:, None, None, None], (2, 1, side, side, 2))
  constant = 0.02**2
  expected = (2 * levels.prod(axis=0) + constant) / (np.square(levels).sum(axis=0) + constant)
  np.testing.assert_allclose(resemblance(one, other, "ssim"), expected.mean(), rtol=1e-9)


def test_structural_similarity_is_one_for_equal_pictures_and_falls_with_noise():
  pytest.importorskip("skimage")
  pictures = nets.random_images(2, (9, 9, 3))
  noise = nets.random_images(2, (9, 9, 3), seed=1)
  found = [resemblance(pictures, pictures + level * noise, "ssim") for level in (0, 0.1, 1)]
  np.testing.assert_allclose(found[0], 1)
  assert (found[0] > found[1]).all() and (found[1] > found[2]).all()


def test_what_cannot_be_compared_is_refused(monkeypatch):
  refuse = lambda message: pytest.raises(ValueError, match=re.escape(message))
  with refuse("Unknown metric of resemblance 'lpips'; there are: ssim, mse."):
    check_metrics(["lpips"], (8, 8, 1))
  with refuse("ssim compares images [H, W, C] of at least 3 × 3 pixels in [-1, 1]; an example has"):
    check_metrics(["mse", "ssim"], (6, 2))
  with refuse("has shape (8, 8, 1) and other numbers. Take mse."):
    check_metrics(["ssim"], (8, 8, 1), is_pixels=False)
  with refuse("got shapes (1, 2) and (2, 2)"):
    resemblance(np.zeros((1, 2)), np.zeros((2, 2)), "mse")
  for name in ("skimage", "skimage.metrics"):
    monkeypatch.setitem(sys.modules, name, None)
  with refuse("pip install 'jaxinf[metrics]'"):
    check_metrics(["ssim"], (8, 8, 1))
