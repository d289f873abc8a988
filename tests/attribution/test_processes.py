"""Every diffusion process: sign and scale by leave-one-out, and one model in several spellings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinf
from jaxinf import Compute, Draws, Examples, Process, Schedule
from jaxinf.core.types import KroneckerFactors
from jaxinf.curvature.decompose import decomposed
from jaxinf.diffusion.loss_weights import MinSNR
from jaxinf.diffusion.times import LogitNormal
from tests import nets
from tests.processes import PROCESSES, time_of
from tests.twins import assert_close, pairs_of

SIZE = 3  # numbers of an example
# Two examples with their eight draws on each device: queries and training examples are one program.
COMPUTE = Compute(batch_size=32)


def vectors(num: int, seed: int = 0) -> Examples:
  return Examples(nets.random_images(num, (SIZE,), seed))


def linear(params, inputs, time):
  del time
  return nets.dense(params["linear"], inputs)


class Ridge:
  """Ridge regression: a linear model of a process on fixed draws, in closed form in float64."""

  def __init__(self, process: Process, num: int, draws: Draws):
    self.draws, self.num = draws, num
    self.model = jaxinf.DiffusionModel(
      linear, nets.random_params({"linear": {"kernel": (SIZE, SIZE), "bias": (SIZE,)}}), process
    )
    self.train, self.queries = vectors(num), vectors(5, seed=1)
    self.rows, self.targets, self.weights = self.problem(self.train, "train_gradients")
    # λ is a twentieth of the mean eigenvalue of H.
    self.damping = 0.05 * np.trace(self.hessian(np.ones(num))) / (SIZE + 1)

  def problem(self, examples: Examples, name: str):
    """Inputs [n, S, 4] with a 1, targets [n, S, 3] and weights [n, S, 1] of each draw."""
    pairs = pairs_of(self.model, examples, name, self.draws)
    stacked = lambda field: np.stack([np.asarray(getattr(p, field), np.float64) for p in pairs])
    inputs = stacked("inputs")
    ones = np.ones((*inputs.shape[:2], 1))
    return np.concatenate([inputs, ones], 2), stacked("target"), stacked("weights")[..., None]

  def hessian(self, shares) -> np.ndarray:
    """[4, 4] of (1/N) Σ_n shares_n ℓ_n for each row of W, without λ."""
    weights = self.weights * shares[:, None, None]
    scale = 2 / (SIZE * self.draws.num * self.num)
    return scale * np.einsum("nsi,nsj->ij", weights * self.rows, self.rows)

  def refit(self, shares) -> np.ndarray:
    """argmin over W [3, 4] of (1/N) Σ_n shares_n ℓ_n(W) + λ/2 |W|²."""
    weights = self.weights * shares[:, None, None]
    scale = 2 / (SIZE * self.draws.num * self.num)
    gradient = scale * np.einsum("nsi,nsj->ij", weights * self.rows, self.targets)
    return np.linalg.solve(self.hessian(shares) + self.damping * np.eye(SIZE + 1), gradient).T

  def scores(self) -> np.ndarray:
    """[5, N] of the library at the optimum, with the exact curvature as Kronecker factors."""
    best = self.refit(np.ones(self.num))
    params = {"linear": {"kernel": best[:, :-1].T, "bias": best[:, -1]}}
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    fitted = jaxinf.fit_curvature(
      self.model.with_params(params), self.train, jaxinf.Identity(), draws=Draws(1)
    )
    factors = KroneckerFactors(a=self.hessian(np.ones(self.num)), g=np.eye(SIZE))
    curvature = dataclasses.replace(fitted, bases=decomposed({"linear": factors}, "host")[0])
    return jaxinf.influence(
      curvature, queries=self.queries, train=self.train, damping=self.damping, draws=self.draws,
      query_draws=self.draws, compression=None, compute=COMPUTE,
    ).values  # fmt: skip

  def changes(self, removed: float) -> np.ndarray:
    """[5, N] change of the queries' losses where a share of each example in turn is removed."""
    rows, targets, weights = self.problem(self.queries, "query_gradients")
    errors = lambda w: np.square(targets - rows @ w.T)
    measure = lambda w: np.mean(weights * errors(w), axis=(1, 2))
    everything = measure(self.refit(np.ones(self.num)))
    without = lambda n: measure(self.refit(1 - removed * (np.arange(self.num) == n)))
    return np.stack([without(n) - everything for n in range(self.num)], axis=1)


@pytest.mark.parametrize("name", PROCESSES)
def test_leave_one_out_on_ridge_regression_pins_sign_and_scale(name):
  """Removing example n and refitting changes the loss of query q by scores[q, n] / N."""
  ridge = Ridge(PROCESSES[name], num=60, draws=Draws(8, 1, seed=5, loss_power=1))
  predicted = ridge.scores() / ridge.num
  # To first order in what is removed: of a thousandth of an example, but for 1e-3.
  assert_close(predicted, ridge.changes(1e-3) / 1e-3, 2e-3)
  # Of a whole one, but for leverages of the order of 4 / 60.
  change = ridge.changes(1.0)
  assert np.corrcoef(predicted.ravel(), change.ravel())[0, 1] > 0.99
  assert 0.85 < np.sum(predicted * change) / np.sum(change**2) < 1.05


# One network that predicts ε of a path, as each process of a family has it to predict.

SHAPES = {
  "in": {"kernel": (SIZE + 1, 5), "bias": (5,)},
  "out": {"kernel": (5, SIZE), "bias": (SIZE,)},
}
SCHEDULE = Schedule.linear(10, 0.01, 0.5)


def spelled(process: Process):
  """apply_fn of a network on x_t / √(a² + b²) and the level, whose ε̂ is made what is predicted."""

  def apply_fn(params, inputs, time):
    t = time_of(process, time)
    column = lambda x: x[:, None]
    a, b = map(column, process.levels(t))
    x_t = inputs / process.inputs(jnp.ones_like(inputs), t)[0]
    given = jnp.concatenate([x_t / jnp.sqrt(a**2 + b**2), jnp.log(b / a)], axis=1)
    noise = nets.dense(params["out"], jnp.tanh(nets.dense(params["in"], given)))
    return process.target((x_t - b * noise) / a, noise, t)

  return apply_fn


def weighted(make, of_noise: np.ndarray) -> Process:
  """A discrete process whose weights make its loss that of ε̂ with weights `of_noise` [T]."""
  return make(SCHEDULE, of_noise * make(SCHEDULE).exact_noise_error_scales)


OF_NOISE = np.linspace(2.0, 0.5, 10)
ONE_STEP = Schedule.from_alpha_bars([0.5])  # a = b: where the path of flow is at t = ½
CONSTANT = LogitNormal(0.0, 1e-6)
FAMILIES = {
  "discrete": [weighted(make, OF_NOISE) for make in (Process.epsilon, Process.sample, Process.v)],
  # With σ = t / (1 − t); where sigma_data is far above σ, EDM counts the error of ε̂.
  "continuous": [
    Process.flow(LogitNormal(-0.5, 0.8), weight=MinSNR(1e12)),
    Process.edm(1e4, -0.5, 0.8),
    Process.edm(1e4, -0.5, 0.8, raw=True),
  ],
  # One time for all: ½ of ε's squared error is a quarter … of what flow predicts, which is ε̂ / a.
  "both": [
    Process.epsilon(ONE_STEP, 4.0),
    Process.v(ONE_STEP, 2.0),
    Process.flow(CONSTANT),
  ],
}


@pytest.mark.filterwarnings("ignore:mean training loss")  # the network is random
@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_has_the_same_scores_however_its_process_is_spelled(family):
  """Same weights of the network, path, law of t and loss: the curvature and scores are the same."""
  params, train, queries = nets.random_params(SHAPES), vectors(12), vectors(3, seed=1)
  found = []
  for process in FAMILIES[family]:
    model = jaxinf.DiffusionModel(spelled(process), params, process)
    curvature = jaxinf.fit_curvature(model, train, draws=Draws(8, seed=3))
    scores = jaxinf.influence(
      curvature, queries=queries, train=train, damping=1e-3, draws=Draws(8, 2, seed=3),
      compression=None, compute=Compute(batch_size=8),
    )  # fmt: skip
    found.append(scores.replicate_values)
  for scores in found[1:]:
    # Rounding of x_t − b ε̂ and of levels in float32, with factors up to 10 between them.
    assert_close(scores, found[0], 1e-4)
