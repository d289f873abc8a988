"""The moments of all images, computed once by an autoencoder and kept on disk."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.core.arrays import as_array, fingerprint, read_rows
from jaxinf.core.moments import Moments
from jaxinf.data import moments_file
from jaxinf.data.moments_file import MomentsFile
from jaxinf.engine import processes
from jaxinf.networks.latents import Autoencoder

_LOG = logging.getLogger("jaxinf")


def encode_moments(
  autoencoder: Autoencoder,
  images: Any,
  folder: str | Path,
  *,
  mirrored: bool = True,
  batch_size: int = 8,
  devices: Sequence[jax.Device] | None = None,
) -> Moments:
  """The moments of all images, kept in a folder: those that are there are not computed again.

  Several processes compute together, and the first one writes.

  Args:
    autoencoder: the frozen one.
    images: [N, H, W, C] as for `Autoencoder.encode`; read a few at a time.
    folder: of the cache.
    mirrored: whether the mirror image of each gets moments too, as random_flip needs.
    batch_size: images at a time over all devices.
    devices: local devices; all of them where None.

  Raises:
    StaleArtifact: the folder holds moments of other images or of another autoencoder.
    ValueError: images that the autoencoder does not take, moments that are not finite, or a disk
      that is too small.
  """
  folder, images = Path(folder), as_array(images)
  module = autoencoder.module
  size = [n // module.factor for n in images.shape[1:3]]
  shape = (images.shape[0], 1 + mirrored, *size, 2 * module.latent_channels)
  key = {
    "autoencoder": autoencoder.fingerprint,
    "images": fingerprint({"images": images}),
    "shape": list(shape),
  }
  file = MomentsFile.begun(folder, key) if processes.is_primary() else None
  first = int(processes.of_primary(np.array(file.rows_done if file else 0)))
  for begin in range(first, shape[0], moments_file.BLOCK_ROWS):
    rows = np.arange(begin, min(begin + moments_file.BLOCK_ROWS, shape[0]))
    block = read_rows(images, rows)
    found = moments_of(
      autoencoder, block, mirrored=mirrored, batch_size=batch_size, devices=devices
    )
    moments = np.asarray(found.array, np.float32)
    if bad := rows[~np.isfinite(moments).all(axis=(1, 2, 3, 4))].tolist():
      raise ValueError(
        f"The moments of {len(bad)} images are not finite, the first of which is in row {bad[0]}: "
        "check the image, and the autoencoder's parameters."
      )
    if file is not None:
      file.append(moments)
      _LOG.info("encode: %d of %d images", rows[-1] + 1, shape[0])
  processes.wait_for_all("moments written")
  return open_moments(folder, autoencoder)


def moments_of(
  autoencoder: Autoencoder,
  images: np.ndarray,
  *,
  mirrored: bool,
  batch_size: int,
  devices: Sequence[jax.Device] | None = None,
  sample: bool = True,
) -> Moments:
  """The moments of images in memory, kept nowhere; arguments as of `encode_moments`."""
  ways = [images, images[:, :, ::-1]][: 1 + mirrored]
  found = [autoencoder.encode(way, batch_size=batch_size, devices=devices) for way in ways]
  own, *others = [(posterior.mean, posterior.logvar) for posterior in found]
  return Moments.of(
    *own,
    mirrored=others[0] if others else None,
    scaling_factor=autoencoder.scaling_factor,
    shift_factor=autoencoder.shift_factor,
    sample=sample,
  )


def open_moments(folder: str | Path, autoencoder: Autoencoder, *, sample: bool = True) -> Moments:
  """The moments of a folder, memory-mapped, after a look at their checksums.

  Args:
    folder: of `encode_moments`.
    autoencoder: the one that they were made with, whose scaling they take.
    sample: whether each draw samples the posterior; False: its mean is taken.

  Raises:
    ValueError: there are none, or not all; they are damaged, or another autoencoder's.
  """
  file = MomentsFile.read(Path(folder))
  if file.key["autoencoder"] != autoencoder.fingerprint:
    raise ValueError(
      f"The moments in {folder} were made with another autoencoder: load that one, or delete the "
      "folder and encode the images again."
    )
  return Moments(file.array(), autoencoder.scaling_factor, autoencoder.shift_factor, sample)
