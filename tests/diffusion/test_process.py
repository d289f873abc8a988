"""Every process against its closed form; one path seen through several networks; laws of time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinf.core.draws import INDEPENDENT, Draws
from jaxinf.core.random import draw_keys, fold_in_each, stream
from jaxinf.diffusion.loss_weights import P2, WEIGHTS, MinSNR, Table
from jaxinf.diffusion.noise import draw_noised, draw_times, losses, predict
from jaxinf.diffusion.process import PROCESSES as CONSTRUCTORS
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.times import LogitNormal
from tests.processes import CONTINUOUS, DISCRETE, PROCESSES, some_times

SCHEDULE = DISCRETE["epsilon"].schedule
SHAPES = [(2, 3, 1), (5,), (3, 2)]  # an image, a vector, a series
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def column(x, like):
  return np.float64(x).reshape(-1, *[1] * (like.ndim - 1))


def closed_forms(process, t):
  """(a, b, c, d, s, τ, w) [B] in float64, as the papers write them."""
  t = np.asarray(t)
  one = np.ones(len(t))
  if process.name == "flow":
    t = np.float64(t)
    return 1 - t, t, one, -one, one, t, one * (process.weight.value if process.weight else 1)
  if process.name == "edm":
    sigma, s = np.float64(t), process.sigma_data
    skip, out = s**2 / (sigma**2 + s**2), sigma * s / np.sqrt(sigma**2 + s**2)
    if process.raw:
      return one, sigma, 0 * one, one, one, sigma, 1 / out**2
    scale = 1 / np.sqrt(sigma**2 + s**2)
    return one, sigma, -skip * sigma / out, (1 - skip) / out, scale, np.log(sigma) / 4, one
  alpha_bars = process.schedule.exact_alpha_bars[t]
  a, b = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
  c, d = {"epsilon": (one, 0 * one), "sample": (0 * one, one), "v": (a, -b)}[process.name]
  snr = alpha_bars / (1 - alpha_bars)
  match process.weight:
    case None:
      w = one
    case MinSNR(gamma):
      divisor = {"epsilon": snr, "sample": one, "v": snr + 1}[process.name]
      w = np.minimum(snr, gamma) / divisor
    case P2(k, gamma):
      w = (k + snr) ** -gamma
    case Table(values):
      w = np.array(values)[t]
  return a, b, c, d, one, t, w


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noised_data_targets_and_weights_are_the_papers(process, shape):
  t = some_times(process)
  data, noise = np.random.default_rng(0).normal(size=(2, len(t), *shape)).astype(np.float32)
  a, b, c, d, scale, time, w = closed_forms(process, t)
  x_t = process.noised(jnp.asarray(data), t, jnp.asarray(noise))
  by_hand = column(a, data) * data + column(b, data) * noise
  # Float32 products and sums, here and below; the coefficients themselves are of size 1 to 100.
  np.testing.assert_allclose(x_t, by_hand, rtol=2e-6, atol=2e-6)
  inputs, given = process.inputs(x_t, t)
  np.testing.assert_allclose(inputs, column(scale, data) * by_hand, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(given, time, rtol=1e-6, atol=1e-7)
  assert given.dtype == (jnp.int32 if process.is_discrete else jnp.float32)
  target = process.target(jnp.asarray(data), jnp.asarray(noise), t)
  by_hand = column(c, data) * noise + column(d, data) * data
  np.testing.assert_allclose(target, by_hand, rtol=2e-6, atol=2e-6)
  assert target.dtype == inputs.dtype == process.weights(t).dtype == jnp.float32
  np.testing.assert_allclose(process.weights(t), w, rtol=2e-6)
  for found, expected in zip(process.levels(t), (a, b), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@each
def test_data_and_noise_follow_from_x_t_and_the_target(process):
  """x̂_0 and ε̂ of the true target are x_0 and ε."""
  t = some_times(process)
  data, noise = np.random.default_rng(1).normal(size=(2, len(t), 4)).astype(np.float32)
  x_t = process.noised(jnp.asarray(data), t, jnp.asarray(noise))
  target = process.target(jnp.asarray(data), jnp.asarray(noise), t)
  a, b, *_ = closed_forms(process, t)
  # Rounding of x_t and the target, 1e-7 of size 1, grows by b / a in x̂_0 and by a / b in ε̂, of
  # which the table's ends have 7 and 30.
  of_image = 1e-6 * (1 + column(b, data)) / np.maximum(column(a, data), 0.02)
  of_noise = 1e-6 * (1 + column(a, data) / column(b, data))
  assert (np.abs(process.clean(x_t, t, target) - data) <= of_image).all()
  assert (np.abs(process.noise(x_t, t, target) - noise) <= of_noise).all()


@each
def test_an_error_of_the_output_is_one_of_the_noise_scaled(process):
  """ε̂ is affine in the output, with the slope whose square is noise_error_scale."""
  t = some_times(process)
  x_t = jnp.ones((len(t), 1))
  slope = process.noise(x_t, t, x_t + 1) - process.noise(x_t, t, x_t)
  # A difference of float32 numbers, which are large where b is small.
  np.testing.assert_allclose(slope[:, 0] ** 2, process.noise_error_scale(t), rtol=1e-4, atol=1e-6)
  if process.is_discrete:
    image = process.clean(x_t, t, x_t + 1) - process.clean(x_t, t, x_t)
    exact = process.exact_clean_error_scales[np.asarray(t)]
    np.testing.assert_allclose(image[:, 0] ** 2, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("process", DISCRETE.values(), ids=DISCRETE)
def test_tables_in_float64_are_those_of_the_kernels(process):
  t = np.arange(process.num_steps)
  a, b, c, d, _, _, w = closed_forms(process, t)
  for found, expected in zip(process.exact, (a, b, c, d, a * c - b * d), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
  np.testing.assert_allclose(process.exact_weights, w, rtol=1e-12)


def test_loss_weights_by_hand():
  """SNRs 8, 1 and ¼, by numbers written down."""
  schedule = Schedule.from_alpha_bars([8 / 9, 1 / 2, 1 / 5])
  for process, expected in {
    Process.epsilon(schedule, "min_snr"): [5 / 8, 1, 1],
    Process.v(schedule, "min_snr"): [5 / 9, 1 / 2, 1 / 5],
    Process.sample(schedule, "min_snr"): [5, 1, 1 / 4],
    Process.epsilon(schedule, MinSNR(0.5)): [1 / 16, 1 / 2, 1],
    Process.epsilon(schedule, "p2"): [1 / 9, 1 / 2, 4 / 5],
    Process.v(schedule, P2(k=2.0, gamma=0.5)): [10**-0.5, 3**-0.5, 2.25**-0.5],
    Process.sample(schedule, 3): [3, 3, 3],
    Process.epsilon(schedule, [1, 0, 2]): [1, 0, 2],
  }.items():
    np.testing.assert_allclose(process.exact_weights, expected, rtol=1e-12)
  # At t = 2/3 of flow the SNR is ¼, and x̂_0 errs by t² the squared error of the output.
  weight = Process.flow(weight="min_snr").weights(jnp.float32([2 / 3, 0.1]))
  np.testing.assert_allclose(weight, [1 / 9, 5 / 100], rtol=1e-6)  # float32


def paths(t):
  """(process, t, weight of its squared error in that of ε̂, scale of x_t) at one noise level.

  A schedule's path at ᾱ is rectified flow's at τ = b / (a + b), scaled by 1 / (a + b), and EDM's at
  σ = b / a, scaled by 1 / a.
  """
  a, b = (level.astype(np.float64) for level in Process.epsilon(SCHEDULE).exact_levels(t))
  index = jnp.asarray(t, jnp.int32)
  flow, sigma = b / (a + b), b / a
  edm = Process.edm()
  return {
    "epsilon": (Process.epsilon(SCHEDULE), index, np.ones(len(t)), np.ones(len(t))),
    "sample": (Process.sample(SCHEDULE), index, (a / b) ** 2, np.ones(len(t))),
    "v": (Process.v(SCHEDULE), index, a**2, np.ones(len(t))),
    "flow": (Process.flow(), jnp.float32(flow), (1 - flow) ** 2, 1 / (a + b)),
    "edm": (edm, jnp.float32(sigma), edm.sigma_data**2 / (sigma**2 + edm.sigma_data**2), 1 / a),
    "edm_raw": (Process.edm(raw=True), jnp.float32(sigma), 1 / sigma**2, 1 / a),
  }


@pytest.mark.parametrize("name", ["sample", "v", "flow", "edm", "edm_raw"])
def test_one_network_written_for_another_process_has_the_same_loss_and_gradients(name):
  """A network that predicts ε, as one that predicts x_0, v, ε − x_0 or EDM's target of one path."""
  t = np.arange(10)
  data = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
  keys = draw_keys(stream(0, "test"), 10)[:, None]
  plain, index, _, _ = paths(t)["epsilon"]
  process, times, weight, scale = paths(t)[name]
  scale = jnp.asarray(scale, jnp.float32)[:, None]

  def epsilon(params, x_t, t):
    return jnp.tanh(x_t @ params + t[:, None] / 10)

  def rewritten(params, inputs, time):
    """What the process has the network predict, where the noise is epsilon(x_t of the schedule)."""
    del time
    x = inputs / process.inputs(jnp.ones_like(inputs), times)[0]
    noise = epsilon(params, x / scale, index)
    a, b = (level[:, None] for level in process.levels(times))
    return process.target((x - b * noise) / a, noise, times)

  def loss(params, process, t, apply_fn, weight):
    pairs = draw_noised(process, data, t, keys, INDEPENDENT)
    unweighted = losses(predict(apply_fn, params, pairs), pairs) / pairs.weights
    return jnp.sum(jnp.asarray(weight, jnp.float32) * unweighted)

  params = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
  value = jax.value_and_grad(loss)
  expected, expected_gradient = value(params, plain, index, epsilon, np.ones(10))
  found, gradient = value(params, process, times, rewritten, weight)
  # Float32, through quotients by a ≥ 0.2 and b ≥ 0.1.
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  scale = np.abs(expected_gradient).max()
  np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
  ("process", "quantile"),
  [
    (Process.flow(), lambda u: u),
    (Process.flow(shift=3.0), lambda u: 3 * u / (1 + 2 * u)),
    (
      Process.flow(LogitNormal(0.5, 1.5)),
      lambda u: 1 / (1 + np.exp(-0.5 - 1.5 * stats.norm.ppf(u))),
    ),
    (Process.edm(p_mean=-1.0, p_std=0.5), lambda u: stats.lognorm.ppf(u, 0.5, scale=np.exp(-1))),
  ],
  ids=["flow", "flow, shifted", "flow, logit-normal", "edm"],
)
def test_times_are_quantiles_of_their_law(process, quantile):
  u = np.float32([0.001, 0.1, 0.5, 0.9, 0.999])
  # Float32 quantiles of a normal number, 1e-6 of them in their tails.
  np.testing.assert_allclose(process.times(jnp.asarray(u)), quantile(np.float64(u)), rtol=1e-5)
  ends = np.asarray(process.times(jnp.float32([0.0, 1.0])))
  assert np.isfinite(ends).all() and (ends >= 0).all()
  assert process.name == "flow" or (ends > 0).all()  # ln σ is finite


@each
@pytest.mark.parametrize("size", [4, 7])
def test_stratified_draws_hit_each_part_of_the_law_once(process, size):
  keys = jax.vmap(lambda key: draw_keys(key, size))(fold_in_each(stream(0, "test"), jnp.arange(50)))
  draws = Draws(size, timesteps="stratified", antithetic=False)
  t = np.sort(np.asarray(draw_times(process, keys, draws)).reshape(50, size), axis=1)
  edges = np.asarray(process.times(jnp.arange(size + 1, dtype=jnp.float32) / size))
  # A part's border may lie within a timestep, which then belongs to both.
  assert (t >= edges[:-1]).all() and (t <= edges[1:] + (0 if process.is_discrete else 1e-5)).all()


@each
def test_processes_are_values_and_json(process):
  again = Process.from_settings(json.loads(json.dumps(process.settings)))
  assert again == process and hash(again) == hash(process) and again is not process
  assert sum(other == process for other in PROCESSES.values()) == 1
  assert process.name in CONSTRUCTORS


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Process.epsilon(0.1), "must be a jaxinf.Schedule.*got float"),
    (
      lambda: Process.epsilon(SCHEDULE.with_zero_terminal_snr()),
      "Take Process.v or Process.sample",
    ),
    (lambda: Process.epsilon(SCHEDULE, "snr"), "Unknown loss weight 'snr'; there are: min_snr, p2"),
    (lambda: Process.epsilon(SCHEDULE, np.ones(9)), "There are 10 timesteps, but 9 loss weights"),
    (lambda: Process.epsilon(SCHEDULE, -np.ones(10)), "finite numbers that are not negative"),
    (lambda: Process.v(SCHEDULE, 0), "must be positive and finite; got 0"),
    (lambda: Process.v(SCHEDULE, MinSNR(-1)), "gamma of min_snr must be positive"),
    (lambda: Process.flow(weight=np.ones(10)), r"needs discrete timesteps; Process.flow\(Uniform"),
    (lambda: Process.edm(weight="min_snr"), "MinSNR.* EDM has weights of its own"),
    (lambda: Process.edm(weight="p2"), "P2.* EDM has weights of its own"),
    (lambda: Process.flow("normal"), "Unknown law of time 'normal'; there are: uniform, logit_no"),
    (lambda: Process.flow(shift=0), "shift must be positive and finite; got 0"),
    (lambda: Process.flow(LogitNormal(0, 0)), "positive, finite std"),
    (lambda: Process.edm(sigma_data=np.nan), "sigma_data must be positive"),
    (lambda: Process.edm(sigma_min=2, sigma_max=1), "sigma_min must be below sigma_max"),
    (lambda: Process.from_settings({"name": "vdm"}), "Unknown process 'vdm'; there are: epsilon"),
    (lambda: CONTINUOUS["flow"].exact, "is continuous: it has no table of timesteps"),
  ],
)
def test_what_makes_no_process_is_refused_by_name(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_every_named_weight_has_an_effect():
  plain = Process.epsilon(SCHEDULE).exact_weights
  for name in WEIGHTS:
    assert (Process.epsilon(SCHEDULE, name).exact_weights < plain).any()
