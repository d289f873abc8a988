"""Which training images look alike: by the distance of their pixels, root mean square.

  d(x, y)² = mean over pixels and channels of (x − y)²,  with pixels in [−1, 1]: 0 of duplicates, 2
  of black and white. Of latents, series and vectors: of their numbers as they are.

The nearest of one image are found exactly, in a pass over all. Near duplicates among all pairs are
found by small versions first: grey means over the blocks of an 8 × 8 grid (of a series or vector,
over 64 stretches), whose distance is at most d where all blocks are of one size. The pairs of the
least small distances are then ordered by d itself.
"""

import functools
import threading
from typing import Any

import numpy as np

from jaxinf.core.arrays import read_rows

_BLOCK = 2048  # images at a time
_ROWS = 256  # likewise, against all others
_GRID = 8
_CANDIDATES = 8  # times as many pairs by small versions as are shown
_MOST = 60_000  # images whose pairs are compared: ten seconds of one core


class Alike:
  """Distances among examples.

  Args:
    images: [N, …], in memory or on disk.
  """

  def __init__(self, images: Any):
    self._images, self._lock = images, threading.Lock()
    self.nearest = functools.lru_cache(1024)(self._nearest)

  def _nearest(self, position: int, k: int) -> list[tuple[int, float]]:
    """The k nearest other images of one, with their distances, nearest first."""
    own = flat(read_rows(self._images, np.array([position])))[0]
    num = len(self._images)
    distances = np.empty(num)
    for begin in range(0, num, _BLOCK):
      rows = np.arange(begin, min(begin + _BLOCK, num))
      distances[rows] = root_mean_square(flat(read_rows(self._images, rows)) - own)
    distances[position] = np.inf
    order = np.argsort(distances, kind="stable")[: min(k, num - 1)]
    return [(int(n), float(distances[n])) for n in order]

  def pairs(self, k: int) -> list[tuple[int, int, float]]:
    """The k pairs that are most alike, with their distances, least first.

    Raises:
      ValueError: there are too many images.
    """
    if len(self._images) > _MOST:
      raise ValueError(
        f"Pairs are compared among {_MOST:,} images at most; there are {len(self._images):,}. The "
        "view of one image shows those nearest to it."
      )
    with self._lock:  # several requests wait for one search
      return self._pairs[:k]

  @functools.cached_property
  def _pairs(self) -> list[tuple[int, int, float]]:
    """A hundred pairs, or all where there are fewer."""
    first, second = _nearest_pairs(small_versions(self._images), 100 * _CANDIDATES)
    difference = flat(read_rows(self._images, first)) - flat(read_rows(self._images, second))
    distances = root_mean_square(difference)
    order = np.lexsort((second, first, distances))[:100]
    return [(int(first[i]), int(second[i]), float(distances[i])) for i in order]


def flat(examples: np.ndarray) -> np.ndarray:
  """float32 [n, D]: pixels in [−1, 1], or numbers as they are."""
  numbers = examples.reshape(len(examples), -1).astype(np.float32)
  return numbers / np.float32(127.5) - 1 if examples.dtype == np.uint8 else numbers


def root_mean_square(differences: np.ndarray) -> np.ndarray:
  """[n] of differences [n, D], summed in float64."""
  squares = np.einsum("nd,nd->n", differences, differences, dtype=np.float64)
  return np.sqrt(squares / differences.shape[1])


def small_versions(images: Any) -> np.ndarray:
  """float32 [N, ≤ 64] block means of all images, over channels too."""
  parts = []
  for begin in range(0, len(images), _BLOCK):
    rows = read_rows(images, np.arange(begin, min(begin + _BLOCK, len(images))))
    numbers = flat(rows).reshape(rows.shape)
    if numbers.ndim == 4:
      numbers = _means(_means(numbers.mean(axis=3), 1, _GRID), 2, _GRID)
    parts.append(_means(numbers.reshape(len(rows), -1), 1, _GRID**2))
  return np.concatenate(parts)


def _means(numbers: np.ndarray, axis: int, parts: int) -> np.ndarray:
  """Means over so many stretches of an axis, as equal as can be; a shorter axis as it is."""
  length = numbers.shape[axis]
  if length <= parts:
    return numbers
  edges = np.linspace(0, length, parts + 1).astype(int)
  shape = [1] * numbers.ndim
  shape[axis] = parts
  sums = np.add.reduceat(numbers, edges[:-1], axis=axis)
  return sums / np.diff(edges).reshape(shape).astype(np.float32)


def _nearest_pairs(small: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """[≤ most] first < second of the pairs with the least distances of small versions [N, d]."""
  squares = np.einsum("nd,nd->n", small, small)
  best, bound = np.empty((0, 3)), np.inf
  for begin in range(0, len(small), _ROWS):
    own = slice(begin, begin + _ROWS)
    distances = squares[own, None] + squares[None, begin:] - 2 * (small[own] @ small[begin:].T)
    num = len(distances)
    distances[:, :num][np.tril_indices(num)] = np.inf  # each pair once, and none with itself
    i, j = np.nonzero(distances < bound)
    found = np.stack([i + begin, j + begin, distances[i, j]], axis=1)
    if len(found) > most:
      found = found[np.argpartition(found[:, 2], most)[:most]]
    best = np.concatenate([best, found])
    best = best[np.argsort(best[:, 2], kind="stable")[:most]]
    bound = best[-1, 2] if len(best) == most else np.inf
  pairs = best[:, :2].astype(int)
  return pairs[:, 0], pairs[:, 1]
