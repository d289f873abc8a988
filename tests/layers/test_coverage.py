"""The coverage contract: a block, a declared skip or diagonal, or a stop that says why."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import pytest

from jaxinf import SKIP_NORMALISATION, DiffusionModel
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, register
from tests import nets, twins

SHAPE = (4, 4, 1)


class Plain(nn.Module):
  """A dense layer under the given transformation, its activation, and a convolution."""

  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x):
    return nn.Conv(1, (3, 3), name="conv")(nn.silu(self.dense(2, name="dense")(x)))


class Declared(nn.Module):
  """A dense layer that is no matrix product in the trace, declared by hand."""

  reshaped: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (2, 2))
    bias = self.param("bias", nn.initializers.normal(), (4,) if self.reshaped else (2,))
    x = jnp.concatenate([x, x**2], axis=-1)
    y = jnp.sum(x[..., :, None] * kernel, axis=-2) + bias[:2]
    y = kfac_jax.register_dense(y, x, kernel.T if self.reshaped else kernel, bias)
    return jnp.tanh(y).sum(-1, keepdims=True)


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(1)
    return layer(layer(x))


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    body = lambda layer, h, _: (layer(h), None)
    lifted = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return lifted(nn.Dense(1), x, None)[0]


class Vmapped(nn.Module):
  """Two dense layers side by side, each with an input of its own."""

  @nn.compact
  def __call__(self, x):
    lifted = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
    return lifted(1, name="pair")(jnp.stack([x, x**2])).sum(0)


class Reshaped(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (2, 3))
    return (x @ kernel.reshape(1, 6)).sum(-1, keepdims=True)


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(), (1, 3))
    return (x @ (kernel / jnp.sum(kernel**2))).sum(-1, keepdims=True)


class Flattened(nn.Module):
  """Projections of tokens [B · L, C]."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(x.reshape(-1, 1)).reshape(x.shape)


class Positions(nn.Module):
  """An embedding of positions, the same for every image: no batch axis."""

  @nn.compact
  def __call__(self, x):
    positions = nn.Dense(1)(jnp.linspace(0, 1, 16)[:, None])
    return nn.Conv(1, (1, 1))(x) + positions.reshape(4, 4, 1)


class Normalised(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Conv(1, (3, 3))(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))


class Scaled(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(x) * self.param("temperature", nn.initializers.ones, (1,))


class Unused(nn.Module):
  @nn.compact
  def __call__(self, x):
    self.param("spare", nn.initializers.ones, (3,))
    return nn.Dense(1)(x)


def initial(module: nn.Module) -> dict:
  params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def network(module: nn.Module):
  return lambda params, x_t, t: module.apply({"params": params}, x_t)


def registered(module: nn.Module, wrap=lambda f: f, **selection) -> Registration:
  selection = {"skip": SKIP_NORMALISATION} | selection
  model = DiffusionModel(wrap(network(module)), initial(module), nets.PROCESS)
  return register(model, SHAPE, Selection(**selection))


def blocks(layers: Registration) -> dict[str, str | None]:
  return {row.parameter: row.block for row in layers.coverage.rows}


def gradients(layers: Registration, params, pairs) -> dict:
  """Of half the squared norm of the outputs."""
  return jax.jit(lambda p, q: layers.gradients(p, q, lambda out: out, rows=3))(params, pairs)


def plain_gradients(module: nn.Module, layers: Registration, pairs) -> dict:
  params = initial(module)
  dy = np.asarray(network(module)(params, pairs.inputs, pairs.time))[None]
  found = twins.cotangent_gradients(network(module), params, layers.layers, pairs, dy)
  return {name: matrices[0] for name, matrices in found.items()}


def test_every_parameter_is_accounted_for():
  model = nets.conv_model()
  layers = register(model, SHAPE, Selection())
  assert (
    layers.coverage.num_covered
    == layers.coverage.num_parameters
    == sum(leaf.size for leaf in jax.tree.leaves(model.params))
  )
  assert blocks(layers)["conv_in/kernel"] == "conv2d (kronecker)"
  assert blocks(layers)["mix/bias"] == "dense (kronecker)"


def custom_gradient(f):
  """f with a derivative declared by hand, as some activations have."""
  wrapped = jax.custom_vjp(f)
  wrapped.defvjp(lambda *args: jax.vjp(f, *args), lambda pull_back, dy: pull_back(dy))
  return wrapped


@pytest.mark.parametrize(
  ("module", "wrap"),
  [
    (Plain(), jax.jit),
    (Plain(), jax.checkpoint),
    (Plain(), lambda f: jax.jit(jax.checkpoint(jax.jit(f)))),
    (Plain(), custom_gradient),
    (Plain(nn.remat(nn.Dense)), lambda f: f),
    (Plain(nn.jit(nn.Dense)), lambda f: f),
  ],
  ids=["jit", "checkpoint", "nested", "custom_vjp", "nn.remat", "nn.jit"],
)
def test_how_a_layer_is_called_changes_nothing(module, wrap):
  """The same layers and, with the same operations in the same order, the same gradients."""
  layers, plain = registered(module, wrap), registered(Plain())
  assert layers.layers == plain.layers and len(plain.layers) == 2
  pairs, params = nets.some_pairs(3), initial(Plain())
  found, expected = (gradients(each, params, pairs) for each in (layers, plain))
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_inside_is_summed_up_in_float32():
  """Gradients of a network that computes in bfloat16, to some rounding steps of 2⁻⁸ each."""
  module = Plain(lambda features, name: nn.Dense(features, name=name, dtype=jnp.bfloat16))
  layers, params, pairs = registered(module), initial(module), nets.some_pairs(3)
  found, expected = gradients(layers, params, pairs), plain_gradients(Plain(), layers, pairs)
  assert layers.layers == registered(Plain()).layers
  assert all(matrix.dtype == jnp.float32 for matrix in found.values())
  twins.assert_close(found, expected, 5 * 2**-8)


def test_a_layer_declared_by_hand_is_covered():
  layers, params, pairs = registered(Declared()), initial(Declared()), nets.some_pairs(3)
  assert blocks(layers) == dict.fromkeys(("bias", "kernel"), "dense (kronecker)")
  expected = plain_gradients(Declared(), layers, pairs)
  twins.assert_close(gradients(layers, params, pairs), expected)


@pytest.mark.parametrize(
  ("module", "parameter", "reason"),
  [
    (Shared(), "Dense_0/kernel", "used 2 times: shared parameters have no block"),
    (Scanned(), "Dense_0/kernel", "a parameter that enters `scan`"),
    (Vmapped(), "pair/kernel", "a batch of matrices (nn.vmap)"),
    (Reshaped(), "kernel", "no block for a parameter that enters `reshape`"),
    (Normed(), "kernel", "used 2 times"),
    (Flattened(), "Dense_0/kernel", "keep the batch on an axis of its own, [B, 16, …]"),
    (Positions(), "Dense_0/kernel", "no axis that is the batch"),
    (Scaled(), "temperature", "a scale has no Kronecker factors"),
    (Unused(), "spare", "the network does not use it"),
    (Declared(reshaped=True), "kernel", "declared by hand, but not as register_dense"),
    (nn.ConvTranspose(1, (3, 3), transpose_kernel=True), "kernel", "that enters `rev`"),
  ],
  ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_has_no_block_stops_with_the_table_and_the_reason(module, parameter, reason):
  with pytest.raises(ValueError) as caught:
    registered(module)
  (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"  {parameter} "))
  assert "NOT COVERED" in line and reason in line, line
  assert "skip=(" in str(caught.value) and "register_dense" in str(caught.value)


def test_what_has_no_block_can_be_skipped_by_name():
  assert registered(Scaled(), skip=("temperature",)).coverage.skipped == ("temperature",)


def test_normalisation_is_skipped_and_named():
  coverage = registered(Normalised()).coverage
  assert coverage.skipped == ("GroupNorm_0/bias", "GroupNorm_0/scale")


def test_normalisation_that_is_not_declared_stops_the_fit():
  with pytest.raises(ValueError, match="name it in `diagonal` or in `skip`"):
    registered(Normalised(), skip=())


def test_diagonal_layers_are_declared_by_name():
  layers = registered(Normalised(), skip=(), diagonal=("GroupNorm", "Conv_1"))
  assert blocks(layers) == {
    "Conv_0/bias": "conv2d (kronecker)",
    "Conv_0/kernel": "conv2d (kronecker)",
    "Conv_1/bias": "conv2d (diagonal)",
    "Conv_1/kernel": "conv2d (diagonal)",
    "GroupNorm_0/bias": "shift (diagonal)",
    "GroupNorm_0/scale": "scale (diagonal)",
  }


def test_only_keeps_what_it_names():
  """The rest is skipped, whether or not it has a block."""
  assert registered(Scaled(), only=("Dense",)).coverage.skipped == ("temperature",)
  layers = registered(Normalised(), skip=("Conv_1",), only=("Conv",))
  assert [layer.name for layer in layers.layers] == ["Conv_0"]


@pytest.mark.parametrize("half", [{"skip": ("Conv_0/bias",)}, {"only": ("Conv_0/kernel",)}])
def test_a_layer_is_skipped_whole_or_not_at_all(half):
  with pytest.raises(ValueError, match="skipped in part"):
    registered(Normalised(), **({"skip": SKIP_NORMALISATION} | half))


def test_normalisation_is_told_by_its_own_name_not_by_a_parent():
  """`norm` in the name of a block says nothing about the dense layers inside."""
  names = [
    ("PreNorm_0/to_q/kernel", False),
    ("PreNorm_0/LayerNorm_0/scale", True),
    ("norm1/bias", True),
  ]
  for name, skipped in names:
    assert any(re.search(pattern, name) for pattern in SKIP_NORMALISATION) == skipped


@pytest.mark.parametrize("nothing", [{"skip": (".",)}, {"only": ()}])
def test_skipping_everything_is_refused(nothing):
  with pytest.raises(ValueError, match="leaves out everything"):
    registered(Normalised(), **nothing)


@pytest.mark.parametrize("argument", ["skip", "diagonal", "only"])
def test_malformed_expressions_are_named(argument):
  with pytest.raises(ValueError, match=rf"{argument}: '\(' is not a regular expression"):
    Selection(**{argument: ("(",)})
  with pytest.raises(ValueError, match=rf"write {argument}=\('norm',\)"):
    Selection(**{argument: "norm"})


@pytest.mark.parametrize("argument", ["skip", "diagonal", "only"])
def test_expressions_that_find_nothing_are_refused(argument):
  """A misspelt layer would be covered, or left out, without a word."""
  with pytest.raises(ValueError, match=rf"{argument}: 'Cnov_1' finds no parameter.*'Conv_1/bias'"):
    registered(Normalised(), **{argument: ("Conv", "Cnov_1")})


@pytest.mark.parametrize("argument", ["skip", "diagonal"])
def test_normalisation_need_not_be_there(argument):
  layers = registered(Plain(), **{argument: (*SKIP_NORMALISATION, "conv")})
  assert len(layers.layers) == (1 if argument == "skip" else 2)


def test_a_diagonal_expression_without_effect_is_refused():
  """What `skip` leaves out cannot be made diagonal: a silent no would be a surprise."""
  with pytest.raises(ValueError, match="finds is skipped, such as GroupNorm_0"):
    registered(Normalised(), skip=SKIP_NORMALISATION, diagonal=SKIP_NORMALISATION)
