"""Names: one table a kind of thing, and one error for a name that is in none."""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def named(table: Mapping[str, Value], name: object, what: str) -> Value:
  """table[name]; a ValueError that lists the names where there is none, and calls it `what`."""
  if not isinstance(name, str) or name not in table:
    raise ValueError(f"Unknown {what} {name!r}; there are: {', '.join(table)}.")
  return table[name]
