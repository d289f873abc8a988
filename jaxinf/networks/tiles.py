"""Decoding of large images tile by tile, so that the devices hold a tile and no whole image.

Tiles of latents overlap; where two of them meet, their images are mixed with weights that go
linearly from one to the other. Order and weights are those of diffusers' `tiled_decode`: a tile is
mixed with the one above it, then with the one to its left, both as mixed before. A tile does not
see beyond its edges, so that its colours and textures differ a little from those of a whole image.
"""

import itertools
from collections.abc import Callable

import numpy as np

from jaxinf.core.checks import checked_count

Decode = Callable[[np.ndarray], np.ndarray]  # latents [M, h, w, c] → images [M, f·h, f·w, C]
Place = tuple[int, int]  # of a tile's first latent, down and to the right


def decode_tiles(
  decode: Decode, latents: np.ndarray, *, tile: int, overlap: int | None, factor: int
) -> np.ndarray:
  """Images [N, f·h, f·w, C] from tiles of latents.

  Args:
    decode: for latents of any height and width; it is called once for each shape of tiles, of
      which there are at most four.
    latents: [N, h, w, c].
    tile: height and width of a tile, in latents; one that covers all is decoded as a whole.
    overlap: latents that neighbouring tiles share along an axis; a quarter of a tile where None.
    factor: pixels along an axis for one latent, f.

  Raises:
    ValueError: tile is below 1, or overlap not in 0 … tile − 1.
  """
  tile = checked_count(tile, "tile")
  overlap = tile // 4 if overlap is None else checked_count(overlap, "overlap", least=0)
  if overlap >= tile:
    raise ValueError(
      f"overlap must be below tile, so that tiles move on; got {overlap} of {tile} latents."
    )
  num, height, width = latents.shape[:3]
  if height <= tile and width <= tile:
    return decode(latents)
  stride = tile - overlap
  places = list(itertools.product(range(0, height, stride), range(0, width, stride)))
  tiles = _decoded(decode, latents, places, tile)

  images = np.empty((num, factor * height, factor * width, tiles[0, 0].shape[-1]), np.float32)
  kept, shared = factor * stride, factor * overlap
  for y, x in places:
    here = tiles[y, x]
    if y:
      _mix(tiles[y - stride, x], here, shared, axis=1)
    if x:
      _mix(tiles[y, x - stride], here, shared, axis=2)
    top, left = factor * y, factor * x
    images[:, top : top + kept, left : left + kept] = here[:, :kept, :kept]
  return images


def _decoded(
  decode: Decode, latents: np.ndarray, places: list[Place], tile: int
) -> dict[Place, np.ndarray]:
  """The image of the tile at each place; tiles of one shape go through `decode` together."""
  cuts = {(y, x): latents[:, y : y + tile, x : x + tile] for y, x in places}
  images: dict[Place, np.ndarray] = {}
  for shape in dict.fromkeys(cut.shape for cut in cuts.values()):
    alike = [place for place in places if cuts[place].shape == shape]
    together = decode(np.concatenate([cuts[place] for place in alike]))
    images |= dict(zip(alike, np.split(np.array(together), len(alike)), strict=True))
  return images


def _mix(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
  """Mixes the end of `before` into the beginning of `after`, in place, along an axis."""
  before, after = np.moveaxis(before, axis, 0), np.moveaxis(after, axis, 0)
  extent = min(extent, len(before), len(after))
  weight = (np.arange(extent, dtype=np.float32) / max(1, extent))[:, None, None, None]
  end = before[len(before) - extent :]
  after[:extent] = (1 - weight) * end + weight * after[:extent]
