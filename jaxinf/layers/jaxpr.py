"""A network's trace as one flat list of steps, and which arrays in it are views of parameters.

Calls that parameters enter (`jit`, `remat`, custom derivatives) are inlined, so that a layer is
found wherever it stands. Loops are not: a parameter that enters a `scan` stays unexplained.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend as jex
import numpy as np

from jaxinf.core.types import Params
from jaxinf.layers.precision import CALLS, bind


@dataclasses.dataclass(frozen=True)
class View:
  """An array that shows one parameter, its axes moved or repeated.

  Attributes:
    leaf: position of the parameter among the leaves.
    axes: where each of its axes stands in the array; None for an axis of length 1 that is gone.
    shape: of the array.
    leaf_shape: of the parameter.
  """

  leaf: int
  axes: tuple[int | None, ...]
  shape: tuple[int, ...]
  leaf_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
  """One primitive, from variables to variables; a variable is a number."""

  eqn: Any
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def name(self) -> str:
    return self.eqn.primitive.name


@dataclasses.dataclass(frozen=True)
class Trace:
  """A network as steps.

  Attributes:
    steps: in order.
    inputs: variables of the parameters' leaves, then of the other inputs.
    outputs: variables of the outputs.
    constants: variable → value.
    shapes: variable → its shape.
    views: variable → the parameter it shows.
    treedef: of the outputs.
  """

  steps: Sequence[Step]
  inputs: Sequence[int]
  outputs: Sequence[int]
  constants: Mapping[int, Any]
  shapes: Mapping[int, tuple[int, ...]]
  views: Mapping[int, View]
  treedef: Any

  def evaluate(self, leaves: Sequence, after: Callable[[dict, Step], None]) -> Any:
    """Runs the steps; `after(values, step)` may replace values that a step has made."""
    values = dict(self.constants) | dict(zip(self.inputs, leaves, strict=True))
    for step in self.steps:
      out = bind(step.eqn, [values[i] for i in step.inputs])
      values.update(zip(step.outputs, out, strict=True))
      after(values, step)
    return jax.tree.unflatten(self.treedef, [values[i] for i in self.outputs])


def trace(apply_fn: Callable, params: Params, *inputs: Any) -> Trace:
  """The trace of apply_fn(params, *inputs); only shapes and types of the arguments matter."""
  closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
  builder = _Builder()
  arguments = [builder.variable(v.aval.shape) for v in closed.jaxpr.invars]
  for leaf, array in enumerate(jax.tree.leaves(params)):
    shape_of, axes = tuple(np.shape(array)), tuple(range(np.ndim(array)))
    builder.views[arguments[leaf]] = View(leaf, axes, shape_of, shape_of)
  outputs = builder.inline(closed.jaxpr, closed.consts, arguments)
  return Trace(
    builder.steps, arguments, outputs, builder.constants, builder.shapes, builder.views,
    jax.tree.structure(shape),
  )  # fmt: skip


class _Builder:
  def __init__(self):
    self._numbers = itertools.count()
    self.steps: list[Step] = []
    self.constants: dict[int, Any] = {}
    self.shapes: dict[int, tuple[int, ...]] = {}
    self.views: dict[int, View] = {}

  def variable(self, shape: tuple[int, ...]) -> int:
    number = next(self._numbers)
    self.shapes[number] = tuple(shape)
    return number

  def constant(self, value: Any) -> int:
    number = self.variable(np.shape(value))
    self.constants[number] = value
    return number

  def inline(self, jaxpr: Any, consts: Sequence, arguments: Sequence[int]) -> list[int]:
    """Adds the steps of a function applied to variables; returns its output variables."""
    env = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
    env |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
      return self.constant(atom.val) if isinstance(atom, jex.core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
      inputs = tuple(map(read, eqn.invars))
      called = CALLS.get(eqn.primitive.name)
      if called and any(i in self.views for i in inputs):
        inner = eqn.params[called]
        plain = isinstance(inner, jex.core.Jaxpr)
        body, values = (inner, ()) if plain else (inner.jaxpr, inner.consts)
        outputs = self.inline(body, values, inputs)
      else:
        outputs = [self.variable(v.aval.shape) for v in eqn.outvars]
        self.steps.append(Step(eqn, inputs, tuple(outputs)))
        if len(inputs) == 1 and inputs[0] in self.views:
          view = _viewed(eqn, self.views[inputs[0]])
          if view is not None:
            self.views[outputs[0]] = view
      env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _viewed(eqn: Any, view: View) -> View | None:
  """What an array made by a primitive from a view shows; None where it is no view any more."""
  shape = tuple(eqn.outvars[0].aval.shape)
  move: list[int | None] | None = None
  match eqn.primitive.name:
    case "convert_element_type" | "copy":
      move = list(range(len(shape)))
    case "transpose":
      permutation = eqn.params["permutation"]
      move = [permutation.index(axis) for axis in range(len(shape))]
    case "broadcast_in_dim":
      move = list(eqn.params["broadcast_dimensions"])
    case "squeeze" | "reshape":
      move = _kept_axes(view.shape, shape)
  if move is None:
    return None
  axes = tuple(None if axis is None else move[axis] for axis in view.axes)
  return dataclasses.replace(view, axes=axes, shape=shape)


def _kept_axes(old: tuple[int, ...], new: tuple[int, ...]) -> list[int | None] | None:
  """Where the axes go in a reshape that only adds or drops axes of length 1; None otherwise."""
  if old == new:
    return list(range(len(old)))
  long = [axis for axis, size in enumerate(new) if size != 1]
  if [size for size in old if size != 1] != [new[axis] for axis in long]:
    return None
  places = iter(long)
  return [None if size == 1 else next(places) for size in old]
