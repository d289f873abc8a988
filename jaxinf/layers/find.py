"""Finds the layers of any network in its trace, and tags them for kfac-jax.

A layer is known by how its parameter is used: one matrix product (Dense, DenseGeneral, attention
projections), one convolution (any number of axes, stride, padding, dilation, groups; transposed
too), one look-up (Embed), each with the bias added to it, or one element-wise product or sum (the
scale and shift of normalisation, learned positions). The tag carries a form: where inputs, outputs
and matrix lie in the arrays.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax

from jaxinf.core.types import Params
from jaxinf.layers.forms import ConvForm, DenseForm, ElementForm, EmbedForm, Form
from jaxinf.layers.jaxpr import Step, Trace, View, trace


@dataclasses.dataclass(frozen=True)
class Site:
  """A layer in a trace: its parameters' leaves, and the variables of its input and output."""

  form: Form
  kernel: int
  bias: int | None
  x: int
  y: int
  last: Step


def tagged(apply_fn: Callable, batches: Mapping[int, tuple[int, int]]) -> Callable:
  """`apply_fn` with a kfac-jax tag around every layer that is found.

  The tag's input and output have the batch first; `batches` says where it stands in the network's
  (see `find_batches`; first where a layer is missing).
  """

  def run(params: Params, *inputs: Any) -> Any:
    traced = trace(apply_fn, params, *inputs)
    sites, _ = find_layers(traced, len(jax.tree.leaves(params)))
    ends: dict[int, list[Site]] = collections.defaultdict(list)
    for site in sites:
      ends[id(site.last)].append(site)
    leaves = jax.tree.leaves((params, inputs))

    def tag(values, step):
      for site in ends.get(id(step), ()):
        x, y = batches.get(site.kernel, (0, 0))
        out = kfac_jax.register_dense(
          jnp.moveaxis(values[site.y], y, 0),
          jnp.moveaxis(values[site.x], x, 0),
          leaves[site.kernel],
          None if site.bias is None else leaves[site.bias],
          variant=site.form.kind,
          form=site.form.batch_first(x, y),
        )
        values[site.y] = jnp.moveaxis(out, 0, y)

    return traced.evaluate(leaves, tag)

  return run


def find_batches(
  apply_fn: Callable, params: Params, inputs: tuple, larger: tuple
) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
  """Kernel's leaf → the axes of the batch in its layer's input and output; and why in none.

  Shapes at two batch sizes tell a batch axis from an axis that happens to be as long.

  Args:
    apply_fn: the network.
    params: the parameters.
    inputs: of the network, with the batch on their first axes.
    larger: likewise, with more examples.
  """
  sizes = [len(jax.tree.leaves(given)[0]) for given in (inputs, larger)]
  shapes: list[dict[int, tuple]] = []
  for given in (inputs, larger):
    traced = trace(apply_fn, params, *given)
    sites, reasons = find_layers(traced, len(jax.tree.leaves(params)))
    shapes.append({s.kernel: (traced.shapes[s.x], traced.shapes[s.y]) for s in sites})
  batches = {}
  for site in sites:
    pairs = list(zip(shapes[0].get(site.kernel, ()), shapes[1][site.kernel], strict=False))
    x, y = (*(_batch_axis(small, large, sizes) for small, large in pairs), None, None)[:2]
    if x is None or y is None:
      why = _without_batch(pairs, sizes)
      reasons |= {leaf: why for leaf in (site.kernel, site.bias) if leaf is not None}
    else:
      batches[site.kernel] = (x, y)
  return batches, reasons


def _batch_axis(small: tuple[int, ...], large: tuple[int, ...], sizes: Sequence[int]) -> int | None:
  """The only axis in which shapes differ, if these are the batch sizes there; else None."""
  differ = _differing(small, large)
  if len(small) != len(large) or len(differ) != 1:
    return None
  return differ[0] if [small[differ[0]], large[differ[0]]] == list(sizes) else None


def _differing(small: tuple[int, ...], large: tuple[int, ...]) -> list[int]:
  """Axes in which two shapes differ."""
  return [axis for axis, pair in enumerate(zip(small, large, strict=False)) if pair[0] != pair[1]]


def _without_batch(pairs: Sequence[tuple[tuple, tuple]], sizes: Sequence[int]) -> str:
  """Why a layer with these shapes, (small, large) of its input and output, has no batch axis."""
  for small, large in pairs:
    for axis in _differing(small, large):
      times, rest = divmod(small[axis], sizes[0])
      if times > 1 and not rest and large[axis] == times * sizes[1]:
        return (
          f"the batch is flattened together with another axis, [B · {times}, …]: keep the batch on "
          f"an axis of its own, [B, {times}, …]"
        )
  return "its inputs or outputs have no axis that is the batch and nothing else"


def find_layers(traced: Trace, num_leaves: int) -> tuple[list[Site], dict[int, str]]:
  """The layers, and leaf → why it is in none."""
  sites, reasons = _declared(traced)
  taken = {leaf for site in sites for leaf in (site.kernel, site.bias)}
  uses: dict[int, list[tuple[Step, View]]] = collections.defaultdict(list)
  readers: dict[int, list[Step]] = collections.defaultdict(list)
  for step in traced.steps:
    for i in step.inputs:
      readers[i].append(step)
      if i in traced.views and traced.views.keys().isdisjoint(step.outputs):
        uses[traced.views[i].leaf].append((step, traced.views[i]))
  single = {leaf: found[0] for leaf, found in uses.items() if len(found) == 1}
  for leaf in range(num_leaves):
    if leaf in taken or leaf in reasons:
      single.pop(leaf, None)
    elif leaf not in uses:
      reasons[leaf] = "the network does not use it"
    elif leaf not in single:
      reasons[leaf] = f"it is used {len(uses[leaf])} times: shared parameters have no block"
  biases = set()
  for leaf in sorted(single, key=lambda leaf: single[leaf][0].name in ("add", "mul")):
    if leaf in biases:
      continue
    step, view = single[leaf]
    found = _layer(traced, step, view)
    if isinstance(found, str):
      reasons[leaf] = found
      continue
    form, x = found
    site = _with_bias(traced, readers, single, Site(form, leaf, None, x, step.outputs[0], step))
    biases.add(site.bias)
    sites.append(site)
  return sites, reasons


def _declared(traced: Trace) -> tuple[list[Site], dict[int, str]]:
  """Layers declared by kfac_jax.register_dense(y, x, w, b), and leaf → what is wrong with one."""
  sites: list[Site] = []
  reasons: dict[int, str] = {}
  for step in traced.steps:
    if step.name != "layer_tag":
      continue
    y, x, *params = step.inputs
    views = [traced.views[i] for i in params if i in traced.views]
    whole = all(view.axes == tuple(range(len(view.leaf_shape))) for view in views)
    dense = [len(view.leaf_shape) for view in views] in ([2], [2, 1])
    if len(views) < len(params) or not whole or not dense:
      why = "it is declared by hand, but not as register_dense(y, x, W [d_in, d_out], b [d_out])"
      reasons |= {view.leaf: why for view in views}
      continue
    axes = tuple((len(traced.shapes[i]) - 1,) for i in (x, y))
    leaves = [view.leaf for view in views]
    form = DenseForm(kernel_out=(1,), kernel_in=(0,), x_in=axes[0], y_out=axes[1])
    sites.append(Site(form, leaves[0], (*leaves, None)[1], x, step.outputs[0], step))
  return sites, reasons


def _layer(traced: Trace, step: Step, view: View) -> tuple[Form, int] | str:
  """The form of the layer whose parameter `step` uses, and its input variable; or why none."""
  place = next(i for i, v in enumerate(step.inputs) if traced.views.get(v) is view)
  others = [v for i, v in enumerate(step.inputs) if i != place]
  names = ("dot_general", "conv_general_dilated", "gather", "mul", "add")
  if step.name in names and any(v in traced.views for v in others):
    return "it is combined with another parameter before it meets the data"
  if step.name == "dot_general":
    return _dense(step, view, place, traced.shapes[others[0]])
  if step.name == "conv_general_dilated" and place == 1:
    return _conv(step, view, others[0])
  if step.name == "gather" and place == 0:
    return _embed(step, view, others[0])
  kind = {"mul": "scale", "add": "shift"}.get(step.name)
  if kind is None:
    return f"kfac-jax has no block for a parameter that enters `{step.name}`"
  if not traced.shapes[others[0]]:
    return "it is multiplied by a constant before it meets the data"
  return ElementForm(kind, view.axes), others[0]


def _dense(step: Step, view: View, place: int, x_shape: tuple[int, ...]):
  contracted, batched = step.eqn.params["dimension_numbers"]
  if batched[0] or batched[1]:
    return "it is a batch of matrices (nn.vmap), which has no block"
  if None in view.axes or len(view.axes) != len(view.shape):
    return "its kernel is reshaped before use"
  leaf_axis = {axis: i for i, axis in enumerate(view.axes)}
  kernel_in = tuple(leaf_axis[axis] for axis in contracted[place])
  free = [axis for axis in range(len(view.shape)) if axis not in contracted[place]]
  kernel_out = tuple(leaf_axis[axis] for axis in free)
  x_in = tuple(contracted[1 - place])
  first = 0 if place == 0 else len(x_shape) - len(x_in)  # the left operand's axes come first
  y_out = tuple(range(first, first + len(free)))
  x = step.inputs[1 - place]
  return DenseForm(kernel_out, kernel_in, x_in, y_out), x


def _conv(step: Step, view: View, x: int):
  params = step.eqn.params
  if view.axes != tuple(range(len(view.shape))):
    return "its kernel is transposed or reshaped before use"
  if params["batch_group_count"] != 1:
    return "a convolution with groups of batches has no block"
  numbers = params["dimension_numbers"]
  form = ConvForm(
    strides=tuple(params["window_strides"]),
    padding=tuple(map(tuple, params["padding"])),
    lhs_dilation=tuple(params["lhs_dilation"]),
    rhs_dilation=tuple(params["rhs_dilation"]),
    groups=params["feature_group_count"],
    x_spec=tuple(numbers.lhs_spec),
    kernel_spec=tuple(numbers.rhs_spec),
    y_spec=tuple(numbers.out_spec),
  )
  return form, x


def _embed(step: Step, view: View, indices: int):
  numbers = step.eqn.params["dimension_numbers"]
  rank = len(step.eqn.outvars[0].aval.shape)
  rows = (
    view.axes == (0, 1)
    and tuple(step.eqn.params["slice_sizes"]) == (1, view.shape[1])
    and numbers.start_index_map in ((0,), (0, 1))  # table[i] of a number i also names a column
    and numbers.collapsed_slice_dims in ((), (0,))
    and numbers.offset_dims in ((rank - 1,), (rank - 2, rank - 1))
  )
  if not rows:
    return "it is indexed, and not by rows as nn.Embed does"
  return EmbedForm(), indices


def _with_bias(
  traced: Trace,
  readers: Mapping[int, Sequence[Step]],
  single: Mapping[int, tuple[Step, View]],
  site: Site,
) -> Site:
  """The layer with the bias that is added to its output, where there is one."""
  form, y, y_out, shape = site.form, site.y, site.form.y_out, traced.shapes[site.y]
  while y_out and len(readers[y]) == 1 and y not in traced.outputs:
    (step,) = readers[y]
    same = traced.shapes[y] == shape  # reshapes that lead back to a shape lead back to the array
    if step.name in ("convert_element_type", "reshape", "squeeze"):
      y = step.outputs[0]
    elif step.name == "transpose" and isinstance(form, DenseForm) and same:
      y_out = tuple(step.eqn.params["permutation"].index(axis) for axis in y_out)
      form, y = dataclasses.replace(form, y_out=y_out), step.outputs[0]
      shape = traced.shapes[y]
    elif step.name == "add" and same:
      (other,) = [i for i in step.inputs if i != y] or [y]
      view = traced.views.get(other)
      if view is None or view.leaf not in single:
        return site
      # Axes of length 1 don't matter: Equinox keeps a convolution's bias as [C, 1, 1].
      found = [pair for pair in zip(view.axes, view.leaf_shape, strict=True) if pair[1] != 1]
      if found != [(axis, shape[axis]) for axis in y_out if shape[axis] != 1]:
        return site
      return dataclasses.replace(site, form=form, bias=view.leaf, y=step.outputs[0], last=step)
    else:
      return site
  return site
