"""A name gives its entry, or an error that says which names there are."""

import pytest

from jaxinf.core.registry import named


def test_a_name_gives_its_entry():
  assert named({"a": 1, "b": None}, "b", "thing") is None


@pytest.mark.parametrize("name", ["c", "A", "", None, 1, ("a",), ["a"]])
def test_other_names_are_refused_with_those_there_are(name):
  with pytest.raises(ValueError, match=r"^Unknown thing .*; there are: a, b\.$") as error:
    named({"a": 1, "b": 2}, name, "thing")
  assert repr(name) in str(error.value)
