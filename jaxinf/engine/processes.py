"""Several processes, each with devices of its own: who has which rows, and how results are joined.

Every process runs the same program on the same inputs. It goes through its own share of the rows,
a contiguous range, and what they found is gathered in all of them; the primary writes files. With
one process these functions give back what they are given.
"""

import contextlib
import hashlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinf.core.types import PyTree

# Bytes of each process that are exchanged at a time. They go through the devices' memory, once for
# every process, and results may be larger than that.
_PIECE_BYTES = 2**26


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
      "Give coordinator (HOST:PORT), num_processes and process_id together, or none of them where "
      "the cluster's variables say them."
    )
  if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f"coordinator must be HOST:PORT; got {coordinator!r}.")
  if num_processes is not None and process_id is not None:
    if num_processes < 1:
      raise ValueError(f"num_processes must be at least 1; got {num_processes}.")
    if not 0 <= process_id < num_processes:
      raise ValueError(f"process_id must lie in 0…{num_processes - 1}; got {process_id}.")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # concerns CPU devices alone
  handler = signal.getsignal(signal.SIGTERM)
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except Exception as error:  # of many kinds, from the coordination service
    told = "" if coordinator else " The cluster's variables are to say who they are."
    raise ValueError(f"The processes did not meet: {error}{told}") from error
  signal.signal(signal.SIGTERM, handler)  # JAX would only take note of it, and go on


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Says what the block raises and ends this process at once, which ends the others.

  An ordinary exit would first wait for the others, and these for us in their next exchange.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    if isinstance(error, SystemExit) and isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    else:
      traceback.print_exc()
      print(
        "This process ends, and the others with it. If a connection was lost, another one ended "
        "first and said why.",
        file=sys.stderr,
      )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def count() -> int:
  """Processes of the run."""
  return jax.process_count()


def is_primary() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def share(num_rows: int) -> tuple[int, int]:
  """This process's rows [begin, end) of `num_rows`: as many as the others', but for the last."""
  each = -(-num_rows // count())
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
  if count() == 1 or num_rows == 0:
    return array
  each = -(-num_rows // count())
  padded = np.zeros((each, *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  together = np.concatenate(list(_pieces_of_all(padded)), axis=1)
  return together.reshape(-1, *array.shape[1:])[:num_rows]


def summed(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Sums over all processes, added in float64 and in the order of their numbers."""
  if count() == 1:
    return list(arrays)
  added = lambda piece: piece.sum(0, np.float64).astype(piece.dtype)
  return [
    np.concatenate([added(piece) for piece in _pieces_of_all(array.ravel())]).reshape(array.shape)
    for array in arrays
  ]


def of_primary(tree: PyTree) -> PyTree:
  """The primary's arrays, in every process; they are alike in structure, shapes and types."""
  if count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  own = leaves if is_primary() else [np.zeros_like(leaf) for leaf in leaves]
  return jax.tree.unflatten(structure, summed(own))


def agreed(value: bool) -> bool:
  """The primary's value, in all processes: for decisions on files, which may just be changing."""
  return value if count() == 1 else bool(_of_all(np.array([value]))[0, 0])


def check_same(text: str, what: str) -> None:
  """Raises ValueError unless all processes have the same text."""
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  if count() > 1 and np.ptp(_of_all(digest), axis=0).any():
    raise ValueError(
      f"The processes differ in {what}: start all of them with the same arguments, on the same "
      "files."
    )


def wait_for_all(name: str) -> None:
  """Returns when every process has come here; ValueError where one has come to another name."""
  check_same(f"wait: {name}", f"how far they have come (here: {name})")


def _pieces_of_all(array: np.ndarray) -> Iterator[np.ndarray]:
  """Yields [processes, n, …] for the next n of the rows [N, …] that every process has."""
  rows = max(1, _PIECE_BYTES // max(1, array[:1].nbytes))
  for begin in range(0, len(array), rows):
    yield _of_all(array[begin : begin + rows])


def _of_all(array: np.ndarray) -> np.ndarray:
  """The array of every process, [processes, …]; it has the same shape and type in all."""
  if array.size == 0:
    return np.empty((count(), *array.shape), array.dtype)
  as_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # JAX would narrow float64
  try:
    together = np.asarray(multihost_utils.process_allgather(as_bytes))
  except Exception as error:  # of several kinds, by backend
    raise ValueError(
      f"The other processes cannot be reached; one of them has ended, and said why. ({error})"
    ) from error
  return together.view(array.dtype).reshape(count(), *array.shape)
