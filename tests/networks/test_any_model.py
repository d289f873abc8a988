"""The recipes of docs/any_model.md run as they stand, and find the true gradients and scores."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import DiffusionModel, Examples
from jaxinf.diffusion.noise import Noised, losses, predict
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import Registration, layers_of
from jaxinf.layers.specs import to_matrices
from tests import nets
from tests.twins import assert_close

RECIPES = (Path(__file__).parents[2] / "docs/any_model.md").read_text()
SPELLINGS = {
  "Flax linen": ["conv_in", "conv_out", "time"],
  "Flax NNX": ["conv_in", "conv_out", "time"],
  "Haiku, and plain functions": ["net/~/conv_in", "net/~/conv_out", "net/~/time"],
  "Equinox, and models that are pytrees": ["layers/0", "layers/1", "time"],
}
NUM, SHAPE = 5, (4, 4, 1)
ONE_OF_THREE = np.arange(NUM) % 3
RNG = np.random.default_rng(0)
TEXT = {
  "tokens": RNG.normal(size=(NUM, 3, 5)).astype(np.float32),
  "mask": np.arange(3) <= ONE_OF_THREE[:, None],
}
pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the networks are random

CONDITIONING = {"Labels": ONE_OF_THREE, "Text": TEXT}
NOT_FOUND = "A layer that is not found"


def section(title: str) -> str:
  """The page from one heading to the next."""
  (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", RECIPES, re.DOTALL | re.M)
  return text


def blocks(text: str, language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.M)


def run(source: str, names: dict) -> None:
  exec(source.replace("Draws(250)", "Draws(2)"), names)


@functools.cache
def recipe(title: str) -> dict:
  """The names that a section's first block leaves, and others before anything is fitted."""
  names = dict(
    images=nets.random_images(NUM), samples=nets.random_images(2, seed=1),
    labels=ONE_OF_THREE, sample_labels=np.array([2, 0]), text=TEXT,
  )  # fmt: skip
  for source in blocks(RECIPES.split("\n## ")[0] + section(title), "python"):
    if "fit_curvature" in source:
      break
    run(source, names)
  return names


def random_like(params, seed: int = 0):
  """Parameters of the same shapes, large enough for every layer to matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), jnp.float32), params)


def weights(title: str, net: dict):
  """The linen network's parameters in another spelling."""
  if title.startswith("Haiku"):
    layer = lambda kernel, bias: {"w": kernel, "b": bias}
    return {f"net/~/{name}": layer(**net[name]) for name in net}
  if title.startswith("Equinox"):
    model = recipe(title)["params"]
    kernels = [jnp.transpose(net[name]["kernel"], (3, 2, 0, 1)) for name in ("conv_in", "conv_out")]
    biases = [net[name]["bias"][:, None, None] for name in ("conv_in", "conv_out")]
    leaves = [kernels[0], biases[0], kernels[1], biases[1], net["time"]["kernel"].T]
    return jax.tree.unflatten(jax.tree.structure(model), [*leaves, net["time"]["bias"]])
  return net


def found(apply_fn, params, selection: Selection, conditioning=None) -> Registration:
  """The layers of a network of images."""
  model = DiffusionModel(apply_fn, params, nets.PROCESS)
  return layers_of(model, Examples(nets.random_images(NUM), conditioning=conditioning), selection)


def check_gradients(names: dict, conditioning=None, diagonal=()) -> Registration:
  """All is covered, and every layer's gradients of single examples are those of jax.grad."""
  apply_fn, params = names["apply_fn"], random_like(names["params"])
  layers = found(apply_fn, params, Selection(diagonal=diagonal), conditioning)
  assert all(row.block not in (None, "skipped") for row in layers.coverage.rows)
  rng = np.random.default_rng(1)
  inputs, target = rng.normal(size=(2, NUM, *SHAPE)).astype(np.float32)
  t, weights = rng.integers(0, 1000, NUM).astype(np.int32), np.ones(NUM, np.float32)
  pairs = Noised(inputs, t, target, weights, t, conditioning)
  cotangents = lambda out: 2 * (out - target) / np.prod(SHAPE)
  tapped = jax.jit(lambda p: layers.gradients(p, pairs, cotangents, rows=NUM))(params)

  def loss(params, pair: Noised):
    one = jax.tree.map(lambda x: x[None], pair)
    return losses(predict(apply_fn, params, one), one)[0]

  expected = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, pairs)
  for name, matrices in to_matrices(layers.layers, expected).items():
    assert_close(tapped[name], matrices, 1e-5)  # sums of float32 in another order
    assert np.abs(matrices).max() > 1e-4, name  # the layer takes part
  return layers


@functools.cache
def scores_of(title: str) -> np.ndarray:
  """[Q, N] scores of the linen network's weights in one spelling, by the lines under linen."""
  names = dict(recipe(title))
  names["params"] = weights(title, random_like(recipe("Flax linen")["params"]))
  run(blocks(section("Flax linen"), "python")[1], names)
  assert [layer.name for layer in names["curvature"].layers] == SPELLINGS[title]
  return names["scores"].values


@pytest.mark.parametrize("title", SPELLINGS)
def test_every_spelling_has_the_table_shown_and_true_gradients(title):
  names = recipe(title)
  model = check_gradients(names)
  assert [model.coverage.table() + "\n"] == blocks(section(title), "text")
  assert [layer.name for layer in model.layers] == SPELLINGS[title]


@pytest.mark.parametrize("title", list(SPELLINGS)[1:])
def test_one_network_has_the_same_scores_in_every_spelling(title):
  """Same weights, draws and damping: kernels lie differently, and sums come in another order."""
  expected = scores_of("Flax linen")
  assert np.abs(expected).min() > 0
  assert_close(scores_of(title), expected, 1e-4)


@pytest.mark.parametrize("title", CONDITIONING)
def test_conditional_models_have_true_gradients(title):
  model = check_gradients(recipe(title), CONDITIONING[title])
  assert [model.coverage.table() + "\n"] == blocks(section("Text"), "text") or title == "Labels"


def test_the_lines_on_labels_run():
  """The scores themselves are held to a float64 twin in tests/attribution/test_conditioning.py."""
  names = dict(recipe("Labels"))
  (source,) = (s for s in blocks(section("Labels"), "python") if "influence" in s)
  run(source, names)
  kinds = {layer.name: layer.kind for layer in names["curvature"].layers}
  assert kinds == {"conv_in": "conv2d", "conv_out": "conv2d", "label": "embed", "time": "dense"}
  assert names["scores"].values.shape == (2, NUM)


def test_layers_of_single_examples_keep_their_gradients_where_the_batch_is_not_first():
  """Under vmap, W @ x without a bias has the batch last, and table[i] of a number i is a slice."""
  shapes = {"first": (6, 16), "gain": (6,), "last": (16, 6), "rows": (3, 4), "table": (3, 6)}

  def one(params, x, t):
    h = params["first"] @ x.reshape(-1) + params["table"][t // 400]
    h = jnp.tanh(h) * params["gain"]
    rows = jax.vmap(lambda row: jnp.tanh(params["rows"] @ row))(x[..., 0])
    return (params["last"] @ (h + rows.sum() * h)).reshape(x.shape)

  apply_fn = jax.vmap(one, in_axes=(None, 0, 0))
  names = {
    "apply_fn": apply_fn,
    "params": jax.tree.map(np.ones, shapes, is_leaf=lambda s: isinstance(s, tuple)),
  }
  check_gradients(names, diagonal=["^gain$"])


def test_the_expressions_for_normalisation_find_it_in_every_spelling_and_nothing_else():
  selection = Selection(skip=recipe("Normalisation")["normalisation"])
  scales = ("GroupNorm_0/scale", "layers/0/norm/weight", "net/~/layer_norm/scale")
  shifts = ("GroupNorm_0/bias", "layers/0/norm/bias", "net/~/layer_norm/offset")
  assert all(map(selection.skips, scales + shifts))
  assert not any(map(selection.skips, ("conv_norm/conv/weight", "time/bias", "norm/proj/kernel")))


def test_calls_inside_the_network_hide_no_layer():
  names = recipe("Flax linen")
  plain, inlined = (
    found(function, names["params"], Selection())
    for function in (names["apply_fn"], jax.jit(jax.checkpoint(names["apply_fn"])))
  )
  assert inlined.layers == plain.layers


@functools.cache
def three_ways() -> tuple[dict, list[str]]:
  """The names after the last of the three ways on from an unknown layer; each way's table."""
  names, tables = dict(recipe(NOT_FOUND)), []
  names["params"] = random_like(names["params"])
  for source in blocks(section(NOT_FOUND), "python")[1:]:
    run(source, names)
    tables.append(names["curvature"].coverage.table() + "\n")
  return names, tables


def test_a_layer_that_is_not_found_stops_with_the_table_shown_and_three_ways_lead_on():
  names = recipe(NOT_FOUND)
  message, *tables = blocks(section(NOT_FOUND), "text")
  with pytest.raises(ValueError, match=re.escape(message)):
    found(names["apply_fn"], names["params"], Selection(jaxinf.SKIP_NORMALISATION))
  assert three_ways()[1] == tables


def test_a_layer_declared_by_hand_has_the_gradients_and_curvature_of_one_that_is_found():
  """The same network with the constant at the layer's input, where the trace explains it."""
  names, _ = three_ways()
  check_gradients(names, diagonal=["^gain$"])

  def explained(params, x_t, t):
    hidden = params["hidden"]
    y = 0.25 * names["inputs"](x_t, t) @ hidden["w"] + hidden["b"]
    return (params["gain"] * (jnp.tanh(y) @ params["out"]["w"])).reshape(x_t.shape)

  params = names["params"]
  model = DiffusionModel(explained, params, names["process"])
  expected = jaxinf.fit_curvature(model, names["train"], draws=jaxinf.Draws(2), diagonal=["^gain$"])
  assert expected.layers == names["curvature"].layers
  products = (c.multiply(params, 1e-9) for c in (names["curvature"], expected))
  for ours, theirs in zip(*map(jax.tree.leaves, products), strict=True):
    assert_close(ours, theirs, 1e-5)  # sums of float32 in another order
