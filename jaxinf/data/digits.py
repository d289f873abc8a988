"""Scikit-learn's digits: 1,797 handwritten digits of 8 × 8 pixels, part of its installation."""

import numpy as np

from jaxinf.data.dataset import DataConfig, Dataset, check_options


def digits(config: DataConfig) -> Dataset:
  """All 1,797 digits [N, 8, 8, 1]; grey levels x in 0…16 become x / 8 − 1.

  Ids are `digit_0000` … in scikit-learn's order; labels are the digits 0 to 9.
  """
  check_options(config)
  from sklearn import datasets  # takes a second, which other data sets need not pay

  levels, labels = datasets.load_digits(return_X_y=True)
  return Dataset(
    name="digits",
    images=(levels.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32),
    ids=np.array([f"digit_{n:04d}" for n in range(len(levels))]),
    labels=labels,
    label_names=tuple("0123456789"),
  )
