"""Unlearning: which training images a model forgets when it is made to forget a sample.

For each query q a copy θ' of the model is fine-tuned away from it, while the training set holds it:

  θ' minimises  mean over n of ℓ(x_n, θ') − λ · mean over draws of min(ℓ(q, θ'), L₀),

by Adam, until the query's loss has come to 95 % of L₀, the loss of an untrained network: what is
forgotten need not be forgotten further. The score of training example n is how far its own loss has
risen with it, under the same draws of (t, ε) for all,

  scores[q, n] = mean over draws of (ℓ'_n − ℓ_n) / (ℓ'_n + ℓ_n),  in [−1, 1];

positive: n supports q. Nothing but losses of the network is needed, of which no layer has to be
known: it works for any model, also where a curvature covers too few of its parameters. It costs a
fine-tuning for each query, and forward passes over the training examples.

Reference: Serrà et al. 2026 (arXiv:2605.17938), whose settings are the defaults.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinf.attribution.features import partial_of
from jaxinf.attribution.kernels import TRAIN, Replicate, row_operands
from jaxinf.core.arrays import blocks, read_rows
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.core.types import ApplyFn, Array, Batch, Params, PyTree
from jaxinf.diffusion.measurements import LOSS
from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.noise import Noised, draw_noised, draw_noisiest_times, losses, noised, predict
from jaxinf.diffusion.process import Process
from jaxinf.engine import processes, rehearsal
from jaxinf.engine.compute import Compute
from jaxinf.engine.devices import local_devices, replicate, shard
from jaxinf.engine.kernels import compiled, numerics
from jaxinf.engine.maps import stream_batches
from jaxinf.engine.progress import Progress
from jaxinf.engine.worklist import Rows
from jaxinf.layers.specs import leaf_names
from jaxinf.networks.training import Batches, TrainRows
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

_LOG = logging.getLogger("jaxinf")

# Kept as they are unless `weights` says otherwise: attention, embeddings, biases and norms.
FROZEN = r"(?i)att(entio)?n|embed|bias|norm"

_DRAWS = Draws(100)
_AT_ONCE = 8  # queries whose copies are fine-tuned together, where Compute does not say
_LOOK = 5  # steps between two looks at which queries are forgotten
_LOOK_DRAWS = 256  # of (t, ε) in a look: the noise of fewer would stop some copies early
_TIMES = 1000  # of a continuous process, in the mean over t
_TINY = 1e-30  # a sum of losses that is zero


@dataclasses.dataclass(frozen=True)
class Unlearning:
  """Unlearning as a method.

  Attributes:
    model: that is attributed; any apply_fn will do.
    learning_rate: of Adam; published: that of training ÷ 10.
    strength: λ > 0.
    goal: share of L₀ that the query's loss is to reach.
    untrained_loss: L₀; None: the loss of an output of zeros, which is what a network gives whose
      last layer starts at zero. See `zero_output_loss`.
    max_steps: of fine-tuning a copy, after which it is taken as it is. The log says how many were.
    batch_size: training examples in a step, and draws of (t, ε) for the query.
    weights: regular expressions on the paths of the parameters that are fine-tuned; None: all
      arrays of two and more axes, but those of attention, embeddings, biases and norms.
    noisiest: share of the times, the noisiest, at which losses of training examples are compared.

  Raises:
    ValueError: a setting is out of range, or no parameter is left to fine-tune.
  """

  model: DiffusionModel
  learning_rate: float
  strength: float = 0.2
  goal: float = 0.95
  untrained_loss: float | None = None
  max_steps: int = 500
  batch_size: int = 64
  weights: tuple[str, ...] | None = None
  noisiest: float = 0.7

  def __post_init__(self):
    if self.weights is not None:
      object.__setattr__(self, "weights", tuple(self.weights))
    checked_count(self.max_steps, "max_steps")
    checked_count(self.batch_size, "batch_size")
    for name in ("learning_rate", "strength", "goal", "untrained_loss", "noisiest"):
      value = getattr(self, name)
      if value is not None and not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite; got {value}.")
    if self.noisiest > 1:
      raise ValueError(f"noisiest is a share of the times, in (0, 1]; got {self.noisiest}.")
    _are_chosen(self.model.params, self.weights)

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = _DRAWS,
    compute: Compute = Compute(),
  ) -> Sweep:
    """One set of scores; there is nothing to damp.

    Args:
      queries: what is to be explained; also samples that no training example equals.
      train: the training examples, which fine-tuning goes on with as training had them.
      draws: of (t, ε) for each training example, of the noisiest times. Shared ones, the default,
        are common to all images; replicates of them give the standard errors, which know nothing
        of the noise of fine-tuning. The seed is that of fine-tuning too.
      compute: batch_size, (example, draw) pairs at a time over all devices, each by every copy;
        query_chunk, copies that are fine-tuned and compared at once (None: 8), each with its
        parameters and two moments of Adam on a device; the devices; and checkpoint, which keeps
        the scores of a chunk when they are there.

    Raises:
      ValueError: the arguments don't fit together, a query's loss is at the goal already, or
        fine-tuning diverges.
    """
    check_alike(queries, train)
    self.model.check_inputs(train.shape, train.conditioning)
    if draws.stop is not None:
      raise ValueError("Unlearning takes a fixed number of draws: Draws(num).")
    draws = draws.split()
    untrained = self.untrained_loss
    if untrained is None:
      untrained = zero_output_loss(self.model.process, train)
    forgetting = Forgetting(self, queries, train, draws, compute, float(untrained))
    partial = partial_of(
      compute, "unlearning", forgetting.settings, self.model, queries=queries, train=train
    )
    begin, end = processes.share(len(queries))
    found = [] if partial is None else partial.load()
    for rows in _chunks_of(begin + sum(map(len, found)), end, forgetting.at_once):
      found.append(forgetting.scores_of(rows))
      if partial is not None:
        partial.save(found[-1:])
    none = np.zeros((0, draws.replicates or 1, len(train)), np.float32)
    values = processes.gathered(np.concatenate([none, *found]), len(queries)).transpose(1, 0, 2)
    return Sweep((Scores(values, queries.ids, train.ids, forgetting.settings, None, train.groups),))


@numerics()
def zero_output_loss(process: Process, train: Examples) -> float:
  """The loss of a network that puts out zeros: E over t of w_t (c_t² + d_t² · mean square of data).

  The mean square is over all elements of all training examples: of latents, over their posterior.
  """
  num = process.num_steps or _TIMES
  t = process.times((jnp.arange(num, dtype=jnp.float32) + 0.5) / num)
  one, zero = jnp.ones(num), jnp.zeros(num)
  of_noise, of_data = process.target(zero, one, t), process.target(one, zero, t)
  expected = jnp.square(of_noise) + jnp.square(of_data) * _mean_square(train)
  return float(jnp.mean(process.weights(t) * expected))


def _mean_square(train: Examples) -> float:
  total, form = 0.0, train.latents
  for block in blocks(train.data):
    values = block.astype(np.float64)
    if form is not None:
      mean, logvar = np.split(values, 2, axis=-1)
      spread = np.exp(logvar) if form.sample else 0.0
      squares = form.scaling_factor**2 * (np.square(mean - form.shift_factor) + spread)
    else:
      squares = np.square(values / 127.5 - 1 if block.dtype == np.uint8 else values)
    total += float(squares.reshape(len(block), -1).mean(axis=1).sum())
  return total / len(train)


def chosen_weights(params: Params, patterns: Sequence[str] | None) -> PyTree:
  """The parameters that are fine-tuned, in float32, with None in the place of the others."""
  leaves, structure = jax.tree.flatten(params)
  pairs = zip(leaves, _are_chosen(params, patterns), strict=True)
  chosen = [np.asarray(leaf).astype(np.float32) if kept else None for leaf, kept in pairs]
  return jax.tree.unflatten(structure, chosen)


def _are_chosen(params: Params, patterns: Sequence[str] | None) -> list[bool]:
  """Which leaves of the parameters are fine-tuned.

  Raises:
    ValueError: an expression finds no parameter, or there are none to fine-tune.
  """
  names = leaf_names(params)
  paths = f"paths such as {', '.join(map(repr, names[:3]))}"
  if patterns is None:
    leaves = jax.tree.leaves(params)
    pairs = zip(names, leaves, strict=True)
    found = [leaf.ndim >= 2 and not re.search(FROZEN, name) for name, leaf in pairs]
    if not any(found):
      raise ValueError(
        "No parameter is left to fine-tune: all are vectors, or of attention, embeddings, biases "
        f"or norms by their {paths}. Name some by regular expressions in weights."
      )
    return found
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ValueError(
        f"weights: {pattern!r} finds no parameter. Expressions are searched for in {paths}."
      )
  if not patterns:
    raise ValueError("weights must name a parameter to fine-tune, or be None for the default.")
  return [any(re.search(pattern, name) for pattern in patterns) for name in names]


def with_weights(params: Params, weights: PyTree) -> Params:
  """The parameters with the fine-tuned ones in their places, in their own types."""
  put = lambda weight, own: own if weight is None else weight.astype(own.dtype)
  return jax.tree.map(put, weights, params, is_leaf=lambda x: x is None)


def _chunks_of(begin: int, end: int, size: int) -> list[np.ndarray]:
  """The numbers begin … end − 1, at most `size` at a time."""
  return [np.arange(i, min(i + size, end)) for i in range(begin, end, size)]


@dataclasses.dataclass(frozen=True)
class Forgetting:
  """One call of `Unlearning.scores`.

  Attributes:
    untrained: L₀.
    The others are its arguments.
  """

  method: Unlearning
  queries: Examples
  train: Examples
  draws: Draws
  compute: Compute
  untrained: float

  @property
  def devices(self) -> list[jax.Device]:
    return local_devices(self.compute.devices)

  @property
  def at_once(self) -> int:
    """Queries of a chunk: as many on each device."""
    num = min(self.compute.query_chunk or _AT_ONCE, len(self.queries))
    return math.ceil(num / len(self.devices)) * len(self.devices)

  @property
  def settings(self) -> dict[str, Any]:
    """What the scores are computed with, as JSON."""
    fields = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
    return {
      "method": "unlearning",
      "process": self.method.model.process.settings,
      "draws": self.draws.num,
      "replicates": self.draws.replicates,
      "seed": self.draws.seed,
      "design": self.draws.design,
      **self.train.augmentation.settings,
      **{name: value for name, value in fields.items() if name != "model"},
      "untrained_loss": self.untrained,
    }

  def scores_of(self, rows: np.ndarray) -> np.ndarray:
    """[n, G, N] scores of the queries with these numbers."""
    weights = self.unlearned(rows)
    model, train = self.method.model, self.train
    params, origin = row_operands(model.params, self.draws, TRAIN)
    replicated = Replicate.of(self.draws, train.augmentation)
    each = Rows.of(train, self.draws.replicates)
    stream = stream_batches(
      RiseKernel(model.apply_fn, model.process, replicated, self.method.noisiest),
      (params, weights, origin),
      each,
      batch_size=self.compute.rows(self.draws),
      label="losses after unlearning",
      unit="(example, replicate) rows",
      devices=self.devices,
      span=(0, len(each)),
    )
    # A pass knows of the training examples in full, and not that there are more chunks of queries.
    times = [rehearsal.in_full(len(x), len(x)) / len(x) for x in (train, self.queries)]
    with rehearsal.part(times[0] * (times[1] - 1)):
      found = list(stream)
    values = np.concatenate(found).reshape(len(train), -1, self.at_once)
    if not np.isfinite(values).all():
      raise ValueError(
        "Some losses are not finite after unlearning: lower the learning rate, "
        f"{self.method.learning_rate:g}."
      )
    return values.transpose(2, 1, 0)[: len(rows)]

  def unlearned(self, rows: np.ndarray) -> PyTree:
    """The fine-tuned weights [at_once, …] of the queries with these numbers; the last repeats."""
    padded = np.append(rows, np.repeat(rows[-1:], self.at_once - len(rows)))
    state = self._fine_tuned(padded)
    steps, reached = (x.reshape(-1)[: len(rows)] for x in (state.steps, state.reached))
    if (steps == 0).any() and not rehearsal.under_way():
      ids = ", ".join(repr(i) for i in self.queries.ids[rows[steps == 0]].tolist()[:3])
      raise ValueError(
        f"The loss of query {ids} is {self.method.goal:.0%} of the untrained loss, "
        f"{self.untrained:.3g}, before anything is unlearned: the model does not know it. Leave it "
        "out, or give untrained_loss."
      )
    _LOG.info(
      "unlearning: %d of %d queries came to %.0f %% of the untrained loss %.3g; %d … %d steps",
      reached.sum(), len(rows), 100 * self.method.goal, self.untrained, steps.min(), steps.max(),
    )  # fmt: skip
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state.weights)

  def _fine_tuned(self, rows: np.ndarray) -> "UnlearningState":
    """The last states [devices, n, …] of the queries with these numbers."""
    method, devices = self.method, self.devices
    step_fn = compiled(UnlearningStep.of(method, self.train.augmentation), tuple(devices))
    shared = method.model.params, np.uint32(self.draws.seed), np.float32(self.untrained)
    shared = replicate(shared, devices)
    queries = read_rows(self.queries.data, rows), self.queries.conditioning
    queries = queries[0], jax.tree.map(lambda x: read_rows(x, rows), queries[1])
    own = shard(queries, devices)
    state = shard(_first_state(method, len(rows)), devices)
    batches = Batches(len(self.train), method.batch_size, self.draws.seed)
    trial = rehearsal.trial("unlearning", len(self.queries), method.max_steps)
    label, before = processes.label("unlearning"), 0
    with Progress(label, method.max_steps, "steps") as progress:
      for step in trial.few(range(method.max_steps)):
        given = replicate((batches.rows(self.train, step), np.int32(step)), devices)
        state = step_fn((*shared, own, state), given)
        if (step + 1) % _LOOK == 0:
          share = float(np.mean(np.asarray(state.reached)))
          trial.done(step + 1 - before, batches=step + 1 - before)
          before = step + 1
          progress.advance_to(step + 1, f"{share:.0%} forgotten")
          if share == 1 and not rehearsal.under_way():
            break
    return jax.tree.map(np.asarray, state)


@flax.struct.dataclass
class UnlearningState:
  """Of one copy of the model, or of several with a leading axis."""

  weights: PyTree  # that are fine-tuned; None in the place of the others
  opt_state: optax.OptState
  steps: Array  # [] int32, updates made
  reached: Array  # [] whether the query's loss came to the goal, after which nothing changes


def _first_state(method: Unlearning, num: int) -> UnlearningState:
  """The state [num, …] of as many copies before the first step, on the host."""
  weights = chosen_weights(method.model.params, method.weights)
  opt_state = optax.adam(method.learning_rate).init(weights)
  one = UnlearningState(weights, opt_state, np.int32(0), np.bool_(False))
  return jax.tree.map(lambda x: np.broadcast_to(x, (num, *np.shape(x))), one)


class _Shared(NamedTuple):
  """What the copies of a step have in common."""

  params: Params
  pairs: Noised  # of the training examples
  keys: jax.Array  # [1, S] of the draws of each query
  untrained: jax.Array
  looks: jax.Array  # [] whether the queries' losses are to be compared with the goal
  look_keys: jax.Array  # [1, _LOOK_DRAWS] of the draws for that


@dataclasses.dataclass(frozen=True)
class UnlearningStep:
  """One step of several copies of the model.

  ((params, seed, L₀, (queries [V, …], their conditioning), state [V, …]), (rows of the training
  batch, number of the step)) → the state after it. Copies share the training batch, its draws, and
  the draws of (t, ε) of their queries.
  """

  apply_fn: ApplyFn
  process: Process
  augmentation: Augmentation
  num_draws: int
  learning_rate: float
  strength: float
  goal: float

  @classmethod
  def of(cls, method: Unlearning, augmentation: Augmentation) -> "UnlearningStep":
    """The step of a method on training examples so augmented."""
    return cls(
      method.model.apply_fn,
      method.model.process,
      augmentation,
      method.batch_size,
      method.learning_rate,
      method.strength,
      method.goal,
    )

  def __call__(self, operands: PyTree, given: tuple[TrainRows, Array]) -> UnlearningState:
    params, seed, untrained, queries, state = operands
    rows, step = given
    key_of = lambda name: jax.random.fold_in(stream(seed, name), step)
    keys = fold_in_each(key_of("unlearning train"), rows.places)
    pairs = noised(self.process, rows.data, keys, self.augmentation)
    pairs = pairs._replace(conditioning=self.augmentation.conditioning(rows.conditioning, keys))
    query_keys = draw_keys(key_of("unlearning query"), self.num_draws)[None]
    look_keys = draw_keys(stream(seed, "unlearning goal"), _LOOK_DRAWS)[None]
    shared = _Shared(params, pairs, query_keys, untrained, step % _LOOK == 0, look_keys)
    return jax.vmap(lambda query, state: self._stepped(shared, query, state))(queries, state)

  def _stepped(self, shared: _Shared, query: PyTree, state: UnlearningState) -> UnlearningState:
    """The state of one copy after the step; the same where its query's loss is at the goal."""
    own = self._query_pairs(query, shared.keys)
    # One call of the network for both.
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), shared.pairs, own)

    def objective(weights: PyTree) -> jax.Array:
      each = self._losses(shared, weights, both)
      of_train, of_query = each[: -self.num_draws], each[-self.num_draws :]
      return of_train.mean() - self.strength * jnp.minimum(of_query, shared.untrained).mean()

    def is_forgotten() -> jax.Array:
      loss = self._losses(shared, state.weights, self._query_pairs(query, shared.look_keys)).mean()
      return loss >= self.goal * shared.untrained

    reached = state.reached | jax.lax.cond(shared.looks, is_forgotten, lambda: jnp.array(False))
    grads = jax.grad(objective)(state.weights)
    updates, opt_state = optax.adam(self.learning_rate).update(grads, state.opt_state)
    weights = optax.apply_updates(state.weights, updates)
    after = UnlearningState(weights, opt_state, state.steps + 1, reached)
    kept = jax.tree.map(lambda new, old: jnp.where(reached, old, new), after, state)
    return kept.replace(reached=reached)

  def _query_pairs(self, query: PyTree, keys: jax.Array) -> Noised:
    """The pairs of one query and keys [1, S]."""
    data, given = jax.tree.map(lambda x: x[None], query)
    return LOSS.pairs(self.process, data, keys, given, Draws(keys.shape[1], 1))

  def _losses(self, shared: _Shared, weights: PyTree, pairs: Noised) -> jax.Array:
    return losses(predict(self.apply_fn, with_weights(shared.params, weights), pairs), pairs)


@dataclasses.dataclass(frozen=True)
class RiseKernel:
  """(params, weights [V, …], origin), rows → [B, V] means over draws of (ℓ' − ℓ) / (ℓ' + ℓ)."""

  apply_fn: ApplyFn
  process: Process
  replicate: Replicate
  noisiest: float

  def __call__(self, operands: PyTree, batch: Batch) -> jax.Array:
    params, weights, origin = operands
    keys = self.replicate.keys(origin, batch)
    at_noisiest = functools.partial(_draw_noisiest, share=self.noisiest)
    measurement = dataclasses.replace(LOSS, draw=at_noisiest, name="loss at the noisiest times")
    pairs = measurement.pairs(
      self.process,
      batch.data,
      keys,
      batch.conditioning,
      self.replicate.draws,
      self.replicate.augmentation,
    )
    loss_of = lambda params: losses(predict(self.apply_fn, params, pairs), pairs)
    before = loss_of(params)
    after = jax.vmap(lambda own: loss_of(with_weights(params, own)))(weights)
    rise = (after - before) / jnp.maximum(after + before, _TINY)
    return rise.reshape(len(rise), *keys.shape).mean(axis=2).T


def _draw_noisiest(
  process: Process,
  data: jax.Array,
  keys: jax.Array,
  draws: Draws,
  augmentation: Augmentation,
  *,
  share: float,
) -> Noised:
  """The pairs of `draw_pairs`, at the noisiest times alone."""
  data = jnp.repeat(data, keys.shape[1], axis=0)
  t = draw_noisiest_times(process, keys, draws, share)
  return draw_noised(process, data, t, keys, draws, augmentation)
