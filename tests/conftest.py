"""Strict JAX on two simulated CPU devices, and the toys that several tests share."""

import importlib.metadata
import os
import pathlib
import threading

# Compiling is most of what the tests do, and the optimiser's work never pays back on tiny nets. The
# emitters of fusions take twice the time of what they stand for. (An unknown flag ends the process:
# this one is of the locked version.) Set before JAX starts; kept for processes that tests start.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.9."):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
# Both workers, and the processes that tests start, compile much the same programs.
_COMPILED = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 2)
# Rank promotion stays allowed: biases broadcast in users' networks, whose plain traces we read.

from jaxinf import Schedule
from jaxinf.data import Dataset
from jaxinf.engine import processes
from jaxinf.networks import MLP

# Files of few tests that take long, most of them because they start processes. They go first, so
# that no worker is left alone with one of them.
_LONG = (
  "tests/engine/test_processes.py",
  "tests/golden/test_golden.py",
  "tests/runs/test_kill.py",
  "tests/runs/test_stages.py",
  "tests/benchmark/test_kill.py",
  "tests/test_readme.py",
  "tests/planning/test_planning.py",
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Forgets what is compiled before a process has as many memory maps as Linux allows: 65,530.

  XLA's code for CPUs takes about ten for each function, and compiling without any left is a
  segmentation fault.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
    jax.clear_caches()


@pytest.fixture(params=[1, 2], ids=["one_device", "two_devices"])
def devices(request):
  """One device, then two: what is computed must not depend on their number."""
  if jax.local_device_count() < request.param:
    pytest.skip(f"needs {request.param} devices")
  return jax.local_devices()[: request.param]


@pytest.fixture(scope="session")
def schedule():
  """Ten steps from little noise to nearly nothing but noise."""
  return Schedule.linear(10, 0.01, 0.5)


@pytest.fixture(scope="session")
def dataset():
  """Ten random 4 × 4 images that training may mirror."""
  images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 1)).astype(np.uint8)
  return Dataset("toy", images, np.array([f"toy_{n}" for n in range(10)]), random_flip=True)


@pytest.fixture(scope="session")
def mlp():
  """A denoiser of a few dozen parameters."""
  return MLP(hidden=(8,), time_features=4)


@pytest.fixture
def in_processes(monkeypatch):
  """in_processes(num, function) → its results in `num` threads that exchange as processes do."""
  own = threading.local()
  monkeypatch.setattr(jax, "process_index", lambda: own.index)

  def run(num, function):
    meeting, sent, results = threading.Barrier(num, timeout=20), [None] * num, [None] * num

    def allgather(array):
      sent[own.index] = array
      meeting.wait()
      together = np.stack(sent)
      meeting.wait()
      return together

    def process(index):
      own.index = index
      try:
        results[index] = function()
      except ValueError as error:
        results[index] = error

    monkeypatch.setattr(jax, "process_count", lambda: num)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    threads = [threading.Thread(target=process, args=(index,)) for index in range(num)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return results

  return run
