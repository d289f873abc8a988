"""Images to latents and back equal diffusers', on any devices and in any batches."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinf import Autoencoder, load_autoencoder
from jaxinf.networks.latents import PRESETS

FOLDER = (
  Path(__file__).parent / "fixtures" / "autoencoder-tiny"
)  # made by make_diffusers_fixture.py


@pytest.fixture(scope="module")
def autoencoder():
  return load_autoencoder(FOLDER)


@pytest.fixture(scope="module")
def expected():
  """What diffusers makes of images: see make_diffusers_fixture.py."""
  with np.load(FOLDER / "outputs.npz") as file:
    return dict(file)


def test_outputs_equal_diffusers(autoencoder, expected, devices):
  """Three images in batches of two: the second batch is padded."""
  how = dict(batch_size=2, devices=devices)
  posterior = autoencoder.encode(expected["images"], **how)
  decoded = autoencoder.decode(posterior.mode(), **how)
  # float32 sums in another order; all are of size 1.
  np.testing.assert_allclose(posterior.mean, expected["mean"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(posterior.logvar, expected["logvar"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(decoded, expected["decoded"], rtol=0, atol=1e-5)
  assert {x.dtype for x in (posterior.mean, posterior.logvar, decoded)} == {np.dtype("float32")}


def test_tiles_equal_diffusers_and_one_tile_the_whole(autoencoder, expected):
  one = jax.local_devices()[:1]
  tiled = autoencoder.decode_tiled(expected["wide"], tile=4, batch_size=2, devices=one)
  np.testing.assert_allclose(tiled, expected["tiled"], rtol=0, atol=1e-5)
  how = dict(batch_size=2, devices=one)
  whole = autoencoder.decode_tiled(expected["mean"], tile=5, **how)
  np.testing.assert_array_equal(whole, autoencoder.decode(expected["mean"], **how))


def test_pixels_are_encoded_as_floats_in_minus_one_to_one(autoencoder):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 10, 3)).astype(np.uint8)
  how = dict(batch_size=2, devices=jax.local_devices()[:1])
  ours = autoencoder.encode(pixels, **how)
  floats = autoencoder.encode(pixels.astype(np.float64) / 127.5 - 1, **how)
  # One rounding of float32, through weights of size 1.
  np.testing.assert_allclose(ours.mean, floats.mean, rtol=0, atol=1e-5)


def test_log_variances_are_clipped(autoencoder, expected):
  """σ stays a number of float32 where the convolution says e^±1000."""
  params = autoencoder.params
  for bias, bound in ((-1000.0, -30.0), (1000.0, 20.0)):
    quant_conv = params["quant_conv"] | {"bias": np.full(4, bias, np.float32)}
    moved = dataclasses.replace(autoencoder, params=params | {"quant_conv": quant_conv})
    posterior = moved.encode(expected["images"][:2], batch_size=2, devices=jax.local_devices()[:1])
    np.testing.assert_array_equal(posterior.logvar, np.full((2, 3, 5, 2), bound, np.float32))


def test_scaled_latents_and_their_inverse(autoencoder):
  """Of the fixture: (z − 1/4) / 2, in numbers that floats hold exactly."""
  latents = np.array([0.25, 1.25, -1.0], np.float32)
  np.testing.assert_array_equal(autoencoder.scaled(latents), [0, 0.5, -0.625])
  np.testing.assert_array_equal(autoencoder.unscaled(autoencoder.scaled(latents)), latents)
  assert autoencoder.scaled(latents).dtype == np.float32


def test_the_fingerprint_is_of_fields_factors_and_parameters(autoencoder):
  params = autoencoder.params
  bias = params["quant_conv"]["bias"] + 1e-6
  changes = [
    {"module": autoencoder.module.clone(norm_eps=1e-5)},
    {"scaling_factor": 0.25},
    {"shift_factor": 0.5},
    {"params": params | {"quant_conv": params["quant_conv"] | {"bias": bias}}},
  ]
  others = [dataclasses.replace(autoencoder, **change).fingerprint for change in changes]
  assert len({autoencoder.fingerprint, *others}) == 5
  assert load_autoencoder(FOLDER).fingerprint == autoencoder.fingerprint


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((6, 10, 3)), r"are \[N, H, W, 3\]; got shape \(6, 10, 3\).*image\[None\]"),
    (np.zeros((1, 6, 10, 1)), "got 1 channels"),
    (np.zeros((1, 3, 6, 10)), r"got 10 channels.*transpose\(0, 2, 3, 1\)"),
    (np.zeros((1, 7, 10, 3)), "multiples of 2, pixels for one latent; got 7 × 10"),
    (np.full((1, 6, 10, 3), np.nan), "must be finite; row 0 is not"),
    (np.full((1, 6, 10, 3), 255.0), r"in \[-1, 1\]; the largest magnitude is 255.*as uint8"),
    (np.zeros((1, 6, 10, 3), int), "Cast pixels"),
    (np.zeros((0, 6, 10, 3)), r"got shape \(0, 6, 10, 3\)"),
  ],
)
def test_images_that_cannot_be_encoded_are_refused(autoencoder, images, message):
  with pytest.raises(ValueError, match=message):
    autoencoder.encode(images)


@pytest.mark.parametrize(
  ("latents", "message"),
  [
    (np.zeros((3, 5, 2)), r"are \[N, h, w, 2\].*got shape \(3, 5, 2\)"),
    (np.zeros((1, 3, 5, 4)), r"are \[N, h, w, 2\].*got shape \(1, 3, 5, 4\)"),
    (np.zeros((1, 3, 5, 2), np.uint8), "floating-point numbers; got uint8"),
    (np.full((1, 3, 5, 2), np.inf), "must be finite; row 0 is not"),
  ],
)
def test_latents_that_cannot_be_decoded_are_refused(autoencoder, latents, message):
  with pytest.raises(ValueError, match=message):
    autoencoder.decode(latents)
  with pytest.raises(ValueError, match=message):
    autoencoder.decode_tiled(latents)


def test_factors_and_parameters_that_do_not_fit_are_refused(autoencoder):
  module, params = autoencoder.module, autoencoder.params
  with pytest.raises(ValueError, match="scaling_factor must be a finite number; got None"):
    Autoencoder(module, params, None)
  with pytest.raises(ValueError, match="scaling_factor must not be zero"):
    Autoencoder(module, params, 0.0)
  with pytest.raises(ValueError, match="shift_factor must be a finite number; got nan"):
    Autoencoder(module, params, 1.0, float("nan"))
  with pytest.raises(ValueError, match=r"'quant_conv'\]; got \['params'\]"):
    Autoencoder(module, {"params": params}, 1.0)
  with pytest.raises(ValueError, match=r"hold \['decoder', 'encoder'\]; got .*quant_conv"):
    Autoencoder(PRESETS["sd3"].module, params, 1.0)
