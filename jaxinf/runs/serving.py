"""The stages that keep training gradients and answer new queries from them.

`index` leaves a store in workdir/index; `query` scores images from a file, and what they find lies
under workdir/query/, in a folder named after the file. `index-append`, `index-delete` and
`index-verify` keep the store.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinf import data
from jaxinf.compression.compression import compression_named
from jaxinf.core.arrays import read_rows
from jaxinf.core.damping import damping_named
from jaxinf.core.examples import Examples
from jaxinf.data import DataConfig, Dataset
from jaxinf.engine import artifacts, processes
from jaxinf.engine.artifacts import Artifact, Outcome
from jaxinf.networks.latent_cache import moments_of
from jaxinf.networks.latents import Autoencoder
from jaxinf.runs.output import show
from jaxinf.runs.run import (
  Run,
  check_classes,
  content_of_stage,
  load_curvature,
  load_model,
  num_classes_of,
  own_settings,
)
from jaxinf.scores.models import mean_scores
from jaxinf.scores.scores import Ranking, Scores
from jaxinf.store.build import build_store, open_store
from jaxinf.store.store import Store

_LOG = logging.getLogger("jaxinf")
_MIB = 2**20


def index(run: Run) -> Outcome:
  """The store of all training gradients."""
  config = run.config.index
  store = build_store(
    store_folder(run),
    load_curvature(run, load_model(run)),
    train=run.train,
    draws=run.draws(config.draws, config.replicates, config.design, config.loss_power),
    compression=compression_named(config.compression, config.compression_size),
    reserve_bytes=config.reserve_mib * _MIB,
    compute=run.compute(config.batch_size),
  )
  notes = {"settings": store.settings, "num_bytes": store.num_bytes, "files": ["store"]}
  what = f"the gradients of {len(store)} images ({store.num_bytes / _MIB:,.1f} MiB)"
  return {}, notes, what


def load_store(run: Run) -> Store:
  """The store of a run, checked against its model and curvature."""
  return open_store(store_folder(run), load_curvature(run, load_model(run)))


def store_folder(run: Run) -> Path:
  """Where the rows lie."""
  return run.folder("index") / "store"


def query(run: Run) -> Artifact:
  """The best training images of each of `run.images`, from the store; printed, and kept.

  Where the run has several models, scores are means over their stores.
  """
  images = _given_images(run)
  assert run.images is not None
  stores = opened_stores(run)
  contents = [store.rows.ledger.content for _, store in stores]
  key = {
    "seed": run.config.seed,
    "query": own_settings(run, "query"),
    "images": images.fingerprint(),
    "index": contents[0],
  }
  if len(stores) > 1:
    key["models"] = contents[1:]
  if run.is_latent:
    key["autoencoder"] = _autoencoder(run).fingerprint
  digest = artifacts.fingerprint_of(artifacts.plain(key))[:8]
  folder = run.folder("query") / f"{run.images.stem}-{digest}"

  def compute() -> Outcome:
    found = dataclasses.asdict(_found(stores, images))
    if len(stores) == 1:
      del found["model_std_errors"]  # which are NaN
    notes = {"settings": stores[0][1].settings}
    return {"query_ids": images.ids, **found}, notes, f"the best training images of {len(images)}"

  artifact = artifacts.cached(folder, key, compute, label="query")
  show(run, _table(artifact.arrays), {"folder": folder, "queries": _listed(artifact.arrays)})
  return artifact


def append(run: Run) -> Store:
  """Adds `run.images` to the store as training images, and to those of further models.

  Where this was stopped between two stores, those that have the images are left as they are.
  """
  images, config = _given_images(run), run.config.index
  processes.check_same(images.fingerprint(), "the images of --images")
  stores = opened_stores(run)
  lacking = [pair for pair in stores if not np.isin(images.ids, _ids_of(pair[1])).all()]
  for model, store in lacking or stores[:1]:  # a store that has them all says so
    store.append(
      _as_training(model, images),
      reserve_bytes=config.reserve_mib * _MIB,
      compute=run.compute(config.batch_size),
    )
  _, store = stores[0]
  _LOG.info("index-append: %d images, now %d in the store", len(images), len(store))
  return store


def delete(run: Run) -> Store:
  """Deletes the training images `run.ids` from the store."""
  if not run.ids:
    raise ValueError("Say which images to delete: --ids=ID,ID,…")
  processes.check_same(" ".join(run.ids), "--ids")
  stores = opened_stores(run)
  for _, store in stores:
    store.delete(run.ids)
  _, store = stores[0]
  _LOG.info("index-delete: %d images, now %d in the store", len(run.ids), len(store))
  return store


def verify(run: Run) -> Store:
  """Reads the whole store and compares its checksums."""
  stores = opened_stores(run)
  for _, store in stores:
    size = store.verify() / _MIB
    _LOG.info("index-verify: %s is sound: %d images, %.1f MiB", store.rows.folder, len(store), size)
  return stores[0][1]


def opened_stores(run: Run) -> list[tuple[Run, Store]]:
  """The store of each model, with the run of that model."""
  return [(model, load_store(model)) for model in run.each_model()]


def _ids_of(store: Store) -> np.ndarray:
  """Of the examples that are not deleted."""
  ledger = store.rows.ledger
  return ledger.ids[ledger.kept]


def scores_of_images(stores: Sequence[tuple[Run, Store]], images: Dataset, **asked: Any) -> Scores:
  """Scores of given images with all of the stores' examples: means over the models.

  Args:
    stores: of each model.
    images: the queries, with the conditioning that models take.
    asked: arguments of `Store.query` that take the place of the config's.
  """
  return mean_scores(
    [store.query(**(_question(run, store, images) | asked)) for run, store in stores]
  )


def _found(stores: Sequence[tuple[Run, Store]], images: Dataset) -> Ranking:
  """The best of one store, without a score of every image; or by means over several stores."""
  if len(stores) == 1:
    ((run, store),) = stores
    return store.top(**_question(run, store, images), k=_num_shown(run, store))
  return scores_of_images(stores, images).top(_num_shown(*stores[0]))


def _num_shown(run: Run, store: Store) -> int:
  return min(run.config.query.top_k, len(store))


def _question(run: Run, store: Store, images: Dataset) -> dict[str, Any]:
  """The arguments of a query of the store."""
  config = run.config.query
  return dict(
    queries=_as_queries(run, images),
    damping=damping_named(config.damping_kind, config.damping),
    draws=dataclasses.replace(
      store.draws,
      num=config.draws,
      replicates=config.query_replicates,
      seed=run.seed,
      loss_power=None,  # which weights draws of training examples alone
    ),
    measurement=config.measurement,
    layers=config.layers,
    compute=run.compute(config.batch_size),
  )


def _as_training(run: Run, images: Dataset) -> Examples:
  """Given images as training examples like those of the run."""
  images = dataclasses.replace(images, random_flip=run.dataset.random_flip)
  if not run.is_latent:
    return run.training_examples(images)
  moments = moments_of(
    _autoencoder(run),
    read_rows(images.images, np.arange(len(images))),
    mirrored=images.random_flip,
    batch_size=run.config.latent.batch_size,
    devices=run.devices,
    sample=run.config.latent.sample,
  )
  return run.training_examples(images, moments)


def _as_queries(run: Run, images: Dataset) -> Examples:
  """Given images as queries: the modes of their latents where the model is of latents."""
  data = images.images
  if run.is_latent:
    vae, size = _autoencoder(run), run.config.latent.batch_size
    data = vae.scaled(vae.encode(data, batch_size=size, devices=run.devices).mode())
  return Examples(data, images.ids, images.conditioning)


def _autoencoder(run: Run) -> Autoencoder:
  """The autoencoder, which must be the one that the training images were encoded with."""
  content_of_stage(run, "encode")
  return run.autoencoder


def _with_classes_of(dataset: Dataset, images: Dataset) -> Dataset:
  """Given images whose labels are numbered as the data set's classes are, by name where named.

  Raises:
    ValueError: a label is of no class of the data set.
  """
  given, num = images.conditioning, num_classes_of(dataset)
  if not given or "labels" not in given or num is None:
    return images
  labels = np.asarray(given["labels"])
  if images.label_names and dataset.label_names:
    unknown = sorted(set(images.label_names) - set(dataset.label_names))
    if unknown:
      raise ValueError(
        f"The images of --images have labels that are no classes of {dataset.name!r}: "
        f"{', '.join(unknown)}. There are: {', '.join(dataset.label_names)}."
      )
    numbers = np.array([dataset.label_names.index(name) for name in images.label_names], np.int32)
    labels = numbers[labels]
  check_classes(labels, dataset, "--images")
  return dataclasses.replace(
    images,
    labels=labels,
    label_names=dataset.label_names,
    conditioning={**given, "labels": labels.astype(np.int32)},
  )


def _given_images(run: Run) -> Dataset:
  """The images of `run.images`, an .npz file or a folder."""
  if run.images is None:
    raise ValueError("Say which images: --images=FILE.npz or --images=FOLDER.")
  name = "arrays" if run.images.suffix == ".npz" else "folder"
  if not run.images.exists():
    raise ValueError(f"--images={run.images} does not exist.")
  if not (run.images.is_dir() if name == "folder" else run.images.is_file()):
    raise ValueError(f"--images must be an .npz file or a folder of images; got {run.images}.")
  size = run.config.data.image_size
  given, captions = run.config.data.conditioning, run.config.data.captions
  config = DataConfig(
    name,
    path=str(run.images),
    image_size=size,
    conditioning=given,
    captions=captions if name == "folder" and "text" in given else None,
  )
  return _with_classes_of(run.dataset, data.load(config))


def _listed(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """The best training images of each query, for programs."""
  shown = {"ids": "id", "values": "score", "std_errors": "std_error"}
  shown |= {"model_std_errors": "model_std_error"} if "model_std_errors" in arrays else {}
  return [
    {
      "query": str(query),
      "best": [
        dict(zip(shown.values(), row, strict=True))
        for row in zip(*(arrays[name][q].tolist() for name in shown), strict=True)
      ],
    }
    for q, query in enumerate(arrays["query_ids"])
  ]


def _table(arrays: Mapping[str, np.ndarray]) -> str:
  """The best training images of each query as aligned text."""
  between = arrays.get("model_std_errors", np.full_like(arrays["values"], np.nan))
  head = "The training images that support each image most: score ± standard error"
  lines = [head + ", and between models" * ("model_std_errors" in arrays)]
  rows = (*(arrays[n] for n in ("query_ids", "ids", "values", "std_errors")), between)
  for query_id, *row in zip(*rows, strict=True):
    lines.append(f"{query_id}")
    for i, value, error, other in zip(*row, strict=True):
      last = "" if np.isnan(other) else f" ± {other:.2g}"
      lines.append(f"  {i!s:24} {value:12.5g} ± {error:.2g}{last}")
  return "\n".join(lines)
