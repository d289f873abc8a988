"""How alike two pictures are: a sample, and what another model makes of the same noise.

METRICS, at the foot, has the measures by name:

  ssim   structural similarity (Wang et al. 2004) of scikit-image, in windows of 7 × 7 pixels; 1 for
         equal pictures;
  mse    mean over all elements of the squared difference; 0 for equal ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxinf.core.registry import named

_RANGE = 2.0  # of pixels in [-1, 1]
_WINDOW = 7  # scikit-image's default, and that of Wang et al. for windows of equal weights


def resemblance(pictures: np.ndarray, others: np.ndarray, metric: str) -> np.ndarray:
  """[n] float64: how alike each of the pictures is to its other.

  Args:
    pictures, others: [n, H, W, C] with pixels in [-1, 1]; for mse, any data [n, …].
    metric: one of METRICS.

  Raises:
    ValueError: shapes differ, an unknown metric, or one that there is not for such data.
  """
  if np.shape(pictures) != np.shape(others):
    raise ValueError(
      f"Pictures are compared one by one; got shapes {np.shape(pictures)} and {np.shape(others)}."
    )
  check_metrics([metric], np.shape(pictures)[1:])
  of_pair = METRICS[metric]
  pairs = zip(np.asarray(pictures, np.float64), np.asarray(others, np.float64), strict=True)
  return np.array([of_pair(*pair) for pair in pairs], np.float64)


def check_metrics(names: Sequence[str], shape: tuple[int, ...], is_pixels: bool = True) -> None:
  """Raises ValueError unless data of that shape can be compared so, and scikit-image is there."""
  for name in names:
    named(METRICS, name, "metric of resemblance")
  if "ssim" not in names:
    return
  if len(shape) != 3 or min(shape[:2]) < 3 or not is_pixels:
    raise ValueError(
      "ssim compares images [H, W, C] of at least 3 × 3 pixels in [-1, 1]; an example has shape "
      f"{shape}{'' if is_pixels else ' and other numbers'}. Take mse."
    )
  _structural_similarity()


def mean_squared_error(picture: np.ndarray, other: np.ndarray) -> float:
  """Mean over all elements of the squared difference."""
  return float(np.square(picture - other).mean())


def structural_similarity(picture: np.ndarray, other: np.ndarray) -> float:
  """Of images [H, W, C] in [-1, 1]: mean over channels, and over windows that lie inside."""
  side = min(_WINDOW, *picture.shape[:2])
  window = side - 1 + side % 2  # odd
  options = dict(win_size=window, data_range=_RANGE, channel_axis=-1)
  return float(_structural_similarity()(picture, other, **options))


def _structural_similarity() -> Callable[..., Any]:
  """scikit-image's; ValueError where it is not installed."""
  try:
    from skimage.metrics import structural_similarity
  except ImportError as error:
    raise ValueError(
      f"ssim needs scikit-image, as of `pip install 'jaxinf[metrics]'`: {error}. Or take mse."
    ) from error
  return structural_similarity


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "ssim": structural_similarity,
  "mse": mean_squared_error,
}
