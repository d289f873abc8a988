"""A network computed in another precision than it was written in.

"bfloat16" rounds the operands and results of matrix products and convolutions, forward and
backward, to bfloat16, in whatever framework the network is written; the rest stays as it is.
Products inside loops, branches and functions with derivatives of their own are not rounded.
"float32" and "tensorfloat32" are JAX's settings of that name for products of float32 numbers. They
matter on GPUs and TPUs, which have faster and less precise products, and not on CPUs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from jaxinf.core.types import ApplyFn

PRECISIONS = (None, "float32", "tensorfloat32", "bfloat16")

# Calls without derivatives of their own, which alone are gone into.
_PLAIN_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CHECKPOINTS = ("checkpoint", "remat2")

_PRODUCTS = ("dot_general", "conv_general_dilated")
CALLS = {  # primitive → the parameter that holds its function
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat2": "jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
}


def in_precision(apply_fn: ApplyFn, precision: str | None) -> ApplyFn:
  """The network with its products in that precision; as it is where None.

  Raises:
    ValueError: there is no such precision.
  """
  if precision not in PRECISIONS:
    raise ValueError(f"Unknown precision {precision!r}; there are: {list(PRECISIONS)}.")
  if precision is None:
    return apply_fn

  def set_apart(*args: Any) -> jax.Array:
    with jax.default_matmul_precision(precision):
      return apply_fn(*args)

  def rounded(*args: Any) -> jax.Array:
    closed = jax.make_jaxpr(apply_fn)(*args)
    (out,) = _evaluated(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return out

  return rounded if precision == "bfloat16" else set_apart


def _evaluated(jaxpr: Any, consts: Sequence, args: Sequence) -> list:
  """The outputs of a trace, products rounded."""
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda v: v.val if isinstance(v, jex_core.Literal) else values[v]
  for eqn in jaxpr.eqns:
    inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
    if name in _PLAIN_CALLS + _CHECKPOINTS:
      inner = eqn.params[CALLS[name]]
      inner, inner_consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
      function: Callable = functools.partial(_evaluated, inner, inner_consts)
      if name in _CHECKPOINTS:
        options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
        function = jax.checkpoint(function, **options)
      outputs = function(inputs)
    elif name in _PRODUCTS and all(x.dtype == jnp.float32 for x in inputs):
      params = eqn.params | {"preferred_element_type": jnp.dtype(jnp.bfloat16), "precision": None}
      product = eqn.primitive.bind(*(x.astype(jnp.bfloat16) for x in inputs), **params)
      outputs = [product.astype(jnp.float32)]
    else:
      outputs = bind(eqn, inputs)
    values |= dict(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def bind(eqn: Any, values: list) -> list:
  """The outputs of one step of a trace for the values of its inputs."""
  if eqn.primitive.name == "layer_tag":  # declared by hand; find.py puts its own in its place
    return values[:1]
  found = eqn.primitive.get_bind_params(eqn.params)
  subfuns, params = found if isinstance(found, tuple) else ((), found)  # jax < 0.9.2, and later
  out = eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]
