"""What the benchmarks share: networks with (example, draw) pairs, the timing loop and its table."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxinf.core.examples import Examples
from jaxinf.core.types import ApplyFn, Params
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine.resources import measured
from jaxinf.networks import diffusers, num_params
from jaxinf.networks.unet import UNet
from tests.compilations import counted_compilations

MODEL = flags.DEFINE_enum("model", "small", ["small", "ddpm-cifar"], "Which U-Net.")
BATCH = flags.DEFINE_integer("batch", 64, "Pairs at a time.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds after the warm-up.")

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
PROCESS = Process.epsilon(Schedule.linear(1000, 1e-4, 0.02))


class Pairs(NamedTuple):
  """(example, draw) pairs, and the gradients at the network's outputs for one target each."""

  noised: Noised
  cotangents: jax.Array  # [B, H, W, C], √(2/D) ξ with ξ ~ N(0, I)


@dataclasses.dataclass(frozen=True)
class Workload:
  """A network, and what goes through it.

  Attributes:
    name: in tables.
    apply_fn: the network.
    params: its parameters.
    images: [N, H, W, C] float32 in [-1, 1].
    pairs: the N · S pairs of S draws an image, image-major.
  """

  name: str
  apply_fn: ApplyFn
  params: Params
  images: np.ndarray
  pairs: Pairs

  def __len__(self) -> int:
    return len(self.pairs.cotangents)

  @functools.cached_property
  def model(self) -> DiffusionModel:
    """The network with its process."""
    return DiffusionModel(self.apply_fn, self.params, PROCESS)

  @functools.cached_property
  def examples(self) -> Examples:
    """The images."""
    return Examples(self.images)

  def batches(self, size: int) -> list[Pairs]:
    """All pairs, `size` at a time; the last batch may be smaller."""
    cut = lambda start: jax.tree.map(lambda x: jnp.asarray(x[start : start + size]), self.pairs)
    return [cut(start) for start in range(0, len(self), size)]

  def __str__(self) -> str:
    size = f"{num_params(self.params):,} parameters, {len(self):,} pairs of {len(self.images)}"
    return f"{self.name}: {size} images; {jax.devices()[0].device_kind}, jax {jax.__version__}"


def random_workload(name: str, num_images: int, draws: int) -> Workload:
  """A network of MODELS with random weights and pairs: times do not depend on them."""
  fields, size = MODELS[name]
  model, rng, shape = UNet(**fields), np.random.default_rng(0), (size, size, 3)
  abstract = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32)
  )
  params = jax.tree.map(lambda leaf: random_matrix(rng, leaf.shape), abstract["params"])
  normal = lambda: rng.standard_normal((num_images * draws, *shape), np.float32)
  noised = stored(normal(), rng.integers(0, 1000, num_images * draws), normal())
  return Workload(
    name=name,
    apply_fn=lambda params, x_t, t: model.apply({"params": params}, x_t, t),
    params=params,
    images=rng.uniform(-1, 1, (num_images, *shape)).astype(np.float32),
    pairs=Pairs(noised, _output_gradients(normal())),
  )


def folder_workload(folder: Path) -> Workload:
  """The network and pairs in a folder that other programs read too; see `curvature`."""
  apply_fn, params = diffusers.load(folder / "unet-small")
  with np.load(folder / "data-small.npz") as file:
    data = {key: file[key] for key in file.files}
  t = data["train_t"]
  spread = lambda table: table[t][..., None, None, None]
  x_t = (
    spread(data["sqrt_abar"]) * data["train"][:, None]
    + spread(data["sqrt_one_minus_abar"]) * data["train_eps"]
  )
  flat = lambda x: _channels_last(x.reshape(-1, *x.shape[2:]))
  noised = stored(flat(x_t), t.reshape(-1), flat(data["train_eps"]))
  pairs = Pairs(noised, _output_gradients(flat(data["train_xi"])))
  return Workload("unet-small", apply_fn, params, _channels_last(data["train"]), pairs)


def stored(x_t: np.ndarray, t: np.ndarray, noise: np.ndarray) -> Noised:
  """Pairs [B, …] of weight 1 of a network that predicts the noise."""
  t = t.astype(np.int32)
  return Noised(x_t, t, noise, np.ones(len(t), np.float32), t)


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
  """Normal numbers of variance 1 / (product of all axes but the last)."""
  return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1), jnp.float32)


@dataclasses.dataclass
class Timing:
  """Times of something that goes through `num_pairs` pairs.

  Attributes:
    num_pairs: at each call; 0 where it goes through none.
    seconds: wall time of each round.
    cpu_seconds: of this process in all threads, likewise.
    stages: name → seconds of each round, where the call returned its stages.
    cost: of the warm-up, without compilation: `jaxinf.engine.resources.measured`.
  """

  num_pairs: int
  seconds: list[float] = dataclasses.field(default_factory=list)
  cpu_seconds: list[float] = dataclasses.field(default_factory=list)
  stages: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  cost: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


def together(first: Timing, second: Timing) -> Timing:
  """One after the other, in every round."""
  most = lambda key: max((first.cost[key], second.cost[key]), key=lambda mib: mib or 0)
  return Timing(
    first.num_pairs,
    seconds=[sum(both) for both in zip(first.seconds, second.seconds, strict=True)],
    cost={key: most(key) for key in ("peak_host_mib", "peak_device_mib")},
  )


Call = Callable[[], Any]  # returns arrays to wait for, or a dict of the seconds of its stages


def alternating(calls: Mapping[str, tuple[int, Call]], rounds: int) -> dict[str, Timing]:
  """Times all calls in turn, `rounds` times, so that drift of the machine hits all alike.

  Args:
    calls: name → (pairs it goes through, the call).
    rounds: after a warm-up, which compiles, and one call that measures memory.

  Raises:
    AssertionError: something compiled in the timed rounds.
  """
  timings = {name: Timing(num_pairs) for name, (num_pairs, _) in calls.items()}
  for name, (_, call) in calls.items():
    jax.block_until_ready(call())
    with measured() as timings[name].cost:
      jax.block_until_ready(call())
  with counted_compilations() as compilations:
    for _ in range(rounds):
      for name, (_, call) in calls.items():
        wall, cpu = time.perf_counter(), time.process_time()
        value = jax.block_until_ready(call())
        timings[name].seconds.append(time.perf_counter() - wall)
        timings[name].cpu_seconds.append(time.process_time() - cpu)
        for stage, seconds in value.items() if _is_stages(value) else ():
          timings[name].stages.setdefault(stage, []).append(seconds)
  assert not compilations, f"{len(compilations)} compilations in the timed rounds"
  print(f"compilations in {rounds} timed rounds: {len(compilations)}")
  return timings


def _is_stages(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(v, float) for v in value.values())


def print_table(timings: Mapping[str, Timing], base: str = "plain") -> None:
  """Medians as Markdown; ratios to `base` are of times for one pair."""
  each = timings[base].median / timings[base].num_pairs
  print("| pass | pairs | ms | ÷ plain | pairs/s | peak host MiB | peak device MiB |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for name, timing in timings.items():
    num, median = timing.num_pairs, timing.median
    speed = f"{median / num / each:.2f} | {num / median:.0f}" if num else "– | –"
    print(
      f"| {name} | {num or '–'} | {median * 1e3:.1f} | {speed} | "
      f"{timing.cost['peak_host_mib']} | {timing.cost['peak_device_mib'] or '–'} |"
    )


def _output_gradients(xi: np.ndarray) -> np.ndarray:
  """√(2/D) ξ, the gradient of the pixel-mean loss at a target sampled from the model's Gaussian."""
  return np.sqrt(2 / np.prod(xi.shape[1:])).astype(np.float32) * xi


def _channels_last(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(np.moveaxis(x, -3, -1))
