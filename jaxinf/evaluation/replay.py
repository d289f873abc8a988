"""Exact influence on one training run: its derivative, backwards through every step.

Each example has a weight w_n in the training loss, which was 1. A step takes the state s_t (the
parameters θ, their EMA, and Adam's moments) to

  s_{t+1} = U_t(s_t, g_t),   g_t = Σ_b w_{n(b)} ∇ℓ_b(θ_t),

where U_t divides by the batch size, clips, and does AdamW and the EMA. The examples n(b) of the
batch, their draws of (t, ε), flips and dropout follow from seed and step. For a measurement m of
the EMA parameters at the end, λ_T = ∂m/∂s_T, and from the last step to the first

  (λ_t, μ_t) = (∂U_t/∂s, ∂U_t/∂g)ᵀ λ_{t+1},
  λ_t^θ += ∇²(Σ_b ℓ_b) μ_t,   ∂m/∂w_{n(b)} += ⟨μ_t, ∇ℓ_b⟩,

all queries at once. (Hara, Nitanda & Maehara 2019 for SGD; Ilyas & Engstrom 2025, MAGIC.)

States are kept at the beginning of every segment of steps and made again within it, so that
√T + √T of them are in memory. There is no curvature and no damping: what remains is the
nonlinearity in the weights, and that it is one run, noise included. It is the referee of methods
that approximate it, and not of retraining with other seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinf import engine
from jaxinf.attribution.features import check_named
from jaxinf.attribution.kernels import QUERY, Replicate, row_operands
from jaxinf.core.arrays import fingerprint, is_floating
from jaxinf.core.augmentation import Augmentation
from jaxinf.core.checks import checked_count
from jaxinf.core.draws import Draws
from jaxinf.core.examples import Examples, check_alike
from jaxinf.core.types import ApplyFn, Array, Batch, Params, PyTree
from jaxinf.diffusion.measurements import Measurement, measurement_named
from jaxinf.diffusion.noise import predict
from jaxinf.diffusion.process import Process
from jaxinf.engine import processes
from jaxinf.engine.checkpoints import PartialSums
from jaxinf.engine.compute import Compute
from jaxinf.engine.progress import Progress
from jaxinf.networks import apply_fn_of
from jaxinf.networks.backward import backward_step, floats_of
from jaxinf.networks.training import Batches, TrainConfig, TrainState, init_state, train_step
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep

# ‖θ − θ'‖ / ‖θ'‖ of the replay's end from the trained model. With the same program on the same
# devices it is 0; rounding elsewhere grows over thousands of steps, and other data or seeds give
# something of the order of 1.
_FARTHEST = 0.1


@dataclasses.dataclass(frozen=True)
class ReplayTraining:
  """A training run as `training.fit` had it, which can be gone through again.

  Attributes:
    network: a module of jaxinf.networks.
    process: how examples are noised, what the network predicts, and the weights of its loss.
    config: settings of the optimisation.
    seed: of initialisation, batches, draws, flips and dropout.
    params: the EMA parameters that it ended with, which a replay must reach; None: not compared.
  """

  network: nn.Module
  process: Process
  config: TrainConfig
  seed: int
  params: Params | None = None


def replay_scores(
  training: ReplayTraining,
  *,
  queries: Examples,
  train: Examples,
  measurement: str | Measurement = "loss",
  query_draws: Draws = Draws(),
  segment: int | None = None,
  x64: bool = False,
  compute: Compute = Compute(),
) -> Scores:
  """scores[q, n] = −N · ∂m_q/∂w_n, exactly, of one training run.

  Σ scores[q, n] / N over removed examples is the predicted change of m_q where their weights are 0
  in the same batches, to first order, as of all scores.

  A parameter whose gradients have all been zero (less than the root of the smallest number) has a
  second moment of zero, where Adam's step has no derivative: it is taken to be zero, since no
  weight moves such a parameter. Of a clipped gradient that is zero, the norm likewise.

  Args:
    training: the run.
    queries: what is measured; states [Q, K, …] where the measurement is of trajectories.
    train: the training examples, all of them, in the order that training had.
    measurement: whose change is predicted, by name or as an object.
    query_draws: of (t, ε) for each query.
    segment: steps between two states that are kept; None: √T, which takes the least memory.
    x64: the same training in float64 throughout, from the same parameters, batches and draws. It
      ends where that of float32 does for a short time only: leave out the run's params where it is
      longer. Networks with dropout draw other masks.
    compute: batch_size, (query, draw) pairs at a time in the gradients of measurements; devices,
      which share the queries on the way back; query_chunk, queries there at a time (each takes four
      times the parameters); checkpoint, from which a killed computation goes on, by segment.

  Returns:
    Scores of one replicate, without standard errors: their noise is that of the query draws.

  Raises:
    ValueError: the arguments don't fit together, there are several processes, the replay ends
      elsewhere than the run did, or scores are not finite.
  """
  measured = measurement_named(measurement)
  measured.check(training.process)
  check_alike(queries, train, measured.axes)
  check_named(compute, measured)
  if processes.count() > 1:
    raise ValueError("A replay takes one process: start it alone.")
  asked, steps = query_draws.of_queries(query_draws), training.config.steps
  if segment is not None:
    checked_count(segment, "segment")
  loop = _Loop(training, train, compute, x64)
  start = loop.start()  # which checks the settings
  begins = range(0, steps, segment or math.isqrt(steps - 1) + 1)
  with Progress("replay, forwards", steps, "steps") as progress:
    kept = loop.states(start, steps, {*begins, steps}, progress)
  last = kept.pop(steps)
  distance = _distance(last.ema_params, training.params)
  settings = {
    "method": "replay",
    "process": training.process.settings,
    "measurement": measured.name or "custom",
    "steps": steps,
    "training_seed": training.seed,
    "query_draws": asked.num,
    "query_replicates": asked.replicates,
    "query_seed": asked.seed,
    "query_design": asked.design,
    **train.augmentation.settings,
    "precision": "float64" if x64 else "float32",
    "distance": distance,
  }
  gradients = loop.query_gradients(last.ema_params, queries, measured, asked)
  partial = _partial(compute, settings, last, queries, train)
  derivatives = _backwards(loop, kept, gradients, steps, compute, partial)
  values = -len(train) * derivatives
  if not np.isfinite(values).all():
    raise ValueError(
      "Some derivatives are not finite: training is too unstable to be differentiated in "
      "float32. Take x64=True, fewer steps or a lower learning rate."
    )
  single = values[None].astype(np.float32)
  return Scores(single, queries.ids, train.ids, settings, train_groups=train.groups)


@dataclasses.dataclass(frozen=True)
class Replay:
  """`replay_scores` as a method: see there for the fields."""

  training: ReplayTraining
  measurement: str | Measurement = "loss"
  query_draws: Draws | None = None
  segment: int | None = None
  x64: bool = False

  def scores(
    self,
    *,
    queries: Examples,
    train: Examples,
    draws: Draws = Draws(),
    compute: Compute = Compute(),
  ) -> Sweep:
    """One set of scores; the draws of training examples are those that training had."""
    found = replay_scores(
      self.training,
      queries=queries,
      train=train,
      measurement=self.measurement,
      query_draws=draws.of_queries(self.query_draws),
      segment=self.segment,
      x64=self.x64,
      compute=compute,
    )
    return Sweep((found,))


@dataclasses.dataclass(frozen=True)
class ParameterGradients:
  """Kernel from (query, replicate) rows to gradients of a measurement in all parameters [B, …].

  Its operands are those of `row_operands`. What is drawn is float32, whatever x64 is.
  """

  apply_fn: ApplyFn
  process: Process
  measurement: Measurement
  replicate: Replicate
  x64: bool = False

  def __call__(self, operands: PyTree, batch: Batch) -> PyTree:
    params, origin = operands
    with jax.enable_x64(False):
      keys = self.replicate.keys(origin, batch)
      pairs = self.measurement.pairs(
        self.process, batch.data, keys, batch.conditioning, self.replicate.draws
      )
    pairs = jax.tree.map(lambda x: x.reshape(len(keys), -1, *x.shape[1:]), pairs)

    def value(params, pairs):
      outputs = predict(self.apply_fn, params, pairs)
      return jnp.mean(self.measurement.value(self.process, outputs, pairs))

    return jax.vmap(jax.grad(value), in_axes=(None, 0))(params, pairs)


@functools.lru_cache(maxsize=8)  # of runs whose programs are kept
def _programs(
  training: ReplayTraining, augmentation: Augmentation, devices: tuple[jax.Device, ...], x64: bool
) -> tuple[Callable, Callable, ApplyFn]:
  """A step forwards, as training has it, and backwards; and the network."""
  of_run = training.network, training.process, training.config
  how: Any = {"augmentation": augmentation, "seed": training.seed}
  forward = engine.parallel_step(*train_step(*of_run, **how), devices, x64)
  backward = engine.on_all(backward_step(*of_run, **how), devices, donate=True, x64=x64)
  return forward, backward, apply_fn_of(training.network, training.process)


class _Loop:
  """The steps of a run, forwards and backwards."""

  def __init__(self, training: ReplayTraining, train: Examples, compute: Compute, x64: bool):
    self._training, self._train, self._compute, self._x64 = training, train, compute, x64
    self._devices = engine.local_devices(compute.devices)
    self._forward, self._backward, self._apply_fn = _programs(
      dataclasses.replace(training, params=None), train.augmentation, tuple(self._devices), x64
    )
    self.batches = Batches(len(train), training.config.batch_size, training.seed)

  def start(self) -> TrainState:
    """The state before the first step."""
    training = self._training
    state = init_state(training.network, self._train, training.config, training.seed)
    return jax.tree.map(self._number, state)

  def states(
    self, state: TrainState, end: int, wanted: Collection[int], progress: Progress | None = None
  ) -> dict[int, TrainState]:
    """Steps done → state, on the host, of those `wanted` from that of `state` to `end`."""
    begin = int(state.step)
    kept = {begin: state} if begin in wanted else {}
    placed = engine.replicate(state, self._devices, self._x64)
    for step in range(begin, end):
      rows = self.batches.rows(self._train, step, len(self._devices))
      placed, metrics = self._forward(placed, engine.shard_of_step(rows, self._devices))
      jax.block_until_ready(metrics)
      if step + 1 in wanted:  # copied: the devices' own arrays are given up to the next step
        kept[step + 1] = jax.tree.map(np.array, engine.first(placed))
      if progress is not None:
        progress.advance(1)
    return kept

  def back(
    self, cotangents: list[np.ndarray], states: dict[int, TrainState], size: int
  ) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
    """Through the steps that begin at `states`, from the last to the first.

    Args:
      cotangents: λ [Q, …] after the last step.
      states: steps done before a step → state.
      size: queries to which those are filled up, so that one program serves every chunk.

    Returns:
      λ [Q, …] before the first step; step → ∂m/∂w [Q, B] of its batch.
    """
    num, devices = len(cotangents[0]), self._devices
    filled = np.minimum(np.arange(math.ceil(size / len(devices)) * len(devices)), num - 1)
    placed = engine.shard([x[filled] for x in cotangents], devices)
    gathered = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:num]
    slopes = {}
    for step in sorted(states, reverse=True):
      state, rows = (
        engine.replicate(tree, devices, self._x64)
        for tree in (states[step], self.batches.rows(self._train, step))
      )
      placed, of_rows = self._backward(placed, state, rows)
      slopes[step] = gathered(of_rows)
    return [np.array(gathered(x)) for x in placed], slopes

  def query_gradients(
    self, params: Params, queries: Examples, measurement: Measurement, draws: Draws
  ) -> Params:
    """∇m [Q, …] at these parameters, means over the draws."""
    training = self._training
    kernel = ParameterGradients(
      self._apply_fn,
      training.process,
      measurement,
      Replicate.of(draws),
      self._x64,
    )
    found = engine.map_batches(
      kernel,
      row_operands(params, draws, QUERY),
      engine.Rows.of(queries, draws.replicates),
      batch_size=self._compute.rows(draws),
      label="query gradients",
      unit="(query, replicate) rows",
      devices=self._devices,
    )
    return jax.tree.map(lambda x: x.reshape(len(queries), -1, *x.shape[1:]).mean(axis=1), found)

  def _number(self, leaf: Array) -> np.ndarray:
    leaf = np.array(leaf)
    return leaf.astype(np.float64) if self._x64 and is_floating(leaf.dtype) else leaf


def _backwards(
  loop: _Loop,
  kept: dict[int, TrainState],
  gradients: Params,
  steps: int,
  compute: Compute,
  partial: PartialSums | None,
) -> np.ndarray:
  """∂m/∂w [Q, N] float64, from ∂m/∂θ [Q, …] at the end and states at the beginnings of segments."""
  num = len(jax.tree.leaves(gradients)[0])
  zeros = jax.tree.map(lambda x: np.zeros((num, *np.shape(x)), x.dtype), kept[0])
  cotangents = floats_of(dataclasses.replace(zeros, ema_params=gradients))
  derivatives = np.zeros((num, loop.batches.num_examples))
  done, places = 0, np.arange(loop.batches.batch_size)
  found = None if partial is None else partial.load()
  if found is not None:
    done, (*cotangents, derivatives) = found
  size = math.ceil(num / compute.query_blocks(num))
  left = [begin for begin in sorted(kept, reverse=True) if begin < steps - done]
  with Progress("replay, backwards", steps, "steps", done) as progress:
    for begin in left:
      end = steps - done
      states = loop.states(kept.pop(begin), end - 1, range(begin, end))
      for first in range(0, num, size):
        rows = slice(first, first + size)
        part, slopes = loop.back([x[rows] for x in cotangents], states, size)
        for whole, own in zip(cotangents, part, strict=True):
          whole[rows] = own
        for step, values in slopes.items():
          examples = loop.batches.examples(step, places)
          np.add.at(derivatives[rows].T, examples, values.T)
      done = steps - begin
      progress.advance_to(done)
      if partial is not None:
        partial.save(done, [*cotangents, derivatives])
  return derivatives


def _distance(found: Params, trained: Params | None) -> float | None:
  """‖θ − θ'‖ / ‖θ'‖ of parameters from those trained; None without these.

  Raises:
    ValueError: it is more than rounding explains.
  """
  if trained is None:
    return None
  flat = lambda tree: np.concatenate(
    [np.ravel(np.asarray(x, float)) for x in jax.tree.leaves(tree)]
  )
  ours, theirs = flat(found), flat(trained)
  distance = math.inf
  if ours.shape == theirs.shape:
    distance = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  if not distance <= _FARTHEST:
    raise ValueError(
      f"The replay ends at a relative distance of {distance:.2g} from the trained parameters, of "
      f"which at most {_FARTHEST} is rounding. Give the network, config, seed and training "
      "examples that it was trained with, in their order, and as many devices; or train it anew."
    )
  return distance


def _partial(
  compute: Compute,
  settings: dict[str, Any],
  last: TrainState,
  queries: Examples,
  train: Examples,
) -> PartialSums | None:
  """Where λ and ∂m/∂w are kept between segments, whatever their length."""
  if compute.checkpoint is None:
    return None
  leaves = {f"end_{i:05d}": x for i, x in enumerate(floats_of(last))}
  key = settings | {
    "inputs": fingerprint(leaves | queries.arrays("queries") | train.arrays("train"))
  }
  return PartialSums(compute.checkpoint.path("replay.npz"), key, compute.checkpoint.every)
