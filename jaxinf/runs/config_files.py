"""Which file --config means: a config that comes with jaxinf by its name, any other by its path.

A config file is Python with a function `get_config()`, which returns a ConfigDict. Those that come
with jaxinf are the package `jaxinf.configs`, in a checkout the folder configs/.
"""

import re
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "configs"

CONFIGS = tuple(sorted(path.stem for path in _FOLDER.glob("[a-z]*.py")))


def config_path(given: str) -> Path:
  """The file of a config.

  Args:
    given: a name of CONFIGS, or a path. configs/NAME.py where there is no such file is the config
      of that name, so that commands as the documentation has them work in any folder.

  Raises:
    ValueError: there is neither.
  """
  path, name = Path(given).expanduser(), given.removeprefix("configs/").removesuffix(".py")
  if path.is_file():
    return path
  if name in CONFIGS and given in (name, f"configs/{name}.py"):
    return _FOLDER / f"{name}.py"
  raise ValueError(
    f"--config={given} is no file, and no config that comes with jaxinf: {', '.join(CONFIGS)}. "
    "jaxinf new my_config.py writes one of your own."
  )


def arranged(words: Sequence[str]) -> list[str]:
  """The words of a command line with --config=FILE first, which flags for its fields may follow.

  Raises:
    ValueError: there is no such file, or fields are changed and there is no config.
  """
  given, rest, left = None, [], iter(words)
  for word in left:
    if re.fullmatch("--?config", word):
      given = next(left, "")
    elif found := re.fullmatch("--?config=(.*)", word, re.DOTALL):
      given = found[1]
    else:
      rest.append(word)
  changes = [word for word in rest if re.match(r"--?(no)?config\.", word)]
  if given is None and changes:
    raise ValueError(
      f"{changes[0]} changes a field of a config, and none is named: give --config too, such as "
      "--config=digits."
    )
  if given is None:
    return rest
  name, colon, argument = given.partition(":")  # after a colon: what get_config is given
  return [f"--config={config_path(name)}{colon}{argument}", *rest]
