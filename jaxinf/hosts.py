"""Several processes, each with devices of its own: which rows are whose, and how results meet.

Every process runs the same program on the same inputs. It goes through its own share of the rows,
a contiguous range, and what they found is gathered in all of them; the primary writes files. With
one process nothing here does anything.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes; call it before anything else touches JAX.

  Args:
    coordinator: host:port of process 0, which must be free there; None: the cluster's own
      variables (SLURM, Open MPI, Kubernetes, TPU pods; see jax.distributed.initialize).
    num_processes: of the run.
    process_id: of this one, 0 … num_processes − 1.

  Raises:
    ValueError: some of the three are given, but not all; or the processes do not meet.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is None for x in given) and any(x is not None for x in given):
    raise ValueError(
      "Give --coordinator=HOST:PORT, --num_processes and --process_id together, or none of them "
      "and --distributed, where the cluster's variables say them."
    )
  if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
    raise ValueError(f"process_id must lie in 0…{num_processes - 1}; got {process_id}.")
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except Exception as error:  # of many kinds, from the coordination service
    raise ValueError(f"The processes did not meet: {error}") from error


def count() -> int:
  """Processes of the run."""
  return jax.process_count()


def is_primary() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def share(num_rows: int, multiple: int = 1) -> tuple[int, int]:
  """This process's rows [begin, end) of `num_rows`; all but the last hold whole multiples."""
  each = -(-num_rows // (count() * multiple)) * multiple
  begin = min(jax.process_index() * each, num_rows)
  return begin, min(begin + each, num_rows)


def label(text: str | None) -> str | None:
  """The label of a progress bar, which only the primary shows."""
  return text if is_primary() else None


def suffix() -> str:
  """Tells apart the files that each process keeps of its own work; empty for one process."""
  return f".{jax.process_index()}of{count()}" if count() > 1 else ""


def gathered(array: np.ndarray, num_rows: int) -> np.ndarray:
  """All rows [num_rows, …] in order, from this process's share of them."""
  if count() == 1:
    return array
  each = -(-num_rows // count())
  padded = np.zeros((each, *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  together = np.asarray(multihost_utils.process_allgather(padded))
  return together.reshape(-1, *array.shape[1:])[:num_rows]


def summed(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Sums over all processes, added in float64 and in the order of their numbers."""
  if count() == 1:
    return list(arrays)
  add = lambda x: (
    np.asarray(multihost_utils.process_allgather(x)).sum(0, np.float64).astype(x.dtype)
  )
  return [add(array) for array in arrays]


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  if count() > 1:
    multihost_utils.sync_global_devices(name)
