"""Equal kernels share a program, and compute the same numbers whatever a user's flags say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import Draws
from jaxinf.attribution.kernels import Replicate
from jaxinf.core.random import fold_in_each, stream, stream_number
from jaxinf.diffusion.noise import draw_pairs
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.engine import Rows, compiled, kernels, map_batches, reduce_batches, spread
from tests.compilations import counted_compilations

NUM = 6
ROWS = Rows(
  np.random.default_rng(0).normal(size=(NUM, 3)).astype(np.float32), np.arange(NUM, dtype=np.uint32)
)


@dataclasses.dataclass(frozen=True)
class Noisy:
  """Kernel from rows to noise by their keys, and a scaled sum."""

  seed: int
  power: int = 1

  def __call__(self, scale, batch):
    keys = fold_in_each(stream(self.seed, "test"), batch.ids)
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    integers = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys)
    return {"noise": noise, "integers": integers, "scaled": scale * batch.data**self.power}


@dataclasses.dataclass(frozen=True)
class Summed:
  """Kernel to the sums of another."""

  kernel: Noisy

  def __call__(self, scale, batch):
    each = self.kernel(scale, batch)
    masked = lambda x: jnp.sum(x * batch.mask.reshape(-1, *[1] * (x.ndim - 1)), axis=0)
    return jax.tree.map(masked, each)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Kernel to the pairs of a replicate of draws."""

  process: Process
  replicate: Replicate

  def __call__(self, origin, batch):
    keys = self.replicate.keys(origin, batch)
    pairs = draw_pairs(self.process, batch.data, keys, self.replicate.draws)
    num = len(batch.ids)
    return {
      name: getattr(pairs, name).reshape(num, -1) for name in ("inputs", "target", "weights", "t")
    }


@dataclasses.dataclass(frozen=True)
class Precise:
  """Kernel that computes in 64 bits."""

  x64 = True

  def __call__(self, operands, batch):
    return operands + batch.ids[:, None].astype(jnp.float64)


def mapped(kernel, operands, rows=ROWS, devices=None, batch_size=4):
  return map_batches(kernel, operands, rows, batch_size=batch_size, label=None, devices=devices)


def reduced(kernel, operands, rows=ROWS, devices=None):
  return reduce_batches(kernel, operands, rows, batch_size=4, label=None, devices=devices)


SCALE = np.array(2 + 2.0**-40)  # in 64 bits, as a user's numbers may be


@pytest.mark.parametrize("driver", [mapped, reduced])
def test_equal_kernels_compile_once_however_often_they_are_made(driver, devices):
  made = (lambda seed: Noisy(seed)) if driver is mapped else (lambda seed: Summed(Noisy(seed)))
  other_rows = Rows(ROWS.data[::-1] * 3, ROWS.ids + 7)
  first = driver(made(11), SCALE, devices=devices)
  with counted_compilations() as compilations:
    again = driver(made(11), SCALE, devices=devices)
    driver(made(11), SCALE * 3, other_rows, devices)
  assert not compilations
  jax.tree.map(np.testing.assert_array_equal, again, first)
  with counted_compilations() as compilations:
    driver(made(12), SCALE, devices=devices)
  assert compilations


def test_programs_belong_to_their_devices():
  everywhere = tuple(jax.local_devices())
  assert compiled(Noisy(1), everywhere) is compiled(Noisy(1), everywhere)
  assert compiled(Noisy(1), everywhere) is not compiled(Noisy(2), everywhere)
  assert compiled(Noisy(1), everywhere) is not compiled(Noisy(1), everywhere[:1])


def test_the_cache_forgets_the_oldest_programs_and_no_more():
  made = kernels.compiled.cache_info().maxsize
  assert made == kernels._MOST_PROGRAMS >= 64  # of a session with several models and measurements


# --- a user's global flags ---

FLAGS = {
  "rbg": lambda: jax.default_prng_impl("rbg"),
  "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
  "x64": lambda: jax.enable_x64(True),
  "not partitionable": lambda: jax.threefry_partitionable(False),
}
PROCESS = Process.epsilon(Schedule.linear(10, 0.01, 0.5))
DRAWS = Draws(4, 2, seed=2**32 - 1)
ORIGIN = np.uint32(DRAWS.seed), np.uint32(stream_number("train_gradients"))


def everything(devices=None, batch_size=4):
  """What a map, a reduction, draws and a spread computation give."""
  pairs = dataclasses.replace(ROWS, draws=2)
  halves = lambda x: {"half": x / 2, "third": jnp.sum(x) / 3}
  return {
    "map": mapped(Noisy(3), SCALE, devices=devices, batch_size=batch_size),
    "reduce": reduced(Summed(Noisy(3)), SCALE, devices=devices),
    "draws": mapped(
      Drawn(PROCESS, Replicate.of(DRAWS)), ORIGIN, pairs, devices, batch_size=batch_size
    ),
    "spread": spread(halves, {"a": np.array([1.0, 2]), "b": np.float32([3])}, len, devices),
  }


@pytest.fixture(scope="module")
def expected():
  return everything()


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("fresh", [False, True], ids=["compiled_before", "compiled_under_it"])
def test_global_flags_change_no_number_and_no_type(expected, flag, fresh):
  if fresh:
    for cache in (kernels.compiled, kernels.summing, kernels.on_one_device, kernels.copying):
      cache.cache_clear()
  with flag():
    found = everything()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


def test_draws_under_rbg_follow_ids_and_no_batch(expected):
  """With JAX's own rbg keys a vmapped batch would draw from its first key."""
  with jax.default_prng_impl("rbg"):
    found = everything(jax.local_devices()[:1], batch_size=1)
  # A program of one row may round otherwise than one of several.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
  for part in ("map", "draws"):
    jax.tree.map(close, found[part], expected[part])


def test_a_kernel_that_asks_for_64_bits_has_them(devices):
  operands = np.array([1 + 2.0**-40])
  found = mapped(Precise(), operands, devices=devices)
  assert found.dtype == np.float64
  np.testing.assert_array_equal(found, operands + np.arange(NUM)[:, None])
