"""Per-example gradients from tapped layers against plain differentiation, one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf import DiffusionModel, Draws, Process, Schedule
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS, measurement_named
from jaxinf.layers.coverage import Selection
from jaxinf.layers.per_example import example_gradients
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from tests import nets, twins
from tests.diffusion.measured import NAMES, random_examples
from tests.processes import PROCESSES

NUM, DRAWS = 3, 4


def draw_keys_of(num: int, draws: int = DRAWS) -> jax.Array:
  """Keys [num, draws] of the examples 0 … num − 1."""
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  return jax.vmap(lambda key: draw_keys(key, draws))(keys)


def tapped_gradients(model, measurement, data, keys, **options):
  """The kernel's gradients of data [n, …], compiled."""
  row = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  given = jax.tree.map(row, options.get("conditioning"))
  layers = register(model, data.shape[1 + measurement.axes :], Selection(), given)
  kernel = lambda params, data, keys: example_gradients(
    layers, measurement, model.process, params, data=data, keys=keys, **options
  )
  return layers.layers, jax.jit(kernel)(model.params, data, keys)


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_few_images_of_many_draws_have_the_gradients_of_many_of_few(draws):
  """Up to two images of 16 draws are batches of their own; others share a backward pass."""
  model, images = nets.conv_model(), jnp.asarray(nets.random_images(5))
  keys = draw_keys_of(5, draws)
  _, together = tapped_gradients(model, LOSS, images, keys)
  for num in (1, 2, 3):
    _, few = tapped_gradients(model, LOSS, images[:num], keys[:num])
    # The same float32 sums in another order.
    twins.assert_close(few, jax.tree.map(lambda x, n=num: x[:n], together))


def looped_gradients(layers, model, value, data, keys, *more):
  """Layer name → [n, …] of value(params, example, keys, …), differentiated example by example."""
  gradient = jax.jit(jax.grad(value))
  trees = [gradient(model.params, *row) for row in zip(data, keys, *more, strict=True)]
  return to_matrices(layers, jax.tree.map(lambda *x: np.stack(x), *trees))


@pytest.mark.parametrize("name", NAMES)
def test_tapped_gradients_equal_a_loop_over_examples(name):
  model, measurement = nets.conv_model(), measurement_named(name)
  data = jnp.asarray(random_examples(measurement, NUM, model.process.num_steps))
  layers, tapped = tapped_gradients(model, measurement, data, draw_keys_of(NUM))

  def value(params, example, keys):
    return measurement.evaluate(model.apply_fn, params, model.process, example[None], keys[None])[0]

  # The same float32 sums in another order.
  twins.assert_close(tapped, looped_gradients(layers, model, value, data, draw_keys_of(NUM)))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
def test_the_gradient_of_a_process_is_that_of_its_own_weighted_loss(process):
  """Against jax.grad in float64, pair by pair, of a network that takes the process's own times."""
  model = DiffusionModel(nets.vector_net, nets.random_params(nets.VECTOR_SHAPES), process)
  data, keys = jnp.asarray(nets.random_images(NUM, (4,))), draw_keys_of(NUM)
  layers, tapped = tapped_gradients(model, LOSS, data, keys, draws=Draws(DRAWS))
  pairs = LOSS.pairs(process, data, keys, draws=Draws(DRAWS))
  grads = twins.twin_gradients(model, layers, pairs)
  means = {name: g.reshape(NUM, DRAWS, *g.shape[1:]).mean(axis=1) for name, g in grads.items()}
  twins.assert_close(tapped, means)


def test_conditional_gradients_equal_a_loop_over_examples():
  model = nets.conditional_model()
  images, labels = jnp.asarray(nets.random_images(NUM)), jnp.array([2, 0, 1])
  keys = draw_keys_of(NUM)
  layers, tapped = tapped_gradients(model, LOSS, images, keys, conditioning=labels)

  def value(params, image, keys, label):
    apply_fn = lambda params, x_t, t: model.apply_fn(params, x_t, t, jnp.full(len(x_t), label))
    return LOSS.evaluate(apply_fn, params, model.process, image[None], keys[None])[0]

  # The same float32 sums in another order.
  twins.assert_close(tapped, looped_gradients(layers, model, value, images, keys, labels))


@pytest.mark.parametrize("antithetic", [False, True])
def test_with_flips_the_gradient_is_the_mean_of_an_images_and_its_mirror_images(antithetic):
  """ε̂ = W x_t + b: ∇_W ℓ is (2/D) (W E[x_t x_tᵀ] + b E[x_t]ᵀ − E[ε x_tᵀ]), with known moments."""
  schedule, shape, num = Schedule.linear(5, 0.01, 0.5), (1, 3, 1), 4_000
  rng = np.random.default_rng(0)
  matrix, bias = rng.normal(size=(3, 3)), rng.normal(size=3)
  image = np.array([0.9, 0.1, -0.7])
  params = {"linear": {"kernel": matrix.T, "bias": bias}}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  apply_fn = lambda params, x_t, t: nets.dense(params["linear"], x_t.reshape(-1, 3)).reshape(
    x_t.shape
  )
  model = DiffusionModel(apply_fn, params, Process.epsilon(schedule))

  def expected(x):
    total = np.zeros((3, 4))
    for signal, noise in zip(np.float64(schedule.signal), np.float64(schedule.noise), strict=True):
      second = np.outer(signal * x, signal * x) + noise**2 * np.eye(3)
      total[:, :3] += matrix @ second + np.outer(bias, signal * x) - noise * np.eye(3)
      total[:, 3] += matrix @ (signal * x) + bias
    return 2 / 3 * total / 5

  images = jnp.broadcast_to(jnp.asarray(image, jnp.float32).reshape(1, *shape), (num, *shape))
  draws = Draws(DRAWS, antithetic=antithetic, shared=False)
  _, grads = tapped_gradients(
    model, LOSS, images, draw_keys_of(num), draws=draws, augmentation=Augmentation(random_flip=True)
  )
  grads = np.float64(grads["linear"])
  both = (expected(image) + expected(image[::-1])) / 2
  # Examples are independent: five standard errors, of twelve means.
  errors = 5 * grads.std(axis=0, ddof=1) / np.sqrt(num)
  assert (abs(grads.mean(axis=0) - both) < errors).all()
  assert not (abs(grads.mean(axis=0) - expected(image)) < errors).all()


def test_groups_split_the_draws_of_an_example_in_order():
  key = stream(0, "test")
  together = jnp.concatenate([draw_keys(key, 3, first=3 * group) for group in (0, 1)])
  data = jax.random.key_data
  np.testing.assert_array_equal(data(together), data(draw_keys(key, 6)))
