"""Tiny networks as plain functions, and models made of them, for tests of the mathematics."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import DiffusionModel, Examples, Process, Schedule
from jaxinf.diffusion.noise import Noised

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
PROCESS = Process.epsilon(SCHEDULE)


def random_params(shapes: dict, seed: int = 0) -> dict:
  """Parameters of the given shapes, N(0, 1 / fan-in)."""
  rng = np.random.default_rng(seed)
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  draw = lambda s: rng.normal(size=s) / np.sqrt(max(1, np.prod(s[:-1])))
  return jax.tree.unflatten(treedef, [jnp.asarray(draw(s), jnp.float32) for s in leaves])


def conv(layer: dict, x, strides=(1, 1), padding="SAME"):
  y = jax.lax.conv_general_dilated(
    x, layer["kernel"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return y + layer["bias"]


def dense(layer: dict, x):
  return jnp.dot(x, layer["kernel"]) + layer["bias"]


def time_features(t):
  return jnp.stack([t / 1000, jnp.cos(t / 100)], axis=-1)


CONV_SHAPES = {
  "conv_in": {"kernel": (3, 3, 1, 3), "bias": (3,)},
  "time": {"kernel": (2, 3), "bias": (3,)},
  "mix": {"kernel": (3, 3), "bias": (3,)},
  "conv_out": {"kernel": (3, 3, 3, 1), "bias": (1,)},
}


def conv_net(params, x_t, t):
  """Convolution, time embedding, position-wise dense (as attention projections), convolution."""
  h = conv(params["conv_in"], x_t) + dense(params["time"], time_features(t))[:, None, None]
  batch, height, width, channels = h.shape
  h = jnp.tanh(h).reshape(batch, height * width, channels)
  h = jnp.tanh(dense(params["mix"], h)).reshape(batch, height, width, channels)
  return conv(params["conv_out"], h)


VECTOR_SHAPES = {
  "first": {"kernel": (4, 3), "bias": (3,)},
  "time": {"kernel": (2, 3), "bias": (3,)},
  "last": {"kernel": (3, 4), "bias": (4,)},
}


def vector_net(params, x_t, t):
  """Two dense layers on vectors [4], with an embedding of times of any size."""
  t = t.astype(x_t.dtype)
  h = dense(params["first"], x_t) + dense(params["time"], jnp.stack([t / 10, jnp.cos(t)], axis=-1))
  return dense(params["last"], jnp.tanh(h))


CONDITIONAL_SHAPES = {
  "image": {"kernel": (16, 5), "bias": (5,)},
  "label": {"kernel": (3, 5)},
  "time": {"kernel": (2, 5), "bias": (5,)},
  "out": {"kernel": (5, 16), "bias": (16,)},
}


def conditional_net(params, x_t, t, labels):
  """Two dense layers on 4 × 4 images, with embeddings of the time and of a label in {0, 1, 2}."""
  h = dense(params["image"], x_t.reshape(-1, 16)) + dense(params["time"], time_features(t))
  h = jnp.tanh(h + jnp.dot(jax.nn.one_hot(labels, 3), params["label"]["kernel"]))
  return dense(params["out"], h).reshape(x_t.shape)


def conditional_model(seed: int = 0) -> DiffusionModel:
  return DiffusionModel(conditional_net, random_params(CONDITIONAL_SHAPES, seed), PROCESS)


def conv_model(seed: int = 0) -> DiffusionModel:
  return DiffusionModel(conv_net, random_params(CONV_SHAPES, seed), PROCESS)


def random_images(num: int, shape=(4, 4, 1), seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).uniform(-1, 1, (num, *shape)).astype(np.float32)


def examples(num: int, shape=(4, 4, 1), seed: int = 0, **fields) -> Examples:
  """`num` random examples of that shape."""
  return Examples(random_images(num, shape, seed), **fields)


def some_pairs(num: int, shape=(4, 4, 1), seed: int = 1) -> Noised:
  """`num` pairs of random inputs, targets and times in [0, 1000), all of weight 1."""
  rng = np.random.default_rng(seed)
  inputs, target = jnp.asarray(rng.normal(size=(2, num, *shape)), jnp.float32)
  t = jnp.asarray(rng.integers(0, 1000, num), jnp.int32)
  return Noised(inputs, t, target, jnp.ones(num), t)
