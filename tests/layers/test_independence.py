"""Networks whose output for one example depends on the others of its batch are refused, no others.

Each network is one row: what it does to hidden values h [B, 4, 4, C] between two layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import DiffusionModel
from jaxinf.layers.coverage import SKIP_NORMALISATION, Selection
from jaxinf.layers.register import layers_of
from tests import nets
from tests.processes import PROCESSES

SHAPE = (4, 4, 1)


class Between(nn.Module):
  """Two convolutions, `inner` between them, and the time in the first."""

  inner: nn.Module | None = None
  dtype: object = None

  @nn.compact
  def __call__(self, x, t, *labels):
    layer = lambda features: nn.Conv(features, (3, 3), dtype=self.dtype)
    h = layer(4)(x) + jnp.cos(t / 100)[:, None, None, None]
    for label in labels:
      h = h + nn.Embed(3, 4)(label)[:, None, None]
    h = nn.silu(h)
    return layer(1)(h if self.inner is None else self.inner(h)).astype(jnp.float32)


class Function(nn.Module):
  """A function without parameters."""

  function: object

  def __call__(self, h):
    return self.function(h)


class BatchNorm(nn.Module):
  """Batch normalisation by statistics of the batch, or by running averages."""

  running: bool

  @nn.compact
  def __call__(self, h):
    return nn.BatchNorm(use_running_average=self.running, name="norm")(h)


class Attention(nn.Module):
  """Attention over positions, or with the axes swapped, over the batch."""

  over_batch: bool = False

  @nn.compact
  def __call__(self, h):
    tokens = h.reshape(len(h), -1, h.shape[-1])
    turned = tokens.swapaxes(0, 1) if self.over_batch else tokens
    turned = nn.MultiHeadDotProductAttention(2)(turned, turned)
    return h + (turned.swapaxes(0, 1) if self.over_batch else turned).reshape(h.shape)


def dropout(h):
  """With a fixed key: a mask of its own for every place in the batch."""
  return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0)


DEPENDENT = {
  "batch norm in training": (BatchNorm(running=False), "running averages"),
  "minus the mean": (Function(lambda h: h - h.mean(0)), "go over the batch axis"),
  "a tenth of the mean": (Function(lambda h: h + 0.1 * h.mean(0)), "go over the batch axis"),
  "attention over the batch": (Attention(over_batch=True), "no attention go over the batch"),
  "its neighbour": (Function(lambda h: h + h[::-1]), "go over the batch axis"),
  "dropout with a fixed key": (Function(dropout), "Turn dropout and other noise off"),
  "positions along the batch": (
    Function(lambda h: h + jnp.arange(len(h))[:, None, None, None]),
    "add nothing along the batch axis",
  ),
}
INDEPENDENT = {
  "plain": Between(),
  "batch norm with running averages": Between(BatchNorm(running=True)),
  "group norm": Between(nn.GroupNorm(2)),
  "layer norm": Between(nn.LayerNorm()),
  "attention over positions": Between(Attention()),
  "bfloat16": Between(Attention(), jnp.bfloat16),
  "float16": Between(nn.GroupNorm(2), jnp.float16),
  "badly scaled": Between(Function(lambda h: 1e4 * (h - 1e3) + 1e7)),
}


def model_of(module: nn.Module, *labels, dtype=jnp.float32) -> DiffusionModel:
  """With random parameters; running averages are constants."""
  images, t = jnp.zeros((2, *SHAPE)), jnp.zeros(2, jnp.int32)
  variables = module.init(jax.random.key(0), images, t, *labels)
  rest = {name: tree for name, tree in variables.items() if name != "params"}

  def apply_fn(params, inputs, time, *given):
    return module.apply({"params": params, **rest}, inputs, time, *given, mutable=list(rest))[0]

  params = jax.tree.map(lambda x: x.astype(dtype), variables["params"])
  return DiffusionModel(apply_fn, params, nets.PROCESS)


ANY = Selection(skip=SKIP_NORMALISATION, only=("Conv",))


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_depends_on_the_batch_is_refused_with_the_cause(name):
  inner, cause = DEPENDENT[name]
  with pytest.raises(ValueError, match=cause):
    layers_of(model_of(Between(inner)), nets.examples(3), ANY)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_does_not_is_taken(name, dtype):
  model = model_of(INDEPENDENT[name], dtype=dtype)
  assert len(layers_of(model, nets.examples(3), ANY).layers) == 2


def test_labels_of_the_batch_count_too():
  """A condition that is averaged over the batch, as a wrong broadcast does."""
  model = model_of(Between(), jnp.zeros(2, jnp.int32))
  mixed = lambda params, x, t, y: model.apply_fn(params, x, t, jnp.full_like(y, y.max()))
  examples = nets.examples(3, conditioning=np.array([0, 1, 2]))
  assert layers_of(model, examples, ANY)
  with pytest.raises(ValueError, match="with the other example of its batch"):
    layers_of(DiffusionModel(mixed, model.params, nets.PROCESS), examples, ANY)


def test_one_time_for_the_whole_batch_is_refused():
  apply_fn = lambda params, x, t: nets.conv_net(params, x, jnp.full_like(t, t[0]))
  model = DiffusionModel(apply_fn, nets.conv_model().params, nets.PROCESS)
  with pytest.raises(ValueError, match="with the other example of its batch"):
    layers_of(model, nets.examples(3), Selection())


@pytest.mark.parametrize("name", ["v_zero_snr", "flow", "edm", "edm_raw"])
def test_discrete_and_continuous_processes_have_times_to_check_at(name):
  params = nets.random_params(nets.VECTOR_SHAPES)
  model = DiffusionModel(nets.vector_net, params, PROCESSES[name])
  assert len(layers_of(model, nets.examples(3, (4,)), Selection()).layers) == 3


def test_a_model_is_checked_once():
  """By whatever layers are selected afterwards."""
  sizes = []

  def counted(params, x, t):
    sizes.append(len(x))
    return nets.conv_net(params, x, t)

  model = DiffusionModel(counted, nets.conv_model().params, nets.PROCESS)
  found = layers_of(model, nets.examples(3), Selection())
  first = len(sizes)
  assert layers_of(model, nets.examples(5), Selection()) is found and len(sizes) == first
  layers_of(model, nets.examples(3), Selection(skip=("time",)))
  # Registration traces at batch sizes 3, 5 and 2; the check, at batch size 2, is not repeated.
  assert len(sizes) - first < first
