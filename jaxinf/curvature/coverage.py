"""The coverage contract: every parameter is in a Kronecker block or in a declared skip list.

Anything else stops the fit with a table parameter → block and the reason; nothing falls back to a
diagonal approximation in silence.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import kfac_jax

from jaxinf.curvature.blocks import KroneckerBlock
from jaxinf.curvature.layers import Layer, layer_name, leaf_names
from jaxinf.types import Params

ADVICE = (
  "Ordinary dense and convolution layers are found where apply_fn is not under jit, in float32, "
  "and without shared parameters, nn.scan, nn.vmap or nn.remat: kfac-jax reads its plain trace."
)


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
    """Parameters (numbers, not arrays) in Kronecker blocks."""
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
      f"{self.num_covered:,} of {self.num_parameters:,} parameters ({share:.1%}) in Kronecker "
      f"blocks; {len(self.skipped)} arrays skipped"
    )


def cover(
  blocks: Mapping[tuple[int, ...], kfac_jax.CurvatureBlock],
  params: Params,
  skip: Sequence[str],
  objections: Mapping[tuple[int, ...], str],
) -> tuple[tuple[Layer, ...], Coverage]:
  """The layers that are covered, and the table.

  Args:
    blocks: positions of parameters among the leaves → the block registered for them.
    params: the parameters.
    objections: like `blocks`, why a Kronecker block cannot be used after all.
    skip: regular expressions; a parameter whose path matches one anywhere is left out.

  Raises:
    ValueError: a parameter is in no Kronecker block and not skipped, a layer is skipped in part,
      or a regular expression is malformed.
  """
  patterns = [_compiled(pattern) for pattern in skip]
  names, leaves = leaf_names(params), jax.tree.leaves(params)
  layers, rows = [], {}
  for indices, block in blocks.items():
    skipped = [any(p.search(names[i]) for p in patterns) for i in indices]
    reason = getattr(block, "reason", objections.get(indices, ""))
    kronecker = block if isinstance(block, KroneckerBlock) and not reason else None
    what = None
    if all(skipped):
      what = "skipped"
    elif any(skipped):
      reason = "its layer is skipped in part: skip the whole layer or nothing of it"
    elif kronecker is not None:
      what = f"{kronecker.kind} (K-FAC expand)"
      layers.append(_layer(kronecker, indices, names))
    for i in indices:
      rows[i] = Row(names[i], tuple(leaves[i].shape), what, reason)
  coverage = Coverage(tuple(rows[i] for i in sorted(rows)))
  if any(row.block is None for row in coverage.rows):
    raise ValueError(_complaint(coverage))
  if not layers:
    raise ValueError(
      f"No layer is left for the curvature; skip={list(skip)} leaves out everything."
    )
  return tuple(layers), coverage


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


def _layer(block: KroneckerBlock, indices: tuple[int, ...], names: list[str]) -> Layer:
  return Layer(
    name=layer_name(names[indices[0]]),
    kind=block.kind,
    kernel=indices[0],
    bias=indices[1] if len(indices) == 2 else None,
    kernel_shape=tuple(block.parameters_shapes[0]),
    order=block.kernel_order,
  )


def _compiled(pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(f"skip: {pattern!r} is not a regular expression: {error}.") from error


def _size(row: Row) -> int:
  return math.prod(row.shape)
