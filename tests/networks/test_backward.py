"""Derivatives of a step's update; those of a whole training stand in evaluation/test_replay.py."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.networks import training
from jaxinf.networks.backward import smooth_optimiser
from jaxinf.networks.training import TrainConfig

CONFIG = TrainConfig(steps=6, learning_rate=1e-2, warmup_steps=0, clip_norm=1.0)


def pulled(transform, params, grads):
  """The second updates, after those by a third of these gradients, and the gradient of their sum.

  (The first are signs of gradients, whose derivatives are nothing but rounding.)
  """

  @jax.jit
  def both(params, grads):
    before = jax.tree.map(lambda g: -g / 3, grads)
    _, state = transform.update(before, transform.init(params), params)
    second = lambda g: transform.update(g, state, params)[0]
    updates, pull = jax.vjp(second, grads)
    return updates, pull(jax.tree.map(jnp.ones_like, updates))[0]

  return jax.tree.map(np.asarray, both(params, grads))


def test_an_unmoved_parameter_has_the_derivative_zero_and_others_have_their_own():
  """Of gradients of which some are zero, or of a square of zero: Optax's would be no numbers."""
  plain, smooth = (make(CONFIG) for make in (training.optimiser, smooth_optimiser))
  params = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([0.5])}
  grads = {"a": jnp.array([0.0, 0.7, 1e-30]), "b": jnp.array([-2.0])}  # longer than clip_norm
  one, other = (transform.init(params) for transform in (plain, smooth))
  assert jax.tree.structure(one) == jax.tree.structure(other)
  updates, slopes = pulled(smooth, params, grads)
  theirs, not_numbers = pulled(plain, params, grads)
  assert np.isnan(not_numbers["a"]).any()
  moving = lambda tree: {"a": tree["a"][1:2], "b": tree["b"]}
  _, expected = pulled(plain, moving(params), moving(grads))
  for name in params:  # float32 sums of a few terms
    np.testing.assert_allclose(updates[name], theirs[name], rtol=1e-6)
    np.testing.assert_allclose(moving(slopes)[name], expected[name], rtol=1e-4)
  np.testing.assert_allclose(slopes["a"][[0, 2]], 0, atol=1e-25)


def test_an_update_by_nothing_has_a_derivative():
  params = {"a": jnp.array([1.0, 2.0])}
  updates, slopes = pulled(smooth_optimiser(CONFIG), params, jax.tree.map(jnp.zeros_like, params))
  decay = -CONFIG.learning_rate * CONFIG.weight_decay * params["a"]
  np.testing.assert_allclose(updates["a"], decay, rtol=1e-6)
  np.testing.assert_array_equal(slopes["a"], 0)
