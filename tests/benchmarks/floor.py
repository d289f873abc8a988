"""What a pass over pairs must compute beyond forward and backward: the products of its layers.

Divided by the rate of a large float32 matrix product on the same machine in the same run, their
operations give a time that no arrangement of these products beats. Symmetry of second moments,
which would halve some of them, is not counted, nor is memory traffic.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.layers.blocks import ConvBlock
from jaxinf.layers.register import Registration
from jaxinf.layers.specs import Layer
from tests.benchmarks.workloads import Call, Workload


@dataclasses.dataclass(frozen=True)
class Products:
  """Operations (additions and multiplications) of one layer for one pair.

  Attributes:
    name: of the layer.
    kfac: of both factors.
    ekfac: of gradients in the eigenbasis, in the cheaper order.
    diagonal: of gradients.
  """

  name: str
  kfac: float
  ekfac: float
  diagonal: float


def layer_products(layers: Registration, workload: Workload) -> list[Products]:
  """The products of every layer."""
  positions = layers.positions(workload.params, workload.pairs.noised)
  products = []
  for layer in layers.layers:
    num, (*_, d_out, d_in) = positions[layer.name], layer.matrix_shape
    gradient = num * d_in * d_out
    rotated_first = num * (d_in**2 + d_out**2)
    rotated_after = d_in * d_out * (d_in + d_out) if num > 1 else np.inf
    counts = {
      "kfac": _input_factor(layers, layer, num) + num * d_out**2,
      "ekfac": gradient + min(rotated_first, rotated_after),
      "diagonal": gradient,
    }
    products.append(
      Products(layer.name, **{name: 2.0 * layer.groups * n for name, n in counts.items()})
    )
  return products


def _input_factor(layers: Registration, layer: Layer, positions: int) -> float:
  """Multiplications of A: of inputs d_in² at each position, or those of the spectrum.

  That of an H × W image has (H + 2) × (⌊W / 2⌋ + 2) frequencies, at each of which the product of
  complex vectors of C channels takes 4 C² multiplications. Images are taken to be square.
  """
  block = layers.blocks[layer.name]
  if not (isinstance(block, ConvBlock) and block._autocorrelates):
    return positions * layer.matrix_shape[-1] ** 2
  axes, channels = len(block.form.strides), layer.kernel_shape[block.form.kernel_spec[1]]
  side = round(positions ** (1 / axes))
  return (side + 2) ** (axes - 1) * (side // 2 + 2) * 4 * channels**2


def matmul(size: int | None = None) -> tuple[Call, float]:
  """A large float32 matrix product in full precision, and its operations."""
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
  product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
  return lambda: product(x), 2.0 * size**3


def print_floor(
  products: list[Products], *, pairs: int, rate: float, plain: float, taps: float, passes: dict
) -> None:
  """How far passes over a batch are from the time of plain and of their products.

  Args:
    products: of every layer.
    pairs: of the batch.
    rate: operations a second of a large product.
    plain: seconds of forward and backward of the batch.
    taps: seconds of the forward pass and the gradients at the layers' outputs alone.
    passes: "kfac", "ekfac", "diagonal" → seconds.
  """
  print(f"matrix product: {rate / 1e9:.0f} Gflop/s")
  print(
    "| pass | products, Gflop | floor ms | ÷ pass | pass ÷ (plain + floor) | pass − taps, ms | "
    "÷ floor |"
  )
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for name, seconds in passes.items():
    flops = pairs * sum(getattr(layer, name) for layer in products)
    floor = flops / rate
    print(
      f"| {name} | {flops / 1e9:.1f} | {floor * 1e3:.1f} | {floor / seconds:.0%} | "
      f"{seconds / (plain + floor):.2f} | {(seconds - taps) * 1e3:.1f} | "
      f"{(seconds - taps) / floor:.1f} |"
    )
