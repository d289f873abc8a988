"""Per-example gradients from tapped layers against plain differentiation, one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.measurements import LOSS, measurement_named
from jaxinf.diffusion.noise import DrawDesign
from jaxinf.diffusion.schedule import Schedule
from jaxinf.layers.coverage import Selection
from jaxinf.layers.per_example import checked_draws, example_gradients, group_keys
from jaxinf.layers.register import register
from jaxinf.layers.specs import to_matrices
from tests import nets
from tests.diffusion.measured import NAMES, random_examples

NUM, DRAWS = 3, 4


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("draws", [1, 4, 16])
def test_few_images_of_many_draws_have_the_gradients_of_many_of_few(num, draws):
  """Up to two images of 16 draws are batches of their own; others share a backward pass."""
  task = nets.conv_task()
  model = register(task.apply_fn, task.params, (4, 4, 1), Selection())
  images = jnp.asarray(nets.random_images(5))
  keys = fold_in_each(stream(0, "test"), jnp.arange(5))
  keys = group_keys(keys, jnp.zeros(5, jnp.int32), draws)
  kernel = lambda images, keys: example_gradients(
    model, LOSS, task.schedule, task.params, images=images, keys=keys
  )
  together, few = jax.jit(kernel)(images, keys), jax.jit(kernel)(images[:num], keys[:num])
  for layer, expected in together.items():
    # The same float32 sums in another order.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(few[layer], expected[:num], rtol=0, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_tapped_gradients_equal_a_loop_over_examples(name):
  task, measurement = nets.conv_task(), measurement_named(name)
  model = register(task.apply_fn, task.params, (4, 4, 1), Selection())
  images = jnp.asarray(random_examples(measurement, NUM, task.schedule.num_steps))
  keys = fold_in_each(stream(0, "test"), jnp.arange(NUM))
  keys = group_keys(keys, jnp.zeros(NUM, jnp.int32), DRAWS)
  kernel = lambda params: example_gradients(
    model, measurement, task.schedule, params, images=images, keys=keys
  )
  tapped = jax.jit(kernel)(task.params)

  def value(params, image, keys):
    return measurement.evaluate(task.apply_fn, params, task.schedule, image[None], keys[None])[0]

  gradient = jax.jit(jax.grad(value))
  for n in range(NUM):
    grads = jax.tree.map(np.asarray, gradient(task.params, images[n], keys[n]))
    for layer, expected in to_matrices(model.layers, grads).items():
      # The same float32 sums in another order.
      atol = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(tapped[layer][n], expected, rtol=0, atol=atol)


def test_conditional_gradients_equal_a_loop_over_examples():
  task = nets.conditional_task()
  images, labels = jnp.asarray(nets.random_images(NUM)), jnp.array([2, 0, 1])
  model = register(task.apply_fn, task.params, (4, 4, 1), Selection(), conditioning=labels)
  keys = fold_in_each(stream(0, "test"), jnp.arange(NUM))
  keys = group_keys(keys, jnp.zeros(NUM, jnp.int32), DRAWS)
  kernel = lambda params: example_gradients(
    model, LOSS, task.schedule, params, images=images, keys=keys, conditioning=labels
  )
  tapped = jax.jit(kernel)(task.params)

  def value(params, image, keys, label):
    apply_fn = lambda params, x_t, t: task.apply_fn(params, x_t, t, jnp.full(len(x_t), label))
    return LOSS.evaluate(apply_fn, params, task.schedule, image[None], keys[None])[0]

  gradient = jax.jit(jax.grad(value))
  for n in range(NUM):
    grads = jax.tree.map(np.asarray, gradient(task.params, images[n], keys[n], labels[n]))
    for layer, expected in to_matrices(model.layers, grads).items():
      # The same float32 sums in another order.
      atol = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(tapped[layer][n], expected, rtol=0, atol=atol)


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
  model = register(apply_fn, params, shape, Selection())

  def expected(x):
    total = np.zeros((3, 4))
    for signal, noise in zip(np.float64(schedule.signal), np.float64(schedule.noise), strict=True):
      second = np.outer(signal * x, signal * x) + noise**2 * np.eye(3)
      total[:, :3] += matrix @ second + np.outer(bias, signal * x) - noise * np.eye(3)
      total[:, 3] += matrix @ (signal * x) + bias
    return 2 / 3 * total / 5

  design = DrawDesign(antithetic=antithetic, shared=False, random_flip=True)
  keys = fold_in_each(stream(0, "test"), jnp.arange(num))
  kernel = lambda images, keys: example_gradients(
    model, LOSS, schedule, params, images=images, keys=keys, design=design
  )
  images = jnp.broadcast_to(jnp.asarray(image, jnp.float32).reshape(1, *shape), (num, *shape))
  grads = jax.jit(kernel)(images, group_keys(keys, jnp.zeros(num, jnp.int32), DRAWS))["linear"]
  both = (expected(image) + expected(image[::-1])) / 2
  grads = np.float64(grads)
  # Examples are independent: five standard errors, of twelve means.
  errors = 5 * grads.std(axis=0, ddof=1) / np.sqrt(num)
  assert (abs(grads.mean(axis=0) - both) < errors).all()
  assert not (abs(grads.mean(axis=0) - expected(image)) < errors).all()


def test_groups_split_the_draws_of_an_example_in_order():
  key = stream(0, "test")
  groups = group_keys(jnp.stack([key, key]), jnp.array([0, 1]), 3)
  together = jnp.concatenate([groups[0], groups[1]])
  data = jax.random.key_data
  np.testing.assert_array_equal(data(together), data(draw_keys(key, 6)))


@pytest.mark.parametrize(("draws", "groups"), [(5, 2), (4, 0), (0, 1)])
def test_draws_that_do_not_split_evenly_are_refused(draws, groups):
  with pytest.raises(ValueError, match="must divide draws"):
    checked_draws(draws, groups)
