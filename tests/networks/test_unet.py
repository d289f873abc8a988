"""The U-Net equals diffusers', keeps its graph flat, and drops out by example, not by place."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import networks
from jaxinf.networks import diffusers, modules

FIXTURES = Path(__file__).parent / "fixtures"  # made by make_diffusers_fixture.py
VARIANTS = ("unet-tiny-scale-shift", "unet-tiny-additive")

# Compiling is nearly all that these tests do.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DDPM_CIFAR = {
  "channels": [128, 256, 256, 256],
  "blocks_per_level": 2,
  "attention_levels": [False, True, False, False],
  "norm_groups": 32,
  "norm_eps": 1e-6,
  "scale_shift": True,
  "sin_first": True,
  "freq_shift": 1,
  "dropout": 0.1,
  "downsample_padding": 0,
}


@pytest.fixture(scope="module")
def tiny():
  """A fixture's net, with dropout 0.5: (model, params, x_t [4, 8, 8, 3], t [4])."""
  folder = FIXTURES / VARIANTS[0]
  model = diffusers.from_config(json.loads((folder / "config.json").read_text()))
  x_t = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  t = jnp.array([0, 10, 500, 999], jnp.int32)
  return model.clone(dropout=0.5), diffusers.load(folder)[1], x_t, t


def test_ddpm_cifar_has_the_parameters_of_diffusers():
  model = networks.build("unet", DDPM_CIFAR, out_channels=3)
  x_t, t = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"]
  # sum(p.numel() for p in UNet2DModel(...).parameters()), diffusers 0.42.1.
  assert networks.num_params(shapes) == 38_306_691


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_diffusers(variant):
  apply_fn, params = diffusers.load(FIXTURES / variant)
  with np.load(FIXTURES / variant / "outputs.npz") as expected:
    eps = quick_jit(apply_fn)(params, expected["x_t"], expected["t"])
    # float32 sums in another order; the outputs are of size 1.
    np.testing.assert_allclose(eps, expected["eps"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_is_flat(variant):
  """No nested computation: what is inside one is invisible to the fit of the curvature."""
  apply_fn, params = diffusers.load(FIXTURES / variant)
  channels = params["conv_in"]["kernel"].shape[2]
  graph = jax.make_jaxpr(apply_fn)(params, jnp.zeros((2, 8, 8, channels)), jnp.zeros(2, jnp.int32))
  for eqn in graph.eqns:
    assert not any(hasattr(value, "jaxpr") for value in eqn.params.values()), eqn.primitive


@pytest.mark.parametrize("sin_first", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("size", [8, 9])
def test_timestep_embedding_equals_its_formula(sin_first, freq_shift, size):
  t = np.array([0, 1, 37, 999])
  actual = modules.timestep_embedding(
    jnp.asarray(t, jnp.int32), size, sin_first=sin_first, freq_shift=freq_shift
  )
  phase = t[:, None] * 10000.0 ** (-np.arange(4) / (4 - freq_shift))
  parts = [np.sin(phase), np.cos(phase)] if sin_first else [np.cos(phase), np.sin(phase)]
  expected = np.concatenate([*parts, np.zeros((4, size - 8))], axis=1)
  # A float32 frequency is off by up to 6e-8 of itself per unit of its exponent, times t = 999.
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_dropout_keeps_the_mean():
  rate, shape = 0.3, (8, 16, 16, 4)
  ids = jnp.arange(shape[0], dtype=jnp.uint32)
  dropout = modules.Dropout(rate)
  y = dropout.apply({}, jnp.ones(shape), ids, rngs={"dropout": jax.random.key(0)})
  kept = np.asarray(y) > 0
  np.testing.assert_allclose(y, kept / (1 - rate), rtol=1e-6)  # one float32 division
  # 5 standard errors of a mean of Bernoulli(1 − rate) variables.
  tolerance = 5 * np.sqrt(rate * (1 - rate) / kept.size)
  assert abs(kept.mean() - (1 - rate)) < tolerance


def test_dropout_mask_follows_the_id():
  """Bit for bit the same under another batch order, a smaller batch, a repeated id."""
  x = jnp.ones((5, 4, 4, 2))
  ids = jnp.array([7, 2, 4_000_000_000, 2, 5], jnp.uint32)

  @quick_jit
  def drop(ids):
    rngs = {"dropout": jax.random.key(3)}
    return modules.Dropout(0.5).apply({}, x[: len(ids)], ids, rngs=rngs)

  masks = drop(ids)
  order = np.array([3, 4, 0, 2, 1])
  np.testing.assert_array_equal(drop(ids[order]), masks[order])
  np.testing.assert_array_equal(drop(ids[2:4]), masks[2:4])
  np.testing.assert_array_equal(masks[1], masks[3])
  assert (masks[0] != masks[1]).any()


def test_unet_dropout_follows_the_id(tiny):
  model, params, x_t, t = tiny

  @quick_jit
  def apply(x_t, t, ids):
    rngs = {"dropout": jax.random.key(0)}
    return model.apply({"params": params}, x_t, t, dropout_ids=ids, rngs=rngs)

  ids = jnp.array([11, 5, 8, 2], jnp.uint32)
  order = jnp.array([2, 0, 3, 1])
  eps = apply(x_t, t, ids)
  # The masks are equal; only float32 sums may be ordered otherwise.
  np.testing.assert_allclose(apply(x_t[order], t[order], ids[order]), eps[order], atol=1e-5)
  assert np.abs(apply(x_t, t, ids + 100) - eps).max() > 1e-2


def test_dropout_is_off_without_ids(tiny):
  """The computation is that of a net whose dropout rate is 0, with ids or without."""
  model, params, x_t, t = tiny

  def graph(model, **ids):
    return str(jax.make_jaxpr(lambda *args: model.apply(*args, **ids))({"params": params}, x_t, t))

  without = model.clone(dropout=0.0)
  assert graph(model) == graph(without)
  assert graph(model) == graph(without, dropout_ids=jnp.arange(4, dtype=jnp.uint32))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"channels": ()}, "one positive width a level"),
    ({"attention_levels": (True,)}, "attention_levels.*has 2"),
    ({"norm_groups": 3}, r"norm_groups=3 must divide .* not \[4, 8\]"),
    ({"norm_groups": 0}, "norm_groups=0 must be at least 1"),
    ({"head_dim": 3}, r"head_dim=3 must divide .* \[8, 8\]"),
    ({"freq_shift": 2}, "freq_shift=2 must be below"),
    ({"dropout": 1.0}, "dropout=1.0 must be in"),
    ({"downsample_padding": 2}, "downsample_padding=2 must be 1"),
  ],
)
def test_fields_that_do_not_fit_are_refused(tiny, fields, message):
  with pytest.raises(ValueError, match=message):
    tiny[0].clone(**fields)


def test_images_that_do_not_fit_are_refused(tiny):
  model, params, x_t, t = tiny
  with pytest.raises(ValueError, match=r"divisible by 2 \(2 levels\)"):
    model.apply({"params": params}, x_t[:, :7], t)
  with pytest.raises(ValueError, match="one timestep an image"):
    model.apply({"params": params}, x_t, t[:2])
