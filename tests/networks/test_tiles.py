"""Tiles put together: what a decoder makes of the whole, where its pixels see no neighbours."""

import numpy as np
import pytest

from jaxinf.networks.tiles import decode_tiles

FACTOR = 2


def doubled(latents):
  """A decoder whose pixels each see one latent."""
  return np.repeat(np.repeat(latents, FACTOR, axis=1), FACTOR, axis=2).astype(np.float32)


@pytest.mark.parametrize(
  ("height", "width", "tile", "overlap"),
  [(7, 9, 4, None), (5, 12, 4, 3), (3, 9, 4, 0), (10, 10, 5, 1), (4, 4, 4, 2)],
)
def test_tiles_of_a_local_decoder_make_the_whole(height, width, tile, overlap):
  latents = np.random.default_rng(0).normal(size=(2, height, width, 3))
  images = decode_tiles(doubled, latents, tile=tile, overlap=overlap, factor=FACTOR)
  np.testing.assert_allclose(images, doubled(latents), rtol=0, atol=1e-6)  # a mean of equals


def test_images_of_tiles_are_mixed_linearly():
  """A decoder that paints each tile in its first latent: from 0 to 3 in steps of 1/4 of it."""
  painted = lambda x: np.broadcast_to(doubled(x)[:, :1, :1], doubled(x).shape)
  latents = np.arange(6.0).reshape(1, 6, 1, 1)
  images = decode_tiles(painted, latents, tile=5, overlap=2, factor=FACTOR)
  np.testing.assert_allclose(
    images[0, :, 0, 0], [0] * 6 + [0, 0.75, 1.5, 2.25, 3, 3], rtol=0, atol=1e-6
  )


def test_a_decoder_sees_no_more_than_a_tile_and_few_shapes():
  seen = []
  record = lambda x: seen.append(x.shape) or doubled(x)
  decode_tiles(record, np.zeros((1, 50, 41, 1)), tile=8, overlap=2, factor=FACTOR)
  assert max(shape[1] for shape in seen) == max(shape[2] for shape in seen) == 8
  assert len(seen) == len(set(seen)) == 4


@pytest.mark.parametrize(
  ("tile", "overlap", "message"),
  [
    (0, None, "tile must be at least 1; got 0"),
    (4, 4, "overlap must be below tile.*got 4 of 4"),
    (4, -1, "overlap must be at least 0"),
    (4, 0.5, "overlap must be a whole number"),
  ],
)
def test_tiles_that_do_not_move_on_are_refused(tile, overlap, message):
  with pytest.raises(ValueError, match=message):
    decode_tiles(doubled, np.zeros((1, 9, 9, 1)), tile=tile, overlap=overlap, factor=FACTOR)
