"""Small processes of every kind, for tests that hold for them all, and the best networks there."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinf.core.types import ApplyFn
from jaxinf.diffusion.loss_weights import P2, MinSNR
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule
from jaxinf.diffusion.times import LogitNormal


def processes(schedule: Schedule) -> dict[str, Process]:
  """Name → process; the discrete ones with this schedule."""
  return {
    "epsilon": Process.epsilon(schedule),
    "epsilon_min_snr": Process.epsilon(schedule, "min_snr"),
    "epsilon_p2": Process.epsilon(schedule, P2(gamma=0.5)),
    "sample": Process.sample(schedule),
    "sample_table": Process.sample(schedule, np.linspace(2.0, 0.5, schedule.num_steps)),
    "v": Process.v(schedule, MinSNR(3.0)),
    "v_zero_snr": Process.v(schedule.with_zero_terminal_snr()),
    "sample_zero_snr": Process.sample(schedule.with_zero_terminal_snr(), "min_snr"),
    "flow": Process.flow(),
    "flow_logit_normal": Process.flow(LogitNormal(0.2, 0.8), shift=3.0, weight=2.0),
    "edm": Process.edm(sigma_max=20.0),
    "edm_raw": Process.edm(raw=True, sigma_max=20.0),
  }


# Ten steps from little noise to nearly nothing but noise.
PROCESSES = processes(Schedule.linear(10, 0.01, 0.5))
DISCRETE = {name: process for name, process in PROCESSES.items() if process.is_discrete}
CONTINUOUS = {name: process for name, process in PROCESSES.items() if not process.is_discrete}


def some_times(process: Process, num: int = 7) -> jax.Array:
  """Times [num] over the law's whole range, in the middle of its parts."""
  return process.times((jnp.arange(num, dtype=jnp.float32) + 0.5) / num)


def best_network(process: Process, mean: float, variance: float) -> ApplyFn:
  """apply_fn(params, inputs, time): the expected target given x_t, for data N(mean, variance I)."""

  def apply_fn(params, inputs, time):
    del params
    t = time_of(process, time)
    # x_t, from what the network is given of it.
    x_t = inputs / process.inputs(jnp.ones_like(inputs), t)[0]
    a, b = (level.reshape(-1, *[1] * (inputs.ndim - 1)) for level in process.levels(t))
    shared = (x_t - a * mean) / (a**2 * variance + b**2)
    return process.target(mean + a * variance * shared, b * shared, t)

  return apply_fn


def time_of(process: Process, time: jax.Array) -> jax.Array:
  """t of the τ_t that a network is given."""
  return jnp.exp(4 * time) if process.name == "edm" and not process.raw else time
