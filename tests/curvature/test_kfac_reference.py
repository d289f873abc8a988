"""K-FAC factors, gradients and scores against an independent float64 referee (PyTorch autograd).

The fixture holds a 12.6k-parameter diffusers U-Net, 16 pairs and, for four kinds of layer, factors
from every output's Jacobian, so there is no Monte-Carlo noise: only float32 rounding remains.
See make_kfac_reference.py.
"""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinf import DiffusionModel
from jaxinf.curvature.decompose import decomposed
from jaxinf.curvature.eigenbasis import precondition
from jaxinf.diffusion.noise import Noised
from jaxinf.layers.coverage import Selection
from jaxinf.layers.register import register
from jaxinf.networks import diffusers
from tests import nets, twins

LAYERS = ("conv", "strided", "dense", "attention")
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOLERANCE = 1e-4  # of the largest entry: float32 against float64, sinusoidal features included
CONFIG = {
  "_class_name": "UNet2DModel",
  "sample_size": 8,
  "layers_per_block": 1,
  "block_out_channels": [4, 8],
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
  "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
  "norm_num_groups": 2,
  "attention_head_dim": None,
  "resnet_time_scale_shift": "scale_shift",
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
}


@pytest.fixture(scope="module")
def referee():
  with np.load(Path(__file__).parent / "fixtures" / "kfac-reference.npz") as file:
    return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def ours(referee, tmp_path_factory):
  """Factors with exact output second moments, and example gradients, of the referee's pairs."""
  folder = tmp_path_factory.mktemp("unet")
  (folder / "config.json").write_text(json.dumps(CONFIG))
  tensors = {k.removeprefix("param/"): v for k, v in referee.items() if k.startswith("param/")}
  save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
  apply_fn, params = diffusers.load(folder)
  only = tuple(f"^{re.escape(layer_of(referee, short))}/" for short in LAYERS)
  model = DiffusionModel(apply_fn, params, nets.PROCESS)
  layers = register(model, (8, 8, 3), Selection(only=only))

  train, query = (stored_pairs(referee, split) for split in ("train", "query"))
  num, size = len(train.t), 8 * 8 * 3
  # The sum-of-squares loss has the Hessian 2I at the output: cotangents √2 e_c for every output c,
  # of which `factor_sums` takes the mean.
  units = jnp.sqrt(2) * jnp.eye(size).reshape(size, 1, 8, 8, 3)

  @quick_jit
  def sums(params, pairs):
    cotangents = lambda out: jnp.broadcast_to(units, (size, *out.shape))
    return layers.factor_sums(params, pairs, cotangents, jnp.ones(num))

  @quick_jit
  def gradients(params, pairs):
    draws = 2
    cotangents = lambda out: 2 * (out - pairs.target) / draws
    rows = layers.gradients(params, pairs, cotangents, rows=len(pairs.t) // draws)
    return rows, apply_fn(params, pairs.inputs, pairs.time)

  means = layers.factors(sums(params, train), total=num)
  means = {name: f.replace(g=f.g * size) for name, f in means.items()}
  grads, output = gradients(params, jax.tree.map(lambda *x: jnp.concatenate(x), train, query))
  split = len(referee["train"])
  of_train = {name: grad[:split] for name, grad in grads.items()}
  of_query = {name: grad[split:] for name, grad in grads.items()}
  return means, of_train, of_query, output[:num]


def stored_pairs(referee, split) -> Noised:
  """The referee's pairs, example-major, channels last."""
  images, t, noise = (referee[split + suffix] for suffix in ("", "_t", "_eps"))
  draws = t.shape[1]
  last = lambda x: jnp.asarray(np.moveaxis(x.reshape(-1, *x.shape[-3:]), 1, -1))
  images, noise, t = last(np.repeat(images, draws, axis=0)), last(noise), jnp.asarray(t.reshape(-1))
  return Noised(nets.PROCESS.noised(images, t, noise), t, noise, jnp.ones(len(t)), t)


def layer_of(referee, short):
  return str(referee[f"{short}.name"]).replace(".", "/").replace("/0", "_0").replace("/1", "_1")


def in_our_order(columns: int, kind: str) -> np.ndarray:
  """Places of (kernel row, kernel column, channel) columns among the referee's (channel, …)."""
  if kind not in ("conv", "strided"):
    return np.arange(columns)
  kernel = np.arange(columns - 1).reshape(-1, 3, 3).transpose(1, 2, 0).reshape(-1)
  return np.append(kernel, columns - 1)


def assert_close(actual, expected):
  twins.assert_close(actual, expected, TOLERANCE)


def test_the_network_equals_the_referee(referee, ours):
  output = np.moveaxis(np.asarray(ours[3]), -1, 1).reshape(referee["output"].shape)
  assert_close(output, referee["output"])


@pytest.mark.parametrize("short", LAYERS)
def test_input_factors_equal_the_referee(referee, ours, short):
  expected = referee[f"{short}.A"]
  order = in_our_order(len(expected), short)
  assert_close(ours[0][layer_of(referee, short)].a, expected[np.ix_(order, order)])


@pytest.mark.parametrize("short", LAYERS)
def test_gradient_factors_equal_the_referee(referee, ours, short):
  assert_close(ours[0][layer_of(referee, short)].g, referee[f"{short}.B"])


@pytest.mark.parametrize("short", LAYERS)
@pytest.mark.parametrize(("split", "place"), [("train", 1), ("query", 2)])
def test_example_gradients_equal_the_referee(referee, ours, short, split, place):
  expected = referee[f"{short}.grad_{split}"]
  order = in_our_order(expected.shape[-1], short)
  assert_close(ours[place][layer_of(referee, short)], expected[..., order])


@pytest.mark.parametrize("short", LAYERS)
def test_layer_scores_equal_the_referee(referee, ours, short):
  factors, train, query, _ = ours
  name = layer_of(referee, short)
  damping = float(referee[f"{short}.damping"])
  bases, _ = decomposed({name: factors[name]}, "host")
  preconditioned = precondition(query[name], bases[name], damping)
  scores = np.einsum("qoi,noi->qn", preconditioned, train[name])
  assert_close(scores, referee[f"{short}.scores_kfac"])
