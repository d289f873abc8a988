"""Latents known by their posterior: what an autoencoder says of each image before sampling."""

import dataclasses
from typing import Any

import numpy as np

from jaxinf.core.arrays import as_array, read_rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Moments:
  """Means and log-variances of latents, to be passed as the data of `Examples`.

  The latents of an example are (z − shift_factor) · scaling_factor with z ~ N(mean, exp(logvar)).
  Each draw samples z anew, as the training of latent diffusion models does, or takes its mean.
  A type of its own, so that moments are never taken for latents.

  Attributes:
    array: [N, M, h, w, 2c] floating-point numbers: the mean's c channels, then those of the
      logarithm of the variance. M = 1, or 2 where the mirror image of each example has moments
      too, behind its own: training that mirrors images mirrors pixels, and the latents of a mirror
      image are not those of the image mirrored. Any array that gives rows, such as a memory map.
    scaling_factor, shift_factor: from the autoencoder's latents to those of the diffusion model.
    sample: whether each draw samples the posterior; False: its mean is taken.

  Raises:
    ValueError: the array has another form.
  """

  array: Any
  scaling_factor: float = 1.0
  shift_factor: float = 0.0
  sample: bool = True

  def __post_init__(self):
    array = as_array(self.array)
    shape = tuple(array.shape)
    if len(shape) != 5 or shape[1] not in (1, 2) or shape[4] % 2 or array.dtype == np.uint8:
      raise ValueError(
        "Moments are floating-point numbers [N, M, h, w, 2c]: M is 1, or 2 with those of the "
        f"mirror image, and the mean's channels come before those of logvar; got shape {shape}, "
        f"{array.dtype}. Moments.of(mean, logvar) makes them."
      )
    if not (np.isfinite(self.scaling_factor) and self.scaling_factor > 0):
      raise ValueError(f"scaling_factor must be positive; got {self.scaling_factor}.")
    object.__setattr__(self, "array", array)

  @classmethod
  def of(
    cls, mean: Any, logvar: Any, *, mirrored: tuple[Any, Any] | None = None, **fields: Any
  ) -> "Moments":
    """Moments [N, h, w, c] as one array, with (mean, logvar) of the mirror images where given."""
    both = [(mean, logvar)] if mirrored is None else [(mean, logvar), mirrored]
    shapes = {np.shape(x) for pair in both for x in pair}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
      raise ValueError(
        "mean and logvar, and those of the mirror images, must have one shape [N, h, w, c]; got "
        f"{', '.join(map(str, sorted(shapes)))}."
      )
    return cls(np.stack([np.concatenate(pair, axis=-1) for pair in both], axis=1), **fields)

  def __len__(self) -> int:
    return self.array.shape[0]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.array.shape)

  @property
  def dtype(self) -> Any:
    return self.array.dtype

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """The numbers of these rows, [n, M, h, w, 2c]."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    return read_rows(self.array, rows)

  @property
  def form(self) -> "LatentForm":
    """How a row becomes a latent."""
    return LatentForm(float(self.scaling_factor), float(self.shift_factor), bool(self.sample))


@dataclasses.dataclass(frozen=True)
class LatentForm:
  """How a row of `Moments` becomes a latent; its fields are those of Moments."""

  scaling_factor: float
  shift_factor: float
  sample: bool
