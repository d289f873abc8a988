"""Baselines that see no model: how alike the images are, in pixels or in embeddings, or chance.

They return `Scores` as influence does: the more alike, the higher, and so the more an example is
taken to support a query. Their values have no units of a measurement: only their order, and with
the same for all queries the order of sums over removed examples, means anything.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.arrays import blocks, read_rows
from jaxinf.core.checks import checked_seed
from jaxinf.core.examples import Examples, check_alike, checked_data
from jaxinf.core.random import fold_in_each, stream
from jaxinf.core.registry import named
from jaxinf.core.types import Array
from jaxinf.engine.kernels import numerics
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


def pixel_similarity(*, queries: Examples, train: Examples, metric: str = "cosine") -> Scores:
  """Similarity of raw pixels, in [-1, 1] as the model sees them (uint8 x is x / 127.5 − 1).

  Args:
    queries, train: both.
    metric: "cosine" of the angle at mid-grey, 0 for an image that is mid-grey throughout; or "l2",
      minus the Euclidean distance.

  Raises:
    ValueError: shapes differ, or another metric.
  """
  check_alike(queries, train)
  of_rows = named(METRICS, metric, "metric")
  pixels = map(_pixels, blocks(train.data))
  values = of_rows(_pixels(read_rows(queries.data, np.arange(len(queries)))), pixels)
  return _scores(values, queries, train, {"method": "pixel", "metric": metric})


def embedding_similarity(*, queries: Examples, train: Examples, name: str = "embedding") -> Scores:
  """Cosine of embeddings, of CLIP or any other network; 0 for a zero embedding.

  Args:
    queries, train: whose data are embeddings [Q, E] and [N, E] of one network.
    name: of the method, for the settings.

  Raises:
    ValueError: shapes don't fit.
  """
  shapes = queries.data.shape, train.data.shape
  if len(shapes[0]) != 2 or shapes[0][1:] != shapes[1][1:]:
    raise ValueError(
      f"Embeddings must be arrays [Q, E] and [N, E] from one network; got shapes {shapes[0]} and "
      f"{shapes[1]}."
    )
  asked = read_rows(queries.data, np.arange(len(queries))).astype(float)
  values = _cosine(asked, (x.astype(float) for x in blocks(train.data)))
  return _scores(values, queries, train, {"method": name, "metric": "cosine"})


def clip_embeddings(images: Array, folder: str | Path, *, batch_size: int = 64) -> np.ndarray:
  """Image embeddings [B, E] float32 by a CLIP in transformers' format, on PyTorch.

  Nothing is downloaded. Images go through the folder's own preprocessing as RGB of 8 bits.

  Args:
    images: [B, H, W, C] of one or three channels, float32 in [-1, 1] or uint8.
    folder: with config.json, preprocessor_config.json and weights, as `save_pretrained` or the
      model's page on the Hugging Face hub has them.
    batch_size: images at a time.

  Raises:
    ValueError: transformers or PyTorch is not installed, the folder holds no CLIP, or the images
      have other channels.
  """
  images = checked_data(images)
  if len(images.shape) != 4 or images.shape[3] not in (1, 3):
    raise ValueError(f"CLIP sees grey or RGB images [B, H, W, C]; got shape {images.shape}.")
  torch, model, preprocess = _load_clip(Path(folder).expanduser())
  parts = []
  num = images.shape[0]
  for begin in range(0, num, batch_size):
    batch = read_rows(images, np.arange(begin, min(begin + batch_size, num)))
    rgb = np.broadcast_to(_bytes(batch), (*batch.shape[:3], 3))
    inputs = preprocess(images=list(rgb), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
      found = model.get_image_features(pixel_values=inputs["pixel_values"])
    parts.append(getattr(found, "pooler_output", found).float().numpy())  # from transformers 5 on
  return np.concatenate(parts)


@numerics()
def random_scores(*, queries: Examples, train: Examples, seed: int = 0) -> Scores:
  """Independent N(0, 1) scores: what no information is worth.

  A score belongs to its pair of ids, whatever others are scored beside it.
  """
  keys = fold_in_each(stream(checked_seed(seed), "random_scores"), jnp.asarray(train.numbers))

  @jax.jit
  def row(keys: jax.Array, query: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, query)))(keys)

  values = np.stack([row(keys, number) for number in queries.numbers])
  return _scores(values, queries, train, {"method": "random", "seed": seed})


@dataclasses.dataclass(frozen=True)
class PixelSimilarity:
  """`pixel_similarity` as a method."""

  metric: str = "cosine"

  def scores(self, *, queries: Examples, train: Examples, **how: Any) -> Sweep:
    """One set of scores; there are no draws, and nothing to damp."""
    return Sweep((pixel_similarity(queries=queries, train=train, metric=self.metric),))


@dataclasses.dataclass(frozen=True)
class EmbeddingSimilarity:
  """`embedding_similarity` as a method.

  Attributes:
    embed: examples → their embeddings [n, E].
    name: of the method.
  """

  embed: Callable[[Examples], Array]
  name: str = "embedding"

  def scores(self, *, queries: Examples, train: Examples, **how: Any) -> Sweep:
    """One set of scores."""
    both = (Examples(self.embed(each), each.ids) for each in (queries, train))
    return Sweep((embedding_similarity(queries=next(both), train=next(both), name=self.name),))


@dataclasses.dataclass(frozen=True)
class RandomScores:
  """`random_scores` as a method."""

  seed: int = 0

  def scores(self, *, queries: Examples, train: Examples, **how: Any) -> Sweep:
    """One set of scores."""
    return Sweep((random_scores(queries=queries, train=train, seed=self.seed),))


def _cosine(query: np.ndarray, train: Iterator[np.ndarray]) -> np.ndarray:
  """Cosines [Q, N] of rows [Q, D] with parts of rows [N, D], in float64; 0 for rows of zeros."""
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
  return np.concatenate([unit(query) @ unit(part).T for part in train], axis=1)


def _negative_l2(query: np.ndarray, train: Iterator[np.ndarray]) -> np.ndarray:
  """−‖q − n‖ [Q, N] of rows [Q, D] and parts of rows [N, D], in float64.

  By ‖q‖² + ‖n‖² − 2 q·n, whose cancellation leaves an error of some 1e-8 ‖q‖ at equal rows.
  """
  square = lambda x: np.square(x).sum(axis=1)
  distances = (
    np.sqrt(np.maximum(square(query)[:, None] + square(part) - 2 * query @ part.T, 0))
    for part in train
  )
  return -np.concatenate(list(distances), axis=1)


def _scores(
  values: np.ndarray, queries: Examples, train: Examples, settings: dict[str, Any]
) -> Scores:
  """Scores without noise: one replicate of draws."""
  return Scores(
    values[None].astype(np.float32), queries.ids, train.ids, settings, train_groups=train.groups
  )


def _pixels(images: np.ndarray) -> np.ndarray:
  """[B, H · W · C] float64 in [-1, 1]."""
  values = images.reshape(len(images), -1).astype(float)
  return values / 127.5 - 1 if images.dtype == np.uint8 else values


def _bytes(images: np.ndarray) -> np.ndarray:
  """Images as uint8, to the nearest of its 256 values."""
  if images.dtype == np.uint8:
    return images
  return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _load_clip(folder: Path) -> tuple[Any, Any, Any]:
  """PyTorch, the CLIP in the folder and its preprocessing; ValueError where any is lacking."""
  try:
    import torch
    from transformers import CLIPImageProcessor, CLIPModel
  except ImportError as error:
    raise ValueError(
      f"CLIP needs transformers and PyTorch, as of `pip install 'jaxinf[clip]'`: {error}. Or pass "
      "embeddings made elsewhere to embedding_similarity."
    ) from error
  expected = f"{folder}: expected a CLIP in transformers' format"
  if not (folder / "config.json").is_file():
    raise ValueError(f"{expected}, got no config.json. Save one with CLIPModel.save_pretrained.")
  try:
    model, info = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    preprocess = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
  except Exception as error:  # transformers raises many types
    raise ValueError(f"{expected}: {error}") from error
  missing = sorted(info["missing_keys"])
  if missing:  # transformers would go on with random weights
    raise ValueError(f"{expected}; {len(missing)} weights are missing, such as {missing[0]}.")
  return torch, model.eval(), preprocess


METRICS: dict[str, Callable[[np.ndarray, Iterator[np.ndarray]], np.ndarray]] = {
  "cosine": _cosine,
  "l2": _negative_l2,
}
