"""Examples of any shape and size: series, vectors, volumes, latents, and arrays on disk."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Compute, DiffusionModel, Draws, Examples, Process, Schedule
from tests import nets
from tests.twins import INDEPENDENT, assert_close, draw_gradients, twin_scores

DRAWS = Draws(4, 2, **INDEPENDENT, seed=5)
SCHEDULE = Schedule.linear(10, 0.01, 0.5)
SMALL = Compute(batch_size=4)  # queries and training examples are one program

pytestmark = pytest.mark.filterwarnings("ignore:mean training loss")  # the networks are random


def channels_net(params, x_t, t):
  """Two dense layers on the last axis of data of any rank, with the time added between."""
  h = nets.dense(params["in"], x_t)
  h = h + jnp.cos(t / 3).reshape(-1, *[1] * (x_t.ndim - 1))
  return nets.dense(params["out"], jnp.tanh(h))


def convolved(params, x_t, t):
  """Two convolutions along the steps of a series [B, L, 2]."""
  numbers = ("NWC", "WIO", "NWC")
  conv = lambda name, x: jax.lax.conv_general_dilated(
    x, params[name]["kernel"], (1,), "SAME", dimension_numbers=numbers
  )
  h = conv("in", x_t) + params["in"]["bias"] + jnp.cos(t / 3)[:, None, None]
  return conv("out", jnp.tanh(h))


CONVOLVED_SHAPES = {"in": {"kernel": (3, 2, 3), "bias": (3,)}, "out": {"kernel": (3, 3, 2)}}


def channels_model(num: int, process: Process | None = None) -> DiffusionModel:
  shapes = {"in": {"kernel": (num, 3), "bias": (3,)}, "out": {"kernel": (3, num), "bias": (num,)}}
  return DiffusionModel(
    channels_net, nets.random_params(shapes), process or Process.epsilon(SCHEDULE)
  )


def scores_of(model, queries, train, curvature=None, **settings):
  curvature = curvature or jaxinf.fit_curvature(model, train, draws=Draws(5))
  settings = dict(damping=1e-3, draws=DRAWS, compression=None, compute=SMALL) | settings
  return curvature, jaxinf.influence(curvature, queries=queries, train=train, **settings)


def latents(num: int, shape, seed: int = 0) -> np.ndarray:
  """Of standard deviation 4, far outside [-1, 1]."""
  return 4 * np.random.default_rng(seed).normal(size=(num, *shape)).astype(np.float32)


SHAPES = {
  "a vector": (5,),
  "a series": (6, 2),
  "an image that is not square": (3, 5, 2),
  "a latent of 16 channels": (4, 4, 16),
  "a volume": (2, 3, 4, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_of_data_of_any_shape_equal_a_float64_twin(shape):
  """The loss is the mean over all elements, whatever the rank."""
  model = channels_model(shape[-1])
  if shape == SHAPES["a series"]:
    params = nets.random_params(CONVOLVED_SHAPES)
    model = DiffusionModel(convolved, params, Process.flow("logit_normal"))
  train, queries = Examples(latents(6, shape)), Examples(latents(2, shape, seed=1))
  curvature, scores = scores_of(model, queries, train)
  of_queries = draw_gradients(model, curvature.layers, queries, "query_gradients", DRAWS)
  of_train = draw_gradients(model, curvature.layers, train, "train_gradients", DRAWS)
  assert_close(scores.values, twin_scores(curvature, of_queries, of_train, 1e-3), 1e-5)


def test_latents_are_scored_as_the_same_problem_with_data_of_another_scale():
  """Data z = 4 x at signal √ᾱ are x at four times the signal: x_t differ by a known factor."""
  train, queries = latents(12, (4, 4, 16)), latents(3, (4, 4, 16), seed=1)
  model = channels_model(16)
  shares = SCHEDULE.exact_alpha_bars
  factors = np.sqrt(16 * shares + 1 - shares)  # x_t of the latents ÷ that of x
  of_x = Schedule.from_alpha_bars(16 * shares / factors**2)

  def rescaled(params, x_t, t):
    return channels_net(params, jnp.asarray(factors, jnp.float32)[t][:, None, None, None] * x_t, t)

  other = DiffusionModel(rescaled, model.params, Process.epsilon(of_x))
  _, found = scores_of(model, Examples(queries), Examples(train))
  _, expected = scores_of(other, Examples(queries / 4), Examples(train / 4))
  assert_close(found.replicate_values, expected.replicate_values, 1e-4)  # float32, twice


class OnDisk:
  """An array that gives rows as zarr's and h5py's do, and knows how many bytes it gave at once."""

  def __init__(self, values: np.ndarray):
    self._values, self.shape, self.dtype = values, values.shape, values.dtype
    self.most_bytes = 0

  def __getitem__(self, rows):
    if not isinstance(rows, slice):  # h5py's rule
      assert (np.diff(rows) > 0).all(), "row numbers must ascend"
    found = self._values[rows]
    self.most_bytes = max(self.most_bytes, found.nbytes)
    return found

  def __array__(self, *args, **kwargs):
    raise AssertionError("it was read as a whole")


def every_method(model, queries, train, folder):
  """The scores of each way of computing, in small batches."""
  compute = Compute(batch_size=8)
  how = dict(damping=1e-3, draws=DRAWS, compute=compute)
  curvature = jaxinf.fit_curvature(model, train, jaxinf.EKFAC(), draws=Draws(4), compute=compute)
  both = dict(queries=queries, train=train)
  store = jaxinf.build_store(folder, curvature, train=train, draws=DRAWS, compute=compute)
  return {
    "influence": jaxinf.influence(curvature, **both, **how),
    "store": store.query(queries, **how),
    "trak": jaxinf.trak(model, **both, **how, projection=8),
    "das": jaxinf.das(model, **both, **how, projection=8),
    "pixel": jaxinf.pixel_similarity(**both),
  }


def test_arrays_on_disk_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
  """Data and conditioning; and the scores are those of the same arrays in memory."""
  num, shape, eight_images = 150, (4, 4, 1), 8 * 16 * 4
  monkeypatch.setattr("jaxinf.core.arrays._BLOCK_BYTES", eight_images)
  arrays = nets.random_images(num, shape), np.arange(num) % 3
  asked = nets.random_images(3, shape, seed=1), np.arange(3)
  lazy, lazily_asked = ([OnDisk(array) for array in pair] for pair in (arrays, asked))
  examples = lambda pair: Examples(pair[0], conditioning=pair[1])
  # An influence's check of its compression takes a sample of 32 examples.
  monkeypatch.setattr("jaxinf.attribution.scoring._SAMPLE", 4)
  model = nets.conditional_model()
  found = every_method(model, examples(lazily_asked), examples(lazy), tmp_path / "lazy")
  expected = every_method(model, examples(asked), examples(arrays), tmp_path / "eager")
  for name, scores in found.items():
    np.testing.assert_array_equal(scores.values, expected[name].values, err_msg=name)
  for array in lazy:  # labels have 8 bytes on disk, of which 4 are kept
    assert array.most_bytes <= 2 * eight_images < array.dtype.itemsize * np.prod(array.shape)


def test_memory_does_not_grow_with_a_memory_map(tmp_path, monkeypatch):
  """Four times as many examples: the peak of what NumPy and Python hold is nearly the same."""
  monkeypatch.setattr("jaxinf.core.arrays._BLOCK_BYTES", 2**18)
  shape = (32, 32, 4)  # 16 KiB
  model, compute = channels_model(4), Compute(batch_size=8)
  queries = Examples(nets.random_images(2, shape, seed=1))

  def peak(num: int) -> int:
    path = tmp_path / f"{num}.npy"
    np.save(path, nets.random_images(num, shape))
    mapped = np.load(path, mmap_mode="r")
    tracemalloc.start()
    try:
      train = Examples(mapped)
      curvature = jaxinf.fit_curvature(model, train, draws=Draws(2), compute=compute)
      scores_of(model, queries, train, curvature, draws=Draws(2, 1), compute=compute)
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  peak(16)  # compiles
  few, many = peak(64), peak(256)
  # 192 examples more are 3 MiB.
  assert many - few < 2**19, (few, many)


def text_net(params, x_t, t, text):
  given = jnp.dot(text, params["text"]["kernel"])
  return channels_net(params, x_t, t) + given[:, None, None]


TEXT_SHAPES = {
  "in": {"kernel": (1, 3), "bias": (3,)},
  "out": {"kernel": (3, 1), "bias": (1,)},
  "text": {"kernel": (3, 1)},
}


@functools.cache
def scores_of_type(dtype: str) -> np.ndarray:
  """Of images and texts whose numbers a float16 holds, given as another type."""
  images, text = nets.random_images(6), nets.random_images(6, (3,), seed=2)
  cast = lambda array: array.astype("f2").astype(dtype)
  model = DiffusionModel(text_net, nets.random_params(TEXT_SHAPES), Process.epsilon(SCHEDULE))
  train, queries = (Examples(cast(images[:num]), conditioning=cast(text[:num])) for num in (6, 2))
  return scores_of(model, queries, train)[1].values


@pytest.mark.parametrize("dtype", [">f4", "f8", ">f8"])
def test_numbers_of_other_types_are_the_same_numbers(dtype):
  """Big-endian ones, as in other people's files, and those of double precision."""
  np.testing.assert_array_equal(scores_of_type(dtype), scores_of_type("f4"))
