"""Models by name: every one maps images to noise of the same shape; wrong fields are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import networks

FIELDS = {
  "unet": {
    "channels": [4, 8],
    "blocks_per_level": 1,
    "attention_levels": [False, True],
    "norm_groups": 2,
    "norm_eps": 1e-6,
    "scale_shift": False,
    "sin_first": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "downsample_padding": 1,
  },
  "mlp": {"hidden": [6, 5], "time_features": 4},
}


@pytest.mark.parametrize("name", networks.MODELS)
def test_every_example_is_mapped_on_its_own(name):
  model = networks.build(name, FIELDS[name], out_channels=2)
  x_t = jax.random.normal(jax.random.key(1), (3, 8, 4, 2))
  t = jnp.array([0, 400, 999], jnp.int32)
  # Any parameters do; the net's own initialisation would have to be compiled first.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
    jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"],
  )
  # Compiling is nearly all that this test does.
  apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
  eps = apply({"params": params}, x_t, t)
  assert eps.shape == x_t.shape
  assert eps.dtype == jnp.float32
  others = jnp.array([True, False, True])
  changed = jnp.where(others[:, None, None, None], -x_t, x_t)
  eps_changed = apply({"params": params}, changed, jnp.where(others, t + 1, t))
  np.testing.assert_array_equal(eps_changed[1], eps[1])
  assert (eps_changed[0] != eps[0]).any()


def test_mlp_without_hidden_layers_is_affine_in_pixels_and_time_features():
  model = networks.build("mlp", {"hidden": [], "time_features": 2}, out_channels=1)
  x_t, t = jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.array([7], jnp.int32)
  params = model.init(jax.random.key(0), x_t, t)["params"]
  inputs = np.concatenate([np.arange(4.0), [np.sin(7), np.cos(7)]])
  expected = inputs @ np.asarray(params["out"]["kernel"], np.float64) + params["out"]["bias"]
  eps = model.apply({"params": params}, x_t, t)
  np.testing.assert_allclose(eps.reshape(-1), expected, atol=1e-5)  # float32
  assert networks.num_params(params) == (4 + 2 + 1) * 4


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("unett", {}, "unknown model 'unett'; the models are mlp, unet"),
    ("mlp", {"hidden": [4]}, r"lacks the fields \['time_features'\]"),
    ("mlp", FIELDS["mlp"] | {"width": 4}, r"no fields \['width'\]; it has \['hidden', 'time_"),
    ("unet", FIELDS["unet"] | {"out_channels": 3}, "leave out out_channels"),
    ("unet", FIELDS["unet"] | {"parent": None}, r"no fields \['parent'\]"),
    ("mlp", {"hidden": [0], "time_features": 4}, r"hidden=\(0,\) must hold positive widths"),
    ("mlp", {"hidden": [4], "time_features": 1}, "time_features=1 must be at least 2"),
  ],
)
def test_wrong_names_and_fields_are_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    networks.build(name, fields, out_channels=3)
