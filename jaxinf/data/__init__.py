"""Data sets by name. A loader is a function `(DataConfig) -> Dataset`.

A new one is a function and a line in DATASETS; its first act is `check_options`.
"""

from collections.abc import Callable

from jaxinf.core.registry import named
from jaxinf.data.cifar import cifar2, cifar10
from jaxinf.data.dataset import DataConfig, Dataset
from jaxinf.data.digits import digits
from jaxinf.data.files import arrays, folder


def load(config: DataConfig) -> Dataset:
  """The data set `config.name`, or a seeded subset of `config.num_examples` of it.

  The subset has the labels' proportions, and keeps ids and order.

  Raises:
    ValueError: an unknown name, an option that the data set does not read, files that cannot be
      read, or a subset larger than the data set.
  """
  dataset = named(DATASETS, config.name, "data set")(config)
  if config.num_examples is None:
    return dataset
  return dataset.sample(config.num_examples, config.seed)


DATASETS: dict[str, Callable[[DataConfig], Dataset]] = {
  "digits": digits,
  "cifar10": cifar10,
  "cifar2": cifar2,
  "arrays": arrays,
  "folder": folder,
}
