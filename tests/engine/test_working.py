"""A process that left its name is known to live by its number, its host and when it began."""

import os
import subprocess

from jaxinf.engine.working import is_alive, this_process


def test_a_process_lives_until_it_has_ended():
  here = this_process()
  assert here["id"] == os.getpid() and is_alive(here)
  other = subprocess.Popen(["sleep", "60"])
  try:
    assert is_alive(this_process() | {"id": other.pid})
  finally:
    other.kill()
    other.wait()
  assert is_alive(here | {"id": other.pid}) is False
  assert is_alive(here | {"time": 0.0}) is False  # the number was another's then
  assert is_alive(here | {"host": "elsewhere"}) is None
