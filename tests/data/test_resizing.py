"""Images at another size: means where it divides, and otherwise Pillow's filters."""

import numpy as np
import pytest
from PIL import Image

from jaxinf.data import DataConfig, load
from jaxinf.data.resizing import resized

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 12, 12, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_a_pixel_is_the_mean_of_its_square(size):
  k = 12 // size
  for images in (PIXELS, (PIXELS / 127.5 - 1).astype(np.float32)):
    expected = np.empty((5, size, size, 3))
    for row, column in np.ndindex(size, size):
      square = images[:, row * k : row * k + k, column * k : column * k + k]
      expected[:, row, column] = square.astype(float).mean((1, 2))
    found = resized(images, size)
    assert found.dtype == images.dtype
    if images.dtype == np.uint8:  # sums are exact in float32, so rounding is that of float64
      np.testing.assert_array_equal(found, np.round(expected))
    else:
      np.testing.assert_allclose(found, expected, atol=1e-6)  # 144 float32 numbers in [-1, 1]


def test_halves_are_rounded_to_even():
  images = np.array([[0, 0], [1, 1]], np.uint8)[None, :, :, None]  # the mean is ½
  assert resized(images, 1).item() == 0
  assert resized(images + np.uint8(1), 1).item() == 2


def test_the_central_square_is_taken_first():
  wide = np.zeros((1, 4, 10, 1), np.uint8)
  wide[:, :, 3:7] = RNG.integers(0, 256, (1, 4, 4, 1))
  for size in (1, 2, 3, 4, 8):
    square = resized(wide[:, :, 3:7], size)
    np.testing.assert_array_equal(resized(wide, size), square)
    tall = resized(wide.transpose(0, 2, 1, 3), size).transpose(0, 2, 1, 3)
    # Pillow rounds after either pass: ½, and ½ times 1.3, the sum of absolute weights, of each.
    np.testing.assert_allclose(tall.astype(int), square, atol=2)


@pytest.mark.parametrize("size", [5, 7, 24])
def test_other_sizes_of_uint8_are_pillows_lanczos(size):
  for image, found in zip(PIXELS, resized(PIXELS, size), strict=True):
    whole = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.asarray(whole))


def test_numbers_of_other_sizes_stay_in_their_range_and_keep_constants():
  images = np.where(RNG.random((3, 8, 8, 2)) < 0.5, -1, 1).astype(np.float32)
  for size in (3, 32):
    found = resized(images, size)
    # Weights of a pixel sum to 1 up to float32's rounding.
    assert found.shape == (3, size, size, 2) and abs(found).max() <= 1 + 1e-6
    np.testing.assert_allclose(resized(images * 0 + 0.3, size), 0.3, rtol=1e-6)


def test_a_ramp_stays_one_when_enlarged():
  """Between the centres of pixels, bilinear interpolation is exact for linear functions."""
  ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None], (8, 8))[None, ..., None]
  found = resized(ramp, 32)[0, 2:-2, 0, 0]
  np.testing.assert_allclose(found, (np.arange(2, 30) + 0.5) / 4 - 0.5, atol=1e-5)


def test_images_of_the_size_are_not_copied():
  assert resized(PIXELS, 12) is PIXELS


def test_every_data_set_is_resized(tmp_path):
  assert load(DataConfig("digits", image_size=4)).image_shape == (4, 4, 1)
  large = load(DataConfig("digits", image_size=32))
  assert large.image_shape == (32, 32, 1) and large.is_pixels
  np.savez(tmp_path / "images.npz", images=PIXELS)
  found = load(DataConfig("arrays", path=str(tmp_path / "images.npz"), image_size=4))
  np.testing.assert_array_equal(found.images, resized(PIXELS, 4))
  np.savez(tmp_path / "images.npz", images=np.zeros((3, 5), np.float32))
  with pytest.raises(ValueError, match=r"image_size resizes images \[N, H, W, C\].*\(3, 5\)"):
    load(DataConfig("arrays", path=str(tmp_path / "images.npz"), image_size=4))
