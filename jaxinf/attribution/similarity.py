"""Baselines that see no model: how alike the images are, in pixels or in embeddings, or chance.

They return `Scores` as influence does: the more alike, the higher, and so the more an example is
taken to support a query. Their values have no units of a measurement: only their order, and with
the same for all queries the order of sums over removed examples, means anything.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.attribution.examples import check_alike, examples_of
from jaxinf.core.random import example_numbers, fold_in_each, stream
from jaxinf.core.types import Array
from jaxinf.diffusion.model import checked_ids, checked_images
from jaxinf.scores.scores import Scores

_ROWS = 1024  # training examples at a time: a float64 copy of all CIFAR-10 pixels is 1.2 GB


def pixel_similarity(
  queries: Array,
  train_images: Array,
  *,
  metric: str = "cosine",
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
) -> Scores:
  """Similarity of raw pixels, in [-1, 1] as the model sees them (uint8 x is x / 127.5 − 1).

  Args:
    queries: [Q, H, W, C], float32 in [-1, 1] or uint8.
    train_images: [N, H, W, C], likewise.
    metric: "cosine" of the angle at mid-grey, 0 for an image that is mid-grey throughout; or "l2",
      minus the Euclidean distance.
    query_ids, train_ids: stable ids; row numbers where None.

  Raises:
    ValueError: shapes differ, ids don't fit, or another metric.
  """
  query = examples_of(queries, query_ids, None, "query")
  train = examples_of(train_images, train_ids, None, "train")
  check_alike(query, train)
  if metric not in METRICS:
    raise ValueError(f"unknown metric {metric!r}; the metrics are {', '.join(METRICS)}.")
  values = METRICS[metric](_pixels(query.images), map(_pixels, _chunks(train.images)))
  return _scores(values, query.ids, train.ids, {"method": "pixel", "metric": metric})


def embedding_similarity(
  query_embeddings: Array,
  train_embeddings: Array,
  *,
  query_ids: np.ndarray | None = None,
  train_ids: np.ndarray | None = None,
  name: str = "embedding",
) -> Scores:
  """Cosine of embeddings [Q, E] and [N, E], of CLIP or any other network; 0 for a zero embedding.

  Args:
    query_embeddings, train_embeddings: finite numbers.
    query_ids, train_ids: stable ids; row numbers where None.
    name: of the method, for the settings.

  Raises:
    ValueError: shapes or ids don't fit, or numbers are not finite.
  """
  query, train = np.asarray(query_embeddings), np.asarray(train_embeddings)
  if query.ndim != 2 or train.ndim != 2 or not query.size or query.shape[1:] != train.shape[1:]:
    raise ValueError(
      "Embeddings must be arrays [Q, E] and [N, E] from one network; "
      f"got shapes {query.shape} and {train.shape}."
    )
  if not (np.isfinite(query).all() and np.isfinite(train).all()):
    raise ValueError("Embeddings must be finite; got NaN or infinite ones.")
  query_ids = checked_ids(query_ids, len(query), "query_ids")
  train_ids = checked_ids(train_ids, len(train), "train_ids")
  values = _cosine(query.astype(float), (x.astype(float) for x in _chunks(train)))
  return _scores(values, query_ids, train_ids, {"method": name, "metric": "cosine"})


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
  images = checked_images(images)
  if images.shape[3] not in (1, 3):
    raise ValueError(f"CLIP sees grey or RGB images; got {images.shape[3]} channels.")
  torch, model, preprocess = _load_clip(Path(folder).expanduser())
  parts = []
  for batch in _chunks(images, batch_size):
    rgb = np.broadcast_to(_bytes(batch), (*batch.shape[:3], 3))
    inputs = preprocess(images=list(rgb), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
      found = model.get_image_features(pixel_values=inputs["pixel_values"])
    parts.append(getattr(found, "pooler_output", found).float().numpy())  # from transformers 5 on
  return np.concatenate(parts)


def random_scores(query_ids: np.ndarray, train_ids: np.ndarray, *, seed: int) -> Scores:
  """Independent N(0, 1) scores: what no information is worth.

  A score belongs to its pair of ids, whatever others are scored beside it.
  """
  query_ids = checked_ids(query_ids, len(query_ids), "query_ids")
  train_ids = checked_ids(train_ids, len(train_ids), "train_ids")
  keys = fold_in_each(stream(seed, "random_scores"), jnp.asarray(example_numbers(train_ids)))

  @jax.jit
  def row(keys: jax.Array, query: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, query)))(keys)

  values = np.stack([row(keys, number) for number in example_numbers(query_ids)])
  return _scores(values, query_ids, train_ids, {"method": "random", "seed": seed})


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
  values: np.ndarray, query_ids: np.ndarray, train_ids: np.ndarray, settings: dict[str, Any]
) -> Scores:
  """Scores without noise: one group of draws."""
  return Scores(values[None].astype(np.float32), query_ids, train_ids, settings)


def _chunks(rows: np.ndarray, size: int = _ROWS) -> Iterator[np.ndarray]:
  return (rows[start : start + size] for start in range(0, len(rows), size))


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
