"""The autoencoder of Stable Diffusion by its parameters; posteriors; fields that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import networks
from jaxinf.core.random import fold_in_each
from jaxinf.networks.autoencoder import AutoencoderKL, Posterior


def test_stable_diffusion_has_the_parameters_of_diffusers():
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  params = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), images)["params"]
  assert {name: networks.num_params(part) for name, part in params.items()} == {
    "encoder": 34_163_592,
    "quant_conv": 72,
    "post_quant_conv": 20,
    "decoder": 49_490_179,
  }


def test_samples_of_a_posterior_are_normal():
  """(z − μ) / σ has mean 0 and variance 1, whatever μ and σ are."""
  rng = np.random.default_rng(0)
  mean, logvar = rng.normal(size=(2, 4, 8, 8, 2)).astype(np.float32)
  posterior = Posterior(mean, logvar)
  np.testing.assert_array_equal(posterior.mode(), mean)
  noise = (posterior.sample(jax.random.key(1)) - mean) / np.exp(logvar / 2)
  # Five standard errors of 512 numbers; those of a variance are √2 as large.
  np.testing.assert_allclose(np.mean(noise), 0, atol=5 / 512**0.5)
  np.testing.assert_allclose(np.var(noise), 1, atol=5 * (2 / 512) ** 0.5)


def test_a_posterior_is_sampled_example_by_example():
  """The latents of an image follow from its key alone, wherever it stands."""
  rng = np.random.default_rng(0)
  posterior = Posterior(*rng.normal(size=(2, 3, 2, 2, 1)).astype(np.float32))
  last = jax.tree.map(lambda x: x[2:], posterior)
  key = jax.random.key(0)
  together = posterior.sample(key)
  np.testing.assert_array_equal(last.sample(fold_in_each(key, jnp.array([2]))), together[2:])
  with pytest.raises(ValueError, match=r"one key or 3 keys, of jax.random.key.*shape \(2,\)"):
    posterior.sample(jax.random.PRNGKey(0))
  with pytest.raises(ValueError, match=r"shape \(2,\)"):
    posterior.sample(jax.random.split(key, 2))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"channels": ()}, "one positive width a level"),
    ({"latent_channels": 0}, "latent_channels=0 must be at least 1"),
    ({"channels": (32, 40)}, r"norm_groups=32 must divide every width in channels, not \[40\]"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    AutoencoderKL(**fields)
