"""How numbers are written."""

import numpy as np
import pytest

from jaxinf.report.words import Unit, memory, number, percent, scientific, with_error


def test_numbers_are_set_with_signs_and_a_plain_zero():
  unit = Unit(exponent=-3, decimals=1)
  assert unit.number(0.0123) == "+12.3"
  assert unit.number(-0.0123) == "−12.3"
  assert unit.number(-0.00001) == "0.0"
  assert unit.with_error(0.0123, 0.002) == "+12.3 ± 2.0"
  assert unit.with_error(0.0123, float("nan")) == "+12.3"


def test_numbers_have_typographic_signs_and_crosses_where_there_are_none():
  assert number(-0.25, ".1f") == "−0.2" and number(np.nan, ".1f") == number(np.inf, "g") == "×"
  assert with_error(-1.234, 0.0567) == "−1.23 ± 0.0567"
  assert with_error(1.5, np.nan) == with_error(1.5) == "1.5"
  assert with_error(np.nan, 0.1) == "×"


def test_shares_are_percents_with_one_decimal():
  assert percent(-0.012, 0.004) == "−1.2 ± 0.4" and percent(np.nan) == "×"
  assert percent(0.7, np.nan) == "70.0"


@pytest.mark.parametrize(
  "value, text",
  [(1.2e-4, "1.2 × 10⁻⁴"), (1e-8, "10⁻⁸"), (2e5, "2 × 10⁵"), (0.05, "0.05"), (123.4, "123")],
)
def test_small_and_large_numbers_are_powers_of_ten(value, text):
  assert scientific(value) == text


def test_memory_is_in_gib_from_one_on():
  assert (memory(None), memory(512.4), memory(2048)) == ("–", "512 MiB", "2.0 GiB")
