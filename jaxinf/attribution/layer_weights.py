"""Weights of layers that need no retraining: learnt from scores alone, or by their spreads.

Scores of layers say different things about an example, and their plain sum need not be the best of
them. Li et al. (ICLR 2026, arXiv:2506.05647) learn weights without labels: where a sum of layers
tells few training examples from the many, it is taken to have more signal. With w ≥ 0 and
s_q = Σ_l w_l s_lq [N], maximise over w

  mean over queries of  (mean of the k largest of s_q) / (root mean square of s_q),

which no factor of w changes. `LayerWeighted` is a method of attribution made of this.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinf.attribution.influence import AUTO, Influence
from jaxinf.compression.compression import Compression
from jaxinf.core.checks import checked_count, checked_seed
from jaxinf.core.damping import Damping
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples
from jaxinf.core.random import stream
from jaxinf.core.registry import named
from jaxinf.core.types import PyTree
from jaxinf.curvature.curvature import Curvature
from jaxinf.diffusion.measurements import Measurement
from jaxinf.engine.compute import Compute
from jaxinf.engine.kernels import numerics
from jaxinf.scores.layer_scores import LayerScores
from jaxinf.scores.sweep import Sweep

_LOG = logging.getLogger("jaxinf")

_ADAM = optax.adam(0.05)  # on logits: weights change by some 5 % a step
_BLOCK = 50  # steps between two looks at the objective
_TINY = 1e-30  # in the root mean square, for queries whose scores are all zero


def layer_scores(
  curvature: Curvature,
  *,
  queries: Examples,
  train: Examples,
  damping: Damping,
  draws: Draws = Draws(),
  query_draws: Draws | None = None,
  measurement: str | Measurement = "loss",
  compression: str | Compression | None = AUTO,
  precision: str | None = None,
  compute: Compute = Compute(),
) -> LayerScores:
  """`influence` without the sum over layers, from one pass over the training gradients.

  Memory on the host is that of L times the scores, L · Q · N · replicates numbers.

  Args: as of `influence`, and so are the errors.

  Returns:
    LayerScores with values [L, Q, N], whose `.sum()` is what `influence` returns.
  """
  method = Influence(curvature, (damping,), measurement, compression, precision, query_draws)
  return method.by_layer(queries=queries, train=train, draws=draws, compute=compute)[0]


@dataclasses.dataclass(frozen=True)
class LayerWeights:
  """What was learnt about layers; see `learn_layer_weights`.

  Attributes:
    values: [L] weights > 0 of mean 1.
    layers: names of the L layers.
    objective: mean over queries of the mean of the k largest scores, in root mean squares.
    objective_of_sum: the same of equal weights.
    objectives: of each start.
    num_steps: that were taken.
    converged: whether the last steps gained less than the tolerance, from every start.
  """

  values: np.ndarray
  layers: tuple[str, ...]
  objective: float
  objective_of_sum: float
  objectives: tuple[float, ...]
  num_steps: int
  converged: bool


def learn_layer_weights(
  scores: LayerScores,
  *,
  top_k: int = 50,
  num_starts: int = 4,
  most_steps: int = 2000,
  tolerance: float = 1e-4,
  seed: int = 0,
) -> LayerWeights:
  """Weights of layers under which the k highest scores of a query stand out most.

  The objective has several maxima. Adam goes up from the plain sum, from `balanced_weights`, and
  from others at random around these; the best of all is taken. Weights are a softmax, so that none
  is zero; a layer that does not help comes near it.

  Args:
    scores: of layers.
    top_k: k; at most half of the training examples count.
    num_starts: from which it goes up, the first two of which are not random.
    most_steps: of Adam.
    tolerance: gain of 50 steps, as a share of the objective, below which it has converged.
    seed: of the random starts, in [0, 2³²).

  Raises:
    ValueError: an argument is out of range, or the scores are all equal, or not finite.
  """
  num_starts = checked_count(num_starts, "num_starts")
  most_steps = checked_count(most_steps, "most_steps")
  if not tolerance > 0:
    raise ValueError(f"tolerance must be positive; got {tolerance}.")
  k = min(checked_count(top_k, "top_k"), max(1, len(scores.train_ids) // 2))
  spreads = _checked_spreads(scores)
  values = (scores.values / spreads.max()).astype(np.float32)
  starts = _starts(spreads, num_starts, checked_seed(seed))

  best, best_at = np.array(_objectives(values, starts, top_k=k)), starts
  of_sum, steps, converged = float(best[0]), 0, False
  with numerics():
    states = starts, jax.vmap(_ADAM.init)(starts)
  while steps < most_steps and not converged:
    states, peaks, peaks_at = _climb(values, states, top_k=k)
    gained = np.array(peaks) - best
    best_at = np.where(gained[:, None] > 0, peaks_at, best_at)
    converged = bool((gained <= tolerance * np.abs(best)).all())
    best, steps = best + np.maximum(gained, 0), steps + _BLOCK
  found = int(np.argmax(best))
  weights = np.exp(best_at[found].astype(np.float64) - best_at[found].max())
  _LOG.info(
    "layer weights: the top %d stand at %.3f root mean squares, %.3f in the plain sum%s",
    k,
    best[found],
    of_sum,
    "" if converged else f"; not converged after {steps} steps",
  )
  return LayerWeights(
    weights / weights.mean(),
    scores.layers,
    float(best[found]),
    of_sum,
    tuple(best.tolist()),
    steps,
    converged,
  )


def balanced_weights(scores: LayerScores) -> np.ndarray:
  """[L] weights of mean 1 under which all layers' scores have one spread; see `.spreads`.

  A layer whose scores are all equal has weight 0.
  """
  spreads = _checked_spreads(scores)
  weights = np.divide(1, spreads, out=np.zeros_like(spreads), where=spreads > 0)
  return weights / weights.mean()


@dataclasses.dataclass(frozen=True)
class LayerWeighted:
  """Influence with weighted layers as a method: one of LAYER_WEIGHTS, found at each damping anew.

  Attributes:
    influence: what is weighted.
    weights: name of the weights.
  """

  influence: Influence
  weights: str = "learnt"

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """Scores at every damping; settings["layer_weights"] has the weights."""
    weigh = named(LAYER_WEIGHTS, self.weights, "kind of layer weights")
    both = dict(queries=queries, train=train)
    found = self.influence.by_layer(**both, draws=draws, compute=compute)
    weighted = [of_layers.weighted(weigh(of_layers)) for of_layers in found]
    name = {"method": f"layer-{self.weights}"}
    return Sweep(dataclasses.replace(s, settings={**s.settings, **name}) for s in weighted)


def _objective(values: jax.Array, logits: jax.Array, top_k: int) -> jax.Array:
  """The module's objective of scores [L, Q, N] at w = softmax(logits [L]): a number."""
  scores = jnp.tensordot(jax.nn.softmax(logits), values, 1, precision="highest")
  best = jax.lax.top_k(scores, top_k)[0].mean(axis=-1)
  # Squares of small numbers vanish in float32, and no factor of a query's scores matters.
  size = jax.lax.stop_gradient(jnp.max(jnp.abs(scores), axis=-1)) + _TINY
  squares = jnp.mean(jnp.square(scores / size[:, None]), axis=-1)
  return jnp.mean(best / size / jnp.sqrt(squares + _TINY))


@numerics()
@functools.partial(jax.jit, static_argnames="top_k")
def _objectives(values: jax.Array, logits: jax.Array, top_k: int) -> jax.Array:
  """[S] objectives of logits [S, L]."""
  return jax.lax.map(lambda each: _objective(values, each, top_k), logits)


@numerics()
@functools.partial(jax.jit, static_argnames="top_k")
def _climb(values: jax.Array, states: PyTree, top_k: int) -> tuple[PyTree, jax.Array, jax.Array]:
  """A block of steps of Adam from each of S states.

  Starts follow one another, so that memory holds the scores of one.

  Returns:
    The states after it; the highest objectives [S] on the way, and the logits [S, L] there.
  """
  gradient = jax.value_and_grad(lambda logits: _objective(values, logits, top_k))

  def step(carry, _):
    (logits, adam), peak, peak_at = carry
    height, slope = gradient(logits)
    peak_at = jnp.where(height > peak, logits, peak_at)
    updates, adam = _ADAM.update(-slope, adam)
    state = optax.apply_updates(logits, updates), adam
    return (state, jnp.maximum(peak, height), peak_at), None

  def block(state):
    return jax.lax.scan(step, (state, jnp.float32(-jnp.inf), state[0]), length=_BLOCK)[0]

  return jax.lax.map(block, states)


def _starts(spreads: np.ndarray, num: int, seed: int) -> np.ndarray:
  """[S, L] float32 logits to start from: equal, balanced, and N(0, 1) around either by turns."""
  differs = spreads > 0  # layers of equal scores have no part in the order, at any weight
  balanced = np.zeros(len(spreads))
  balanced[differs] = -np.log(spreads[differs]) + np.log(spreads[differs]).mean()
  fixed = np.stack([np.zeros(len(spreads)), balanced])
  with numerics():
    noise = jax.random.normal(stream(seed, "layer_weights"), (num, len(spreads)))
  around = np.asarray(noise, np.float64) * (np.arange(num) >= len(fixed))[:, None]
  return (fixed[np.arange(num) % len(fixed)] + around).astype(np.float32)


def _checked_spreads(scores: LayerScores) -> np.ndarray:
  """[L] spreads; ValueError where there are none."""
  spreads = scores.spreads
  if not np.isfinite(spreads).all() or not spreads.max() > 0:
    raise ValueError(
      "Layers are weighted by how their scores differ between training examples: these are not "
      f"finite, or all equal (spreads {spreads.tolist()[:3]}, …). Give more training examples."
    )
  return spreads


Weigh = Callable[[LayerScores], np.ndarray | Sequence[float]]

LAYER_WEIGHTS: Mapping[str, Weigh] = {
  "learnt": lambda scores: learn_layer_weights(scores).values,
  "balanced": balanced_weights,
}
