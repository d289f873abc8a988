"""A network computed in another precision than it was written in.

"bfloat16" rounds the operands and results of matrix products and convolutions, forward and
backward, to bfloat16, whatever the network is made of; the rest stays as it is. "float32" and
"tensorfloat32" are JAX's settings of that name for products of float32 numbers, which matter on
devices with faster and less precise ones (GPUs, TPUs) and not on CPUs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from jaxinf.types import ApplyFn

PRECISIONS = (None, "float32", "tensorfloat32", "bfloat16")

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
  """The outputs of a trace, products rounded; loops and branches are left as they are."""
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda v: v.val if isinstance(v, jex_core.Literal) else values[v]
  for eqn in jaxpr.eqns:
    inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
    if name in CALLS:
      inner = eqn.params[CALLS[name]]
      inner, inner_consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
      outputs = _evaluated(inner, inner_consts, inputs)
    elif name in _PRODUCTS and all(x.dtype == jnp.float32 for x in inputs):
      params = eqn.params | {"preferred_element_type": jnp.dtype(jnp.bfloat16), "precision": None}
      product = eqn.primitive.bind(*(x.astype(jnp.bfloat16) for x in inputs), **params)
      outputs = [product.astype(jnp.float32)]
    else:
      subfuns, params = eqn.primitive.get_bind_params(eqn.params)
      found = eqn.primitive.bind(*subfuns, *inputs, **params)
      outputs = found if eqn.primitive.multiple_results else [found]
    values |= dict(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]
