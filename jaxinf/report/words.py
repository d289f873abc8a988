"""How numbers are written on pages and in figures: signs, errors, percents, powers, sizes."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Unit:
  """How scores are written: as multiples of 10^exponent, with `decimals` decimals."""

  exponent: int
  decimals: int

  def number(self, value: float, *, signed: bool = True) -> str:
    """The value with a typographic minus, and a plus where `signed`; nothing before a zero."""
    text = f"{value / 10.0**self.exponent:+.{self.decimals}f}"
    if float(text) == 0 or (not signed and text[0] == "+"):
      text = text[1:]
    return text.replace("-", "−")

  def error(self, std_error: float) -> str:
    """`± 0.12`, or nothing where the error is NaN."""
    return "" if math.isnan(std_error) else f"± {self.number(std_error, signed=False)}"

  def with_error(self, value: float, std_error: float) -> str:
    """`+1.23 ± 0.12`, or the value alone where the error is NaN."""
    return f"{self.number(value)} {self.error(std_error)}".rstrip()


def number(value: float, spec: str) -> str:
  """The value in a format such as ".2f", with a typographic minus; × where it is not finite."""
  return format(value, spec).replace("-", "−") if math.isfinite(value) else "×"


def with_error(mean: float, error: float | None = None, spec: str = ".3g") -> str:
  """`1.23 ± 0.04`, both in the format; the mean alone where the error is None or NaN."""
  if not math.isfinite(mean) or error is None or not math.isfinite(error):
    return number(mean, spec)
  return f"{number(mean, spec)} ± {number(error, spec)}"


def percent(mean: float, error: float | None = None) -> str:
  """A share in % with one decimal and no sign for %, as `41.2 ± 1.0`."""
  return with_error(100 * mean, None if error is None else 100 * error, ".1f")


def count(num: int) -> str:
  """12345 as `12,345`."""
  return f"{num:,}"


def memory(mib: float | None) -> str:
  """MiB, or GiB from 1024 MiB on; a dash where it is unknown."""
  if mib is None:
    return "–"
  return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def scientific(value: float) -> str:
  """0.00012 as `1.2 × 10⁻⁴`; numbers between 0.01 and 1000 as they are."""
  if value == 0 or 1e-2 <= abs(value) < 1e3:
    return f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"
  digits, exponent = f"{value:.1e}".split("e")
  digits = digits.removesuffix(".0")
  return power(int(exponent)) if digits == "1" else f"{digits} × {power(int(exponent))}"


def power(exponent: int) -> str:
  """−8 as `10⁻⁸`."""
  return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
