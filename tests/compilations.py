"""Counts what XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax
import jax.monitoring


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
  """Yields a list that gets the seconds of each compilation by XLA inside the block.

  One that JAX's cache on disk spares counts too.
  """
  seconds: list[float] = []
  inside = [True]

  def listen(event: str, duration: float, **_) -> None:
    if inside[0] and event == "/jax/core/compile/backend_compile_duration":
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    inside[0] = False
