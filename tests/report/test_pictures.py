"""Pictures keep pixels; series and vectors are drawn; what is neither has none."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxinf.report.canvas import BLUE, VERMILION
from jaxinf.report.pictures import how_shown, is_image, picture_of, png_bytes
from tests.report.parsed import decoded

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_keeps_pixels_and_channels(channels, mode):
  levels = np.random.default_rng(4).integers(0, 256, (5, 6, channels), np.uint8)
  for image in (levels, (levels / 127.5 - 1).astype(np.float32)):
    picture = Image.open(io.BytesIO(png_bytes(image)))
    assert picture.mode == mode
    np.testing.assert_array_equal(np.asarray(picture).reshape(levels.shape), levels)


def test_floats_beyond_the_range_are_clipped_and_odd_shapes_refused():
  image = np.array([-3.0, -1.0, 0.001, 1.0, 7.0], np.float32).reshape(1, 5, 1)
  np.testing.assert_array_equal(decoded(png_bytes(image))[0], [0, 0, 128, 255, 255])
  with pytest.raises(ValueError, match=r"got shape \(4, 4, 5\)"):
    png_bytes(np.zeros((4, 4, 5), np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_proportion_are_shown_pixel_by_pixel(channels):
  levels = RNG.integers(0, 256, (3, 11, channels), np.uint8)
  np.testing.assert_array_equal(picture_of(levels), levels)
  np.testing.assert_array_equal(picture_of((levels / 127.5 - 1).astype(np.float32)), levels)
  assert how_shown(levels) == ""


def test_pixels_that_overshoot_a_little_are_clipped_and_latents_are_no_images():
  pixels = np.linspace(-1.2, 1.2, 48, dtype=np.float32).reshape(4, 4, 3)
  assert is_image(pixels) and picture_of(pixels).min() == 0 and picture_of(pixels).max() == 255
  latents = RNG.normal(size=(8, 8, 4)).astype(np.float32)
  assert not is_image(latents) and picture_of(latents) is None
  assert "named by their ids" in how_shown(latents)


@pytest.mark.parametrize("shape", [(8, 8, 16), (8, 8, 2), (4, 8, 8, 3), ()])
def test_what_is_no_image_series_or_vector_has_no_picture(shape):
  example = np.zeros(shape, np.float32)
  assert picture_of(example) is None and "named by their ids" in how_shown(example)


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 2), (5,)])
def test_numbers_that_are_not_finite_have_no_picture(shape):
  example = np.zeros(shape, np.float32)
  example.flat[0] = np.nan
  assert picture_of(example) is None


def holds(picture, colour):
  """Whether some pixel has about that colour: lines of one pixel are blended with the white."""
  wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return bool((np.abs(picture.astype(int) - wanted).max(axis=2) < 60).any())


def test_a_series_is_one_line_for_every_channel_on_one_scale():
  steps = np.linspace(-5, 5, 40, dtype=np.float32)
  rising, level = steps, np.full(40, -5.0, np.float32)
  both = picture_of(np.stack([rising, level], axis=1))
  assert both.shape == (112, 168, 3) and both.dtype == np.uint8
  assert holds(both, BLUE) and holds(both, VERMILION)
  dark = (both < 200).any(axis=2)
  # The first channel rises from the left to the right; the second lies at the foot all along.
  assert dark[:20, 150:].any() and not dark[:20, :100].any()
  assert dark[-8:].any(axis=0).sum() > 150
  np.testing.assert_array_equal(picture_of(rising), picture_of(rising[:, None]))  # a vector is one
  assert not holds(picture_of(rising), VERMILION)


@pytest.mark.parametrize("length", [1, 2, 10_000])
def test_lines_of_any_length_and_level_are_drawn(length):
  for example in (np.full(length, 3.0), np.arange(length) % 7, np.zeros((length, 1), np.uint8)):
    assert holds(picture_of(example), BLUE)
