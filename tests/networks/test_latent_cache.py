"""Moments on disk are those of the autoencoder, each computed once, or an error says why not."""

import json

import jax
import numpy as np
import pytest

from jaxinf import Autoencoder, encode_moments, open_moments
from jaxinf.data import moments_file
from jaxinf.engine.artifacts import StaleArtifact
from jaxinf.networks.autoencoder import AutoencoderKL

NUM = 7


@pytest.fixture(scope="module")
def autoencoder():
  module = AutoencoderKL(1, 1, 2, (2, 4), 1, norm_groups=2, mid_attention=False)
  params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))["params"]
  return Autoencoder(module, params, 0.5, 0.1)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (NUM, 4, 6, 1)).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(moments_file, "BLOCK_ROWS", 3)


@pytest.fixture
def folder(tmp_path, autoencoder, images):
  encode_moments(autoencoder, images, tmp_path / "moments", batch_size=4)
  return tmp_path / "moments"


def test_rows_are_the_posteriors_of_images_and_mirror_images(folder, autoencoder, images):
  found = open_moments(folder, autoencoder, sample=False)
  assert isinstance(found.array, np.memmap) and found.shape == (NUM, 2, 2, 3, 4)
  assert (found.scaling_factor, found.shift_factor, found.sample) == (0.5, 0.1, False)
  for way, pixels in enumerate((images, images[:, :, ::-1])):
    posterior = autoencoder.encode(pixels, batch_size=NUM)
    expected = np.concatenate([posterior.mean, posterior.logvar], axis=-1)
    # Float32 sums of other batches.
    np.testing.assert_allclose(found.array[:, way], expected, rtol=1e-4, atol=1e-5)


def test_encoding_goes_on_where_it_stopped(tmp_path, folder, autoencoder, images, monkeypatch):
  calls = []
  encode = Autoencoder.encode

  def counted(self, block, **how):
    calls.append(len(block))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return encode(self, block, **how)

  monkeypatch.setattr(Autoencoder, "encode", counted)
  again = tmp_path / "again"
  with pytest.raises(KeyboardInterrupt):
    encode_moments(autoencoder, images, again, mirrored=False, batch_size=4)
  with pytest.raises(ValueError, match="holds the moments of 6 of 7 images: encode the rest"):
    open_moments(again, autoencoder)
  found = encode_moments(autoencoder, images, again, mirrored=False, batch_size=4)
  assert calls == [3, 3, 1, 1]
  whole = open_moments(folder, autoencoder)
  np.testing.assert_array_equal(found.array[:, 0], whole.array[:, 0])
  encode_moments(autoencoder, images, again, mirrored=False, batch_size=4)
  assert len(calls) == 4  # all is there


def test_what_is_not_the_same_is_refused(folder, autoencoder, images):
  other = Autoencoder(autoencoder.module, autoencoder.params, 0.25, 0.1)
  with pytest.raises(ValueError, match="were made with another autoencoder"):
    open_moments(folder, other)
  with pytest.raises(StaleArtifact, match="autoencoder"):
    encode_moments(other, images, folder)
  with pytest.raises(StaleArtifact, match="images"):
    encode_moments(autoencoder, images[::-1], folder)
  with pytest.raises(ValueError, match="holds no moments of latents: encode the images first"):
    open_moments(folder.parent / "nowhere", autoencoder)


def test_damage_is_found(folder, autoencoder):
  file = folder / "moments.npy"
  sound = bytearray(file.read_bytes())
  sound[-5] ^= 4
  file.write_bytes(sound)
  with pytest.raises(ValueError, match="moments.npy differs from its checksums from row 6 on"):
    open_moments(folder, autoencoder)
  index = folder / "moments.json"
  index.write_text(json.dumps({"key": {}}))
  with pytest.raises(ValueError, match="cannot be read .* Delete the folder and encode"):
    open_moments(folder, autoencoder)


def test_a_lost_array_is_damage(folder, autoencoder):
  (folder / "moments.npy").unlink()
  with pytest.raises(ValueError, match="moments.npy cannot be read .* encode the images again"):
    open_moments(folder, autoencoder)


def test_moments_that_are_not_finite_name_the_row(tmp_path, autoencoder, images):
  params = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), autoencoder.params)
  with pytest.raises(ValueError, match="not finite"):
    encode_moments(Autoencoder(autoencoder.module, params, 1.0), images, tmp_path / "bad")


def test_processes_encode_together_and_one_writes(
  tmp_path, folder, autoencoder, images, in_processes
):
  encode = lambda: encode_moments(autoencoder, images, tmp_path / "together", batch_size=4)
  found = in_processes(2, encode)
  whole = open_moments(folder, autoencoder)
  for moments in found:
    assert not isinstance(moments, ValueError), moments
    # Float32 sums of other batches.
    np.testing.assert_allclose(moments.array, whole.array, rtol=1e-4, atol=1e-5)
