"""What can be chosen by name: literal tables, and the one error for a name that they lack."""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def named(table: Mapping[str, Entry], name: str, what: str) -> Entry:
  """The entry of a table; ValueError that lists the names for one that it lacks.

  Args:
    table: name → entry.
    name: of the entry.
    what: an entry is, such as "method".
  """
  if name not in table:
    raise ValueError(f"Unknown {what} {name!r}; there are: {', '.join(table)}.")
  return table[name]
