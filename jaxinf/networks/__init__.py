"""Networks by name: flax modules, model(x_t [B, …], t [B][, conditioning]) → the prediction."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxinf.core.types import Params
from jaxinf.diffusion.process import Process
from jaxinf.networks.mlp import MLP
from jaxinf.networks.unet import UNet


def build(
  name: str, fields: dict[str, Any], out_channels: int, num_classes: int | None = None
) -> nn.Module:
  """Returns the model `name` with the given fields; lists among them become tuples.

  Args:
    name: a key of MODELS.
    fields: the model's fields, all that have no default, but for the next two.
    out_channels: channels of the examples, known from the data set.
    num_classes: of its labels, likewise; None where the model is not given labels.

  Raises:
    ValueError: an unknown name, unknown or missing fields, or fields that the model refuses.
  """
  if name not in MODELS:
    raise ValueError(f"unknown model {name!r}; the models are {', '.join(sorted(MODELS))}")
  known = {
    field.name: field
    for field in dataclasses.fields(MODELS[name])
    if field.name not in ("parent", "name")
  }
  given = {"out_channels": out_channels, "num_classes": num_classes}
  from_data = {key: value for key, value in given.items() if known.pop(key, None)}
  if both := sorted(set(given) & set(fields)):
    raise ValueError(f"model {name!r}: leave out {', '.join(both)}, the data set gives it")
  unknown = sorted(set(fields) - set(known))
  if unknown:
    raise ValueError(f"model {name!r} has no fields {unknown}; it has {sorted(known)}")
  missing = sorted(
    key
    for key, field in known.items()
    if field.default is dataclasses.MISSING and key not in fields
  )
  if missing:
    raise ValueError(f"model {name!r} lacks the fields {missing}; it has {sorted(known)}")
  values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
  return MODELS[name](**values, **from_data)


def apply_fn_of(network: nn.Module, process: Process) -> Callable[..., jax.Array]:
  """The network as a function (params, inputs, time, …) for a process.

  These networks embed time as diffusers' do, for timesteps up to about a thousand. The times of
  continuous processes are of the order of one, and are therefore multiplied by a thousand.
  """
  scale = 1 if process.is_discrete else 1_000

  def apply_fn(params: Params, inputs: jax.Array, time: jax.Array, *given: Any, **how: Any) -> Any:
    return network.apply({"params": params}, inputs, scale * time, *given, **how)

  return apply_fn


def num_params(params: Any) -> int:
  """Returns the number of scalars in a pytree of arrays (or of shapes)."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


MODELS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP}
