"""Time of the two big kernels against a plain training step of the same pairs, as a table.

  make bench-kernels                                  # the small U-Net (756,035 parameters)
  make bench-kernels ARGS="--model=ddpm-cifar --batch=128"   # the 38.3 M DDPM-CIFAR U-Net

`plain` is forward and backward of a batch of (example, draw) pairs. `curvature` adds the Kronecker
factors of all layers for one target a pair. `train gradients` makes the gradient of every example
(the mean over its draws) and its inner products with int8 queries. Rounds go through all kernels in
turn, so that slow drift of the machine hits all alike; medians are shown. Weights and pairs are
random: times do not depend on them.
"""

import statistics
import time

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxinf.attribution.influence import inner_products
from jaxinf.costs import measured
from jaxinf.curvature.fit import SKIP_NORMALISATION
from jaxinf.curvature.registration import register
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.objective import Noised
from jaxinf.gradients.quantise import dequantise, quantise
from jaxinf.models import num_params
from jaxinf.models.unet import UNet

_MODEL = flags.DEFINE_enum("model", "small", ["small", "ddpm-cifar"], "Which U-Net.")
_BATCH = flags.DEFINE_integer("batch", 64, "Pairs at a time.")
_QUERIES = flags.DEFINE_integer("queries", 16, "Queries scored.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds after the warm-up.")

_SHARED = dict(
  out_channels=3,
  scale_shift=True,
  sin_first=True,
  freq_shift=1.0,
  dropout=0.0,
  downsample_padding=0,
)
MODELS = {  # (fields, image size)
  "small": (
    dict(
      channels=(32, 64), blocks_per_level=1, attention_levels=(False, True), norm_groups=8,
      norm_eps=1e-5, **_SHARED,
    ),
    16,
  ),
  "ddpm-cifar": (
    dict(
      channels=(128, 256, 256, 256), blocks_per_level=2, norm_groups=32, norm_eps=1e-6,
      attention_levels=(False, True, False, False), **_SHARED,
    ),
    32,
  ),
}  # fmt: skip


def main(_) -> None:
  absl.logging.set_verbosity(absl.logging.WARNING)
  fields, size = MODELS[_MODEL.value]
  model, batch, rng = UNet(**fields), _BATCH.value, np.random.default_rng(0)
  shape = (size, size, 3)
  apply_fn = lambda params, x_t, t: model.apply({"params": params}, x_t, t)
  abstract = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32)
  )
  draw = lambda s: jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1]) or 1), jnp.float32)
  params = jax.tree.map(lambda leaf: draw(leaf.shape), abstract["params"])
  images = jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)
  pairs = Noised(images, jnp.asarray(rng.integers(0, 1000, batch)), images[::-1])
  registration = register(apply_fn, params, shape, SKIP_NORMALISATION)
  queries = {
    layer.name: quantise(draw((_QUERIES.value, int(np.prod(layer.matrix_shape)))))
    for layer in registration.layers
  }

  def plain(params, pairs):
    return jax.grad(lambda p: jnp.mean(LOSS.value(apply_fn(p, pairs.x_t, pairs.t), pairs)))(params)

  def curvature(params, pairs):
    return registration.factor_sums(params, pairs, pairs.noise, jnp.ones(batch))

  def train_gradients(draws):
    def kernel(params, pairs, queries):
      grads = registration.gradients(
        params, pairs, LOSS.cotangents(pairs, draws), rows=batch // draws
      )
      return inner_products(grads, {name: dequantise(q) for name, q in queries.items()})

    return kernel

  kernels = {"plain": (plain, (params, pairs)), "curvature": (curvature, (params, pairs))}
  for draws in (8, batch):
    name = f"train gradients, {draws} draws an example"
    kernels[name] = (train_gradients(draws), (params, pairs, queries))

  print(
    f"{_MODEL.value}: {num_params(params):,} parameters, {batch} pairs, {_QUERIES.value} queries"
  )
  compiled, costs, times = {}, {}, {name: [] for name in kernels}
  for name, (kernel, args) in kernels.items():
    compiled[name] = jax.jit(kernel)
    jax.block_until_ready(compiled[name](*args))  # compile
    with measured() as costs[name]:
      jax.block_until_ready(compiled[name](*args))
  for _ in range(_ROUNDS.value):
    for name, (_, args) in kernels.items():
      began = time.perf_counter()
      jax.block_until_ready(compiled[name](*args))
      times[name].append(time.perf_counter() - began)
  print("| kernel | ms | ÷ plain | pairs/s | peak host MiB | peak device MiB |")
  print("| --- | --- | --- | --- | --- | --- |")
  base = statistics.median(times["plain"])
  for name, seconds in times.items():
    median, cost = statistics.median(seconds), costs[name]
    print(
      f"| {name} | {median * 1e3:.1f} | {median / base:.2f} | {batch / median:.0f} | "
      f"{cost['peak_host_mib']} | {cost['peak_device_mib'] or '–'} |"
    )
  print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
  app.run(main)
