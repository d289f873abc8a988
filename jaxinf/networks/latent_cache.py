"""A cache of latents: the posterior moments of every image, computed once and kept on disk.

A folder holds `moments.npy`, the array of `Moments`, which is memory-mapped on reading, and
`moments.json`: what it was made from, and the checksum of each block of rows that is written. So
encoding goes on where it was stopped, and damage is found on reading.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinf.core.arrays import as_array, fingerprint, read_rows
from jaxinf.core.moments import Moments
from jaxinf.engine import processes
from jaxinf.engine.artifacts import plain, refuse_stale, write_text
from jaxinf.networks.latents import Autoencoder

_LOG = logging.getLogger("jaxinf")
_BLOCK_ROWS = 256  # images between two savings


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
  digests = _begun(folder, key, shape) if processes.is_primary() else []
  first = int(processes.of_primary(np.array(len(digests))))
  for begin in range(first * _BLOCK_ROWS, shape[0], _BLOCK_ROWS):
    rows = np.arange(begin, min(begin + _BLOCK_ROWS, shape[0]))
    block = read_rows(images, rows)
    ways = [block, block[:, :, ::-1]][: 1 + mirrored]
    found = [autoencoder.encode(way, batch_size=batch_size, devices=devices) for way in ways]
    both = [np.concatenate([p.mean, p.logvar], axis=-1) for p in found]
    moments = np.stack(both, axis=1).astype(np.float32)
    if bad := rows[~np.isfinite(moments).all(axis=(1, 2, 3, 4))].tolist():
      raise ValueError(
        f"The moments of {len(bad)} images are not finite, the first of which is in row {bad[0]}: "
        "check the image, and the autoencoder's parameters."
      )
    if processes.is_primary():
      digests.append(_written(folder, moments, begin))
      _save(folder, key, digests)
      _LOG.info("encode: %d of %d images", rows[-1] + 1, shape[0])
  processes.wait_for_all("moments written")
  return open_moments(folder, autoencoder)


def open_moments(folder: str | Path, autoencoder: Autoencoder, *, sample: bool = True) -> Moments:
  """The moments of a folder, memory-mapped, after a look at their checksums.

  Args:
    folder: of `encode_moments`.
    autoencoder: the one that they were made with, whose scaling they take.
    sample: whether each draw samples the posterior; False: its mean is taken.

  Raises:
    ValueError: there are none, or not all; they are damaged, or another autoencoder's.
  """
  folder = Path(folder)
  if not _index(folder).exists():
    raise ValueError(f"{folder} holds no moments of latents: encode the images first.")
  key, digests = _read(folder)
  if key["autoencoder"] != autoencoder.fingerprint:
    raise ValueError(
      f"The moments in {folder} were made with another autoencoder: load that one, or delete the "
      "folder and encode the images again."
    )
  num = key["shape"][0]
  if len(digests) < -(-num // _BLOCK_ROWS):
    raise ValueError(
      f"{folder} holds the moments of {len(digests) * _BLOCK_ROWS} of {num} images: encode the "
      "rest first, by the same call."
    )
  array = np.load(folder / "moments.npy", mmap_mode="r")
  for number, digest in enumerate(digests):
    begin = number * _BLOCK_ROWS
    if _digest(array[begin : begin + _BLOCK_ROWS]) != digest:
      raise ValueError(
        f"{folder / 'moments.npy'} differs from its checksums from row {begin} on. Delete the "
        "folder and encode the images again."
      )
  return Moments(array, autoencoder.scaling_factor, autoencoder.shift_factor, sample)


def content_of_moments(folder: str | Path) -> str:
  """A hash of the moments in a folder, by their checksums."""
  _, digests = _read(Path(folder))
  return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _begun(folder: Path, key: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
  """Checksums of what is there under this key; makes the file where there is nothing."""
  folder.mkdir(parents=True, exist_ok=True)
  if _index(folder).exists():
    found, digests = _read(folder)
    refuse_stale(folder, found, plain(key), "folder")
    return digests
  needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(folder).free
  if needed > free:
    raise ValueError(
      f"The moments of {shape[0]} images take {needed / 2**20:,.0f} MiB, and the disk of {folder} "
      f"has {free / 2**20:,.0f} MiB left. Make space, or use another folder."
    )
  np.lib.format.open_memmap(folder / "moments.npy", mode="w+", dtype=np.float32, shape=shape)
  _save(folder, key, [])
  return []


def _written(folder: Path, moments: np.ndarray, begin: int) -> str:
  """Writes rows from `begin` on; returns their checksum once they are on disk."""
  array = np.load(folder / "moments.npy", mmap_mode="r+")
  array[begin : begin + len(moments)] = moments
  array.flush()
  return _digest(moments)


def _digest(rows: np.ndarray) -> str:
  return hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()


def _save(folder: Path, key: Mapping[str, Any], digests: list[str]) -> None:
  write_text(_index(folder), json.dumps({"key": plain(key), "digests": digests}))


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
  try:
    fields = json.loads(_index(folder).read_text())
    return fields["key"], fields["digests"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{_index(folder)} cannot be read ({error}). Delete the folder and encode the images again."
    ) from error


def _index(folder: Path) -> Path:
  return folder / "moments.json"
