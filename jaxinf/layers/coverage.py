"""The coverage contract: every parameter is in a Kronecker block, or declared diagonal or skipped.

Anything else stops the fit with a table parameter → block and the reason; nothing falls back to a
diagonal approximation in silence.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

import jax

from jaxinf.core.types import Params
from jaxinf.layers.specs import Layer, leaf_names

ADVICE = (
  "A parameter that enters nn.scan or nn.vmap, is used more than once, or is reshaped before its "
  "product is in no layer. Outside of loops, kfac_jax.register_dense(y, x, w, b) in the network "
  "declares a layer by hand."
)


# Left out by default. A network without normalisation may be given it all the same.
SKIP_NORMALISATION = (r"(?i)norm[^/]*/(scale|bias)$",)


@dataclasses.dataclass(frozen=True)
class Row:
  """What became of one parameter array: its block, "skipped", or None with the reason."""

  parameter: str
  shape: tuple[int, ...]
  block: str | None
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class Coverage:
  """The table of all parameters, in the order of jax.tree.leaves."""

  rows: tuple[Row, ...]

  @property
  def num_covered(self) -> int:
    """Parameters (numbers, not arrays) in blocks."""
    return sum(_size(row) for row in self.rows if row.block not in (None, "skipped"))

  @property
  def num_parameters(self) -> int:
    return sum(_size(row) for row in self.rows)

  @property
  def skipped(self) -> tuple[str, ...]:
    """Paths of the parameters that the skip list leaves out."""
    return tuple(row.parameter for row in self.rows if row.block == "skipped")

  def table(self) -> str:
    """The rows as aligned text."""
    width = max(len(row.parameter) for row in self.rows)
    return "\n".join(
      f"  {row.parameter:{width}}  {row.shape!s:20} {row.block or 'NOT COVERED: ' + row.reason}"
      for row in self.rows
    )

  def summary(self) -> str:
    share = self.num_covered / self.num_parameters
    return (
      f"{self.num_covered:,} of {self.num_parameters:,} parameters ({share:.1%}) in curvature "
      f"blocks; {len(self.skipped)} arrays skipped"
    )


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which parameters the curvature covers, and how: regular expressions found in their paths.

  Attributes:
    skip: parameters to leave out.
    diagonal: layers whose curvature is diagonal; scales and shifts have no other.
    only: parameters to keep, all others being left out; all where None.
  """

  skip: Sequence[str] = ()
  diagonal: Sequence[str] = ()
  only: Sequence[str] | None = None

  def __post_init__(self):
    for name in ("skip", "diagonal", "only"):
      patterns = getattr(self, name)
      if isinstance(patterns, str):
        raise ValueError(
          f"{name} must be a sequence of regular expressions; write {name}=({patterns!r},)."
        )
      for pattern in patterns or ():
        _check_expression(name, pattern)
      if patterns is not None:  # hashable: a selection is part of a key
        object.__setattr__(self, name, tuple(patterns))

  def as_dict(self) -> dict:
    """The fields as plain lists."""
    fields = dataclasses.asdict(self)
    return {name: None if value is None else list(value) for name, value in fields.items()}

  def skips(self, parameter: str) -> bool:
    """Whether a parameter is left out."""
    kept = self.only is None or any(re.search(p, parameter) for p in self.only)
    return not kept or any(re.search(p, parameter) for p in self.skip)

  def makes_diagonal(self, parameter: str) -> bool:
    """Whether a parameter's layer is declared diagonal."""
    return any(re.search(p, parameter) for p in self.diagonal)


def cover(
  layers: Sequence[Layer],
  params: Params,
  selection: Selection,
  reasons: Mapping[int, str],
) -> tuple[tuple[Layer, ...], Coverage]:
  """The layers that are covered, and the table.

  Args:
    layers: all that were found.
    params: the parameters.
    selection: what to leave out, and what is diagonal.
    reasons: leaf → why its layer, or the lack of one, stands in the way.

  Raises:
    ValueError: a parameter is in no layer and not skipped, a layer is skipped in part, an
      expression finds no parameter, or one of `diagonal` finds only what is skipped.
  """
  names, leaves = leaf_names(params), jax.tree.leaves(params)
  _check_expressions(selection, names)
  blocks: dict[int, str | None] = {i: None for i in range(len(names))}
  reasons = dict(reasons)
  covered = []
  for layer in layers:
    indices = [i for i in (layer.kernel, layer.bias) if i is not None]
    skipped = [selection.skips(names[i]) for i in indices]
    diagonal = all(selection.makes_diagonal(names[i]) for i in indices)
    if all(skipped):
      continue
    if any(skipped):
      reasons |= dict.fromkeys(
        indices, "its layer is skipped in part: skip the whole layer or nothing of it"
      )
    elif layer.structure == "diagonal" and not diagonal:
      reasons |= dict.fromkeys(
        indices, f"a {layer.kind} has no Kronecker factors: name it in `diagonal` or in `skip`"
      )
    elif not any(i in reasons for i in indices):
      layer = dataclasses.replace(layer, structure="diagonal") if diagonal else layer
      blocks |= dict.fromkeys(indices, f"{layer.kind} ({layer.structure})")
      covered.append(layer)
  for i, name in enumerate(names):
    if blocks[i] is None and selection.skips(name) and "in part" not in reasons.get(i, ""):
      blocks[i] = "skipped"
  coverage = Coverage(
    tuple(
      Row(names[i], tuple(leaves[i].shape), block, "" if block else reasons.get(i, ""))
      for i, block in blocks.items()
    )
  )
  if any(row.block is None for row in coverage.rows):
    raise ValueError(_complaint(coverage))
  if not covered:
    raise ValueError(f"No layer is left for the curvature: {selection} leaves out everything.")
  return tuple(covered), coverage


def _check_expressions(selection: Selection, names: Sequence[str]) -> None:
  """Raises ValueError where an expression finds nothing, or one of `diagonal` what is skipped."""
  for field in ("skip", "diagonal", "only"):
    for pattern in getattr(selection, field) or ():
      found = [name for name in names if re.search(pattern, name)]
      if not found and pattern not in SKIP_NORMALISATION:
        raise ValueError(f"{field}: {pattern!r} finds no parameter. {_like(pattern, names)}")
      if field == "diagonal" and found and all(map(selection.skips, found)):
        raise ValueError(
          f"diagonal: all that {pattern!r} finds is skipped, such as {found[0]}. To cover "
          "normalisation: fit_curvature(…, skip=(), diagonal=jaxinf.SKIP_NORMALISATION)."
        )


def _like(pattern: str, names: Sequence[str]) -> str:
  """The parameters whose paths are most like a pattern, as a hint."""
  close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
  return f"Expressions are searched for in paths such as {', '.join(map(repr, close))}."


def _complaint(coverage: Coverage) -> str:
  missing = [row for row in coverage.rows if row.block is None]
  layer, _, leaf = missing[0].parameter.rpartition("/")
  example = f"^{re.escape(layer)}/" if layer else f"^{re.escape(leaf)}$"
  return (
    f"{len(missing)} of {len(coverage.rows)} parameter arrays are in no curvature block:\n"
    f"{coverage.table()}\n"
    "Leave layers out by regular expressions on their paths, beside those for normalisation: "
    f'fit_curvature(…, skip=(*SKIP_NORMALISATION, r"{example}")). {ADVICE}'
  )


def _check_expression(name: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}.") from error


def _size(row: Row) -> int:
  return math.prod(row.shape)
