"""A step of training, backwards: from derivatives after it to those before it.

The two halves of a step (see training.py) are taken apart: the update of a state by a gradient is
pulled back as it is, and the gradient by a product with the Hessian of the loss, which is symmetric
and therefore a forward-mode derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxinf.core.arrays import is_floating
from jaxinf.core.augmentation import PLAIN, Augmentation
from jaxinf.core.types import Array
from jaxinf.diffusion.process import Process
from jaxinf.networks.training import (
  TrainConfig,
  TrainState,
  learning_rate,
  step_losses,
  step_update,
)


def backward_step(
  network: nn.Module,
  process: Process,
  config: TrainConfig,
  *,
  augmentation: Augmentation = PLAIN,
  seed: int,
) -> Callable[[list[Array], TrainState, Any], tuple[list[Array], jax.Array]]:
  """One step backwards: backward(λ_{t+1}, s_t, rows) → (λ_t, ∂m/∂w of the rows [Q, B]).

  λ are lists of arrays [Q, …], one for each floating-point leaf of the state in its order. The
  product with the Hessian and all ⟨μ, ∇ℓ_b⟩ are one forward-mode derivative, of (Σ ∇ℓ_b, ℓ_b).
  """
  losses_of = step_losses(network, process, augmentation=augmentation, seed=seed)
  update = step_update(smooth_optimiser(config), config)

  def backward(cotangents, state, rows):
    def total(params):
      each = losses_of(params, state.step, rows)
      return jnp.sum(each), each

    # TF32 or bfloat16, the default on accelerators, would be an approximation itself.
    with jax.default_matmul_precision("highest"):
      (grads, _), push = jax.linearize(jax.grad(total, has_aux=True), state.params)

    def after(floats, grads):
      count = jnp.ones((), jnp.float32) * len(rows.places)
      new, _ = update(with_floats(state, floats), (grads, jnp.zeros(()), count))
      return floats_of(new)

    _, pull = jax.vjp(after, floats_of(state), grads)

    def one(cotangents):
      before, toward = pull(cotangents)
      products, slopes = push(toward)
      # The parameters are a state's first leaves of numbers.
      products = jax.tree.leaves(products)
      first, rest = before[: len(products)], before[len(products) :]
      return [*map(jnp.add, first, products), *rest], slopes

    with jax.default_matmul_precision("highest"):
      return jax.vmap(one)(cotangents)

  return backward


def smooth_optimiser(config: TrainConfig) -> optax.GradientTransformation:
  """The updates and states of `training.optimiser`, with derivatives where these have none."""
  adamw = optax.chain(
    _smooth_adam(),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(learning_rate(config)),
  )
  return optax.chain(_smooth_clip(config.clip_norm), adamw)


def _smooth_clip(norm: float) -> optax.GradientTransformation:
  """clip_by_global_norm, which is the identity at a gradient of zero."""
  inner = optax.clip_by_global_norm(norm)

  def update(grads, state, params=None):
    zero = jnp.all(jnp.array([jnp.all(g == 0) for g in jax.tree.leaves(grads)]))
    shown = jax.tree.map(lambda g: jnp.where(zero, jnp.ones_like(g), g), grads)
    clipped, state = inner.update(shown, state, params)
    return jax.tree.map(lambda g, c: jnp.where(zero, g, c), grads, clipped), state

  return optax.GradientTransformation(inner.init, update)


def _smooth_adam() -> optax.GradientTransformation:
  """scale_by_adam, whose √v at v = 0, where no gradient has come yet, has the derivative 0."""
  inner = optax.scale_by_adam()

  def update(grads, state, params=None):
    _, after = inner.update(grads, state, params)
    tiny = lambda v: jax.lax.stop_gradient(v) < jnp.finfo(v.dtype).tiny
    unmoved = jax.tree.map(tiny, after.nu)
    # Both branches of the choice must be differentiable: those elements are shown a moment of 1.
    shown = jax.tree.map(lambda u, v: jnp.where(u, jnp.ones_like(v), v), unmoved, state.nu)
    updates, after = inner.update(grads, state._replace(nu=shown), params)
    still = lambda tree: jax.tree.map(
      lambda u, x: jnp.where(u, jnp.zeros_like(x), x), unmoved, tree
    )
    return still(updates), after._replace(nu=still(after.nu))

  return optax.GradientTransformation(inner.init, update)


def floats_of(state: TrainState) -> list[Array]:
  """The floating-point leaves of a state, in order; what else it holds counts steps."""
  return [leaf for leaf in jax.tree.leaves(state) if is_floating(leaf.dtype)]


def with_floats(state: TrainState, floats: Sequence[Array]) -> TrainState:
  """The state with other floating-point leaves."""
  leaves, structure = jax.tree.flatten(state)
  given = iter(floats)
  return jax.tree.unflatten(
    structure, [next(given) if is_floating(leaf.dtype) else leaf for leaf in leaves]
  )
