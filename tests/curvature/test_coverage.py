"""The coverage contract: a Kronecker block, a declared skip, or a stop that says why."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxinf.curvature.fit import SKIP_NORMALISATION
from jaxinf.curvature.registration import register
from tests import nets

SHAPE = (4, 4, 1)


class Grouped(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Conv(4, (3, 3), feature_group_count=2)(nn.Conv(2, (1, 1))(x))[..., :1]


class Transposed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(1, (2, 2), strides=(2, 2))(x)[:, ::2, ::2]


class General(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral((2, 3))(x).sum((-2, -1))[..., None]


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


class SequenceFirst(nn.Module):
  """Projections of tokens [L, B, C]: the batch is the second axis."""

  @nn.compact
  def __call__(self, x):
    tokens = jnp.swapaxes(x.reshape(x.shape[0], -1, 1), 0, 1)
    return jnp.swapaxes(nn.Dense(1)(tokens), 0, 1).reshape(x.shape)


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


def registered(module: nn.Module, skip=SKIP_NORMALISATION, wrap=lambda f: f):
  params = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
  apply_fn = wrap(lambda params, x_t, t: module.apply({"params": params}, x_t))
  return register(apply_fn, params, SHAPE, skip)


def test_every_parameter_is_accounted_for():
  task = nets.conv_task()
  coverage = register(task.apply_fn, task.params, SHAPE, skip=()).coverage
  assert (
    coverage.num_covered
    == coverage.num_parameters
    == sum(leaf.size for leaf in jax.tree.leaves(task.params))
  )
  blocks = {row.parameter: row.block for row in coverage.rows}
  assert blocks["conv_in/kernel"] == "conv2d (K-FAC expand)"
  assert blocks["mix/bias"] == "dense (K-FAC expand)"


def test_normalisation_is_skipped_and_named():
  coverage = registered(Normalised()).coverage
  assert coverage.skipped == ("GroupNorm_0/bias", "GroupNorm_0/scale")


@pytest.mark.parametrize(
  ("module", "parameter", "reason"),
  [
    (Grouped(), "Conv_0/kernel", "kfac-jax found no dense or convolution layer"),
    (Transposed(), "ConvTranspose_0/kernel", "transposed convolutions have no block yet"),
    (General(), "DenseGeneral_0/kernel", "DenseGeneral"),
    (Shared(), "Dense_0/kernel", "kfac-jax found no dense or convolution layer"),
    (Scaled(), "temperature", ""),
    (SequenceFirst(), "Dense_0/kernel", "do not have the batch on their first axis"),
    (Flattened(), "Dense_0/kernel", "do not have the batch on their first axis"),
    (Positions(), "Dense_0/kernel", "do not have the batch on their first axis"),
  ],
)
def test_what_has_no_block_stops_with_the_table_and_the_reason(module, parameter, reason):
  with pytest.raises(ValueError) as caught:
    registered(module)
  (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"  {parameter} "))
  assert "NOT COVERED" in line and reason in line
  assert "skip=(" in str(caught.value)


def test_what_has_no_block_can_be_skipped_by_name():
  assert registered(Scaled(), skip=("temperature",)).coverage.skipped == ("temperature",)


def test_normalisation_that_is_not_declared_stops_the_fit():
  with pytest.raises(ValueError, match="GroupNorm_0/scale"):
    registered(Normalised(), skip=())


def test_a_function_under_jit_is_refused_with_advice():
  with pytest.raises(ValueError, match="not under jit"):
    registered(Normalised(), wrap=jax.jit)


def test_nn_scan_is_refused_with_advice():
  with pytest.raises(ValueError, match=r"nn\.scan"):
    registered(Scanned())


def test_a_layer_is_skipped_whole_or_not_at_all():
  with pytest.raises(ValueError, match="skipped in part"):
    registered(Normalised(), skip=(*SKIP_NORMALISATION, "Conv_0/bias"))


def test_normalisation_is_told_by_its_own_name_not_by_a_parent():
  """`norm` in the name of a block says nothing about the dense layers inside."""
  assert registered(Normalised()).coverage.num_covered > 0
  names = [
    ("PreNorm_0/to_q/kernel", False),
    ("PreNorm_0/LayerNorm_0/scale", True),
    ("norm1/bias", True),
  ]
  for name, skipped in names:
    assert any(re.search(pattern, name) for pattern in SKIP_NORMALISATION) == skipped


def test_skipping_everything_is_refused():
  with pytest.raises(ValueError, match="leaves out everything"):
    registered(Normalised(), skip=(".",))


def test_a_malformed_expression_is_named():
  with pytest.raises(ValueError, match="is not a regular expression"):
    registered(Normalised(), skip=("(",))
