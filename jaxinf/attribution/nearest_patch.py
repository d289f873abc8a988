"""Nearest patches: the training images that an ideal denoiser takes the patches of a sample from.

There is no model and no gradient. The best denoiser of x_t = a x + b ε for a given training set
averages its images by their posterior weights. One that sees patches alone, as a convolutional
network does, does so at each position p by itself, with the patches P of all training images n that
lie up to `window` pixels away (moves m):

  w(n, m | p) ∝ exp(−‖P_p x_t − a P_{p+m} y_n‖² / (2 b²)),   Σ_n Σ_m w(n, m | p) = 1.

The score of image n is the mean over positions p and draws of (t, ε) of Σ_m w(n, m | p): the share
of the sample that it gives. The scores of a query add up to 1.

A patch grows with the noise: its side is growth · b / a pixels. Two patches of k² pixels that
differ by v a pixel have log-odds of k² v a² / (2 b²) with standard deviation k √v a / b. Therefore
a side in proportion to b / a tells them apart equally well at all times.

References: Nonparametric Data Attribution (ICML 2026) has this score, with patches of one or two
sizes at all times and all positions searched. Patches that grow with the noise are those of Kamb
and Ganguli 2024 (arXiv:2412.20292).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.kernels import QUERY, Replicate
from jaxinf.core.arrays import as_float, read_rows
from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.random import stream_number
from jaxinf.core.types import Batch, PyTree
from jaxinf.diffusion.noise import draw_noise, draw_times
from jaxinf.diffusion.process import Process
from jaxinf.engine import rehearsal
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import Kernel
from jaxinf.engine.maps import map_batches
from jaxinf.engine.worklist import Rows
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

_DRAWS = Draws(50)
_ELEMENTS = 2**22  # distances in memory at a time: 16 MiB, which keeps a device busy
_BLOCK_BYTES = 2**28  # of training images that are on a device at a time
_LEAST = 1e-6  # b, and b / a: less noise than float32 images can show


def nearest_patch(
  process: Process,
  *,
  queries: Examples,
  train: Examples,
  draws: Draws = _DRAWS,
  window: int = 1,
  smallest: int = 3,
  growth: float = 15.0,
  compute: Compute = Compute(),
) -> Scores:
  """Posterior weights of training images in the ideal denoising of each query, patch by patch.

  Args:
    process: whose noise levels a_t and b_t, and law of t, are taken.
    queries: data [Q, …, C]; a patch spans all axes between the first and the last.
    train: data [N, …, C]. Where training mirrored images, both views of an image count.
    draws: of (t, ε) for each query. Replicates of them give the standard errors.
    window: pixels along each axis that a training patch may lie away from the query's; 0: none. A
      patch that reaches an edge is compared with patches that reach it at the same distance alone.
      The cost is (2 window + 1)² in images.
    smallest: least side of a patch, in pixels; odd. Sides from twice that of the image on are the
      whole image.
    growth: side of a patch, in pixels, by noise-to-signal ratio b / a; 0: all are the smallest.
    compute: batch_size, (query, draw) pairs at a time over all devices, and devices.

  Returns:
    Scores in [0, 1], the mean weight of each training image; sums over images are 1.

  Raises:
    ValueError: shapes differ, training data are moments, or a setting is out of range.
  """
  method = NearestPatch(process, window, smallest, growth)
  return method.scores(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class NearestPatch:
  """`nearest_patch` as a method: see there for the fields."""

  process: Process
  window: int = 1
  smallest: int = 3
  growth: float = 15.0

  def __post_init__(self):
    checked_count(self.window, "window", 0)
    if checked_count(self.smallest, "smallest") % 2 == 0:
      raise ValueError(
        f"smallest must be odd, so that a patch has a middle; got {self.smallest}. Take "
        f"{self.smallest + 1}."
      )
    if not self.growth >= 0:
      raise ValueError(f"growth must be a number of pixels, at least 0; got {self.growth}.")

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = _DRAWS,
    compute: Compute = Compute(),
  ) -> Sweep:
    """One set of scores; there is nothing to damp."""
    _check(queries, train, draws)
    draws = draws.split()
    patches = Patches(self, Replicate.of(draws), train.random_flip)
    # Passes know of the queries in full, and not that there are more training images.
    times = [rehearsal.in_full(len(x), len(x)) / len(x) for x in (queries, train)]
    with rehearsal.part(times[0] * (times[1] - 1)):
      values = _weights(patches, queries, train, draws, compute)
    settings = {
      "method": "nearest-patch",
      "process": self.process.settings,
      "draws": draws.num,
      "replicates": draws.replicates,
      "seed": draws.seed,
      "design": draws.design,
      "random_flip": train.random_flip,
      **{name: getattr(self, name) for name in ("window", "smallest", "growth")},
    }
    return Sweep((Scores(values, queries.ids, train.ids, settings, train_groups=train.groups),))


def _check(queries: Examples, train: Examples, draws: Draws) -> None:
  """Raises ValueError where queries and training examples cannot be compared by patches."""
  if train.latents is not None:
    raise ValueError(
      "Patches are compared with the training data themselves: give the images or latents, and no "
      "moments."
    )
  check_alike(queries, train)
  if draws.stop is not None:
    raise ValueError("Nearest patches take a fixed number of draws: Draws(num).")


def _weights(
  patches: "Patches", queries: Examples, train: Examples, draws: Draws, compute: Compute
) -> np.ndarray:
  """[G, Q, N] mean weights, in two passes over the training images, a block at a time."""
  origin = np.uint32(draws.seed), np.uint32(stream_number(QUERY))
  num_replicates = draws.replicates or 1

  def passed(kernel: Kernel, block: PyTree, given: PyTree, label: str) -> np.ndarray:
    found = map_batches(
      kernel,
      (origin, *block),
      Rows(queries.data, queries.numbers, num_replicates, given),
      batch_size=compute.rows(draws),
      label=label,
      unit="(query, replicate) rows",
      devices=compute.devices,
    )
    return found.reshape(len(queries), num_replicates, *found.shape[1:])

  total: np.ndarray | None = None
  for block in _blocks(train):
    part = passed(LogSumKernel(patches), block, None, "patches")
    total = part if total is None else np.logaddexp(total, part)
  parts = [passed(WeightKernel(patches), block, total, "weights") for block in _blocks(train)]
  return np.concatenate(parts, axis=2)[..., : len(train)].transpose(1, 0, 2)


def _blocks(train: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (images [n, …, C], mask [n]) of consecutive training images, of one size n."""
  num = len(train)
  row_bytes = math.prod(train.data.shape[1:]) * np.dtype(train.data.dtype).itemsize
  num_blocks = math.ceil(num * row_bytes / _BLOCK_BYTES)
  size = math.ceil(num / num_blocks)
  for begin in range(0, num, size):
    rows = np.arange(begin, begin + size)
    yield read_rows(train.data, np.minimum(rows, num - 1)), (rows < num).astype(np.float32)


class NoisedQueries(NamedTuple):
  """P (query, draw) pairs."""

  x_t: jax.Array  # [P, …, C]
  a: jax.Array  # [P]
  b: jax.Array  # [P]
  radius: jax.Array  # [P] int32: a patch has the side 2 · radius + 1


@dataclasses.dataclass(frozen=True)
class Patches:
  """The weights of patches, up to their sum.

  Attributes:
    method: window, sizes of patches, and the process.
    replicate: of the draws of queries.
    random_flip: whether mirror images of training images [N, H, W, C] count too.
  """

  method: NearestPatch
  replicate: Replicate
  random_flip: bool

  def noised(self, origin: PyTree, batch: Batch) -> NoisedQueries:
    """The pairs of (query, replicate) rows, row-major."""
    keys, draws = self.replicate.keys(origin, batch), self.replicate.draws
    data = jnp.repeat(as_float(batch.data), keys.shape[1], axis=0)
    process, t = self.method.process, draw_times(self.method.process, keys, draws)
    x_t = process.noised(data, t, draw_noise(data.shape[1:], keys, draws))
    a, b = process.levels(t)
    ratio = jnp.maximum(b / jnp.maximum(a, _LEAST), _LEAST)
    largest = max(data.shape[1:-1], default=1)
    radius = jnp.clip(jnp.round(self.method.growth * ratio / 2), self.method.smallest // 2, largest)
    return NoisedQueries(x_t, a, jnp.maximum(b, _LEAST), radius.astype(jnp.int32))

  def moves(self, shape: tuple[int, ...]) -> np.ndarray:
    """[M, 1 + axes] int32: whether the image is mirrored, and pixels along each axis of …."""
    widths = (min(self.method.window, side - 1) for side in shape)
    ranges = (range(-width, width + 1) for width in widths)
    every = itertools.product((0, 1) if self.random_flip else (0,), *ranges)
    return np.array(list(every), np.int32)

  def log_weights(
    self, noised: NoisedQueries, images: jax.Array, mask: jax.Array, move: jax.Array
  ) -> jax.Array:
    """−‖P_p x_t − a P_{p+m} y_n‖² / (2 b²), [P, n, …] at every position; −∞ where there is none."""
    images, shape = as_float(images), images.shape[1:-1]
    if self.random_flip:
      images = jnp.where(move[0] > 0, images[:, :, ::-1], images)
    if shape:
      images = jnp.roll(images, -move[1:], tuple(range(1, 1 + len(shape))))
    column = lambda x: x.reshape(-1, *[1] * (1 + len(shape)))
    difference = noised.x_t[:, None] - column(noised.a)[..., None] * images
    squares = jnp.sum(jnp.square(difference), axis=-1)
    chex.assert_shape(squares, (len(noised.a), len(images), *shape))
    there = column(mask).swapaxes(0, 1) > 0
    for axis, side in enumerate(shape):
      squares = _summed(squares, noised.radius, axis + 2)
      along = _is_inside(side, noised.radius, move[1 + axis])
      there &= along.reshape(-1, 1, *[side if i == axis else 1 for i in range(len(shape))])
    return jnp.where(there, -squares / (2 * column(jnp.square(noised.b))), -jnp.inf)


def _summed(values: jax.Array, radius: jax.Array, axis: int) -> jax.Array:
  """Sums of values [P, …] along an axis over the places up to radius [P] away."""
  place = jnp.arange(values.shape[axis])
  near = jnp.abs(place[:, None] - place) <= radius[:, None, None]
  moved = jnp.moveaxis(values, axis, -1)
  sums = jnp.einsum("pij,p...j->p...i", near.astype(values.dtype), moved, precision="highest")
  return jnp.moveaxis(sums, -1, axis)


def _is_inside(side: int, radius: jax.Array, move: jax.Array) -> jax.Array:
  """[P, side] whether the patch around each place, cut at the edges and moved, is in the image."""
  place = jnp.arange(side)
  low = jnp.maximum(place - radius[:, None], 0) + move
  high = jnp.minimum(place + radius[:, None], side - 1) + move
  return (low >= 0) & (high < side)


def _chunks(
  noised: NoisedQueries, images: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Images and mask [chunks, n, …], as many images at a time as their distances have room."""
  num = len(images)
  most = max(1, _ELEMENTS // math.prod(noised.x_t.shape[:-1]))
  num_chunks = math.ceil(num / most)
  padding = -num % num_chunks
  fill = lambda x: jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
  split = lambda x: fill(x).reshape(num_chunks, -1, *x.shape[1:])
  return split(images), split(mask)


@dataclasses.dataclass(frozen=True)
class LogSumKernel:
  """(origin, images, mask), rows → [B, S, …]: log Σ_n Σ_m of the weights of a block of images."""

  patches: Patches

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    origin, images, mask = operands
    noised = self.patches.noised(origin, batch)
    moves = self.patches.moves(images.shape[1:-1])

    def of_chunk(total, chunk):
      images, mask = chunk

      def of_move(total, move):
        part = self.patches.log_weights(noised, images, mask, move)
        return jnp.logaddexp(total, jax.nn.logsumexp(part, axis=1)), None

      return jax.lax.scan(of_move, total, moves)

    none = jnp.full(noised.x_t.shape[:-1], -jnp.inf)
    total, _ = jax.lax.scan(of_chunk, none, _chunks(noised, images, mask))
    return total.reshape(len(batch.ids), -1, *total.shape[1:])


@dataclasses.dataclass(frozen=True)
class WeightKernel:
  """(origin, images, mask), rows with the log sums over all images → [B, n] mean weights.

  The log sums [B, G, S, …], of each query's replicates, are in the place of the conditioning.
  """

  patches: Patches

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    origin, images, mask = operands
    noised = self.patches.noised(origin, batch)
    moves = self.patches.moves(images.shape[1:-1])
    own = jax.vmap(lambda sums, replicate: sums[replicate])(batch.conditioning, batch.draws)
    total = own.reshape(noised.x_t.shape[:-1])[:, None]

    def of_chunk(_, chunk):
      images, mask = chunk

      def of_move(weights, move):
        part = jnp.exp(self.patches.log_weights(noised, images, mask, move) - total)
        return weights + part.mean(axis=tuple(range(2, part.ndim))), None

      none = jnp.zeros((len(total), len(mask)))
      return None, jax.lax.scan(of_move, none, moves)[0]

    _, weights = jax.lax.scan(of_chunk, None, _chunks(noised, images, mask))
    num = len(images)
    every = jnp.moveaxis(weights, 0, 1).reshape(len(total), -1)
    return every[:, :num].reshape(len(batch.ids), -1, num).mean(axis=1)
