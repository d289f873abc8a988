"""Which versions of JAX and kfac-jax work together, checked when jaxinf is imported."""

import importlib

import jax

_OLDEST, _FIRST_FOR_MAIN = (0, 8, 0), (0, 9, 2)
_PAIRS = "jaxinf works with jax 0.8.0 to 0.9.1 and kfac-jax 0.0.8, or newer jax and kfac-jax's main"


def check_versions(jax_version: tuple[int, ...] = jax.__version_info__) -> None:
  """Raises ImportError, in one line, where the installed versions are known not to work.

  kfac-jax 0.0.8 fails with jax 0.9.2 and later, in some cases deep in a trace. Its main branch
  works, and calls itself 0.0.8 too: it is known by what it has besides.
  """
  found = ".".join(map(str, jax_version))
  if jax_version < _OLDEST:
    raise ImportError(f"{_PAIRS}; found jax {found}: pip install -U 'jax<0.9.2'.")
  if jax_version < _FIRST_FOR_MAIN:
    return
  try:
    is_main = hasattr(importlib.import_module("kfac_jax").LossFunction, "multiply_empirical_fisher")
  except Exception:  # of many kinds, raised while kfac-jax is imported
    is_main = False
  if not is_main:
    raise ImportError(
      f"{_PAIRS}; found jax {found} and an older kfac-jax: pip install 'jax<0.9.2', or pip install "
      "--no-deps git+https://github.com/google-deepmind/kfac-jax"
    ) from None
