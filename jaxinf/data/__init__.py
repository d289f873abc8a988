"""Data sets by name. A loader is a function `(DataConfig) -> Dataset`.

A new one is a function and a line in DATASETS; its first act is `check_options`.
"""

import dataclasses
from collections.abc import Callable

from jaxinf.core.registry import named
from jaxinf.data.artbench import artbench, artbench2
from jaxinf.data.cifar import cifar2, cifar10
from jaxinf.data.conditioning import conditioned
from jaxinf.data.dataset import DataConfig, Dataset
from jaxinf.data.digits import digits
from jaxinf.data.files import arrays, folder
from jaxinf.data.resizing import resized


def load(config: DataConfig) -> Dataset:
  """The data set `config.name`, or a seeded subset of `config.num_examples` of it.

  Images have the size `config.image_size`, where it is not None, as resizing.py says. Examples have
  the conditioning that `config.conditioning` names and the captions of `config.captions`. The
  subset has the labels' proportions, and keeps ids and order.

  Raises:
    ValueError: an unknown name, an option that the data set does not read, files that cannot be
      read, conditioning that is not there, or a subset larger than the data set.
  """
  loader = named(DATASETS, config.name, "data set")
  if config.image_size is not None and config.image_size < 1:
    raise ValueError(f"data.image_size must be positive or None; got {config.image_size}.")
  dataset = loader(config)
  if config.image_size is not None:
    dataset = dataclasses.replace(dataset, images=resized(dataset.images, config.image_size))
  dataset = conditioned(dataset, config)
  if config.num_examples is None:
    return dataset
  return dataset.sample(config.num_examples, config.seed)


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
  "digits": digits,
  "cifar10": cifar10,
  "cifar2": cifar2,
  "arrays": arrays,
  "folder": folder,
  "artbench": artbench,
  "artbench2": artbench2,
}
