"""The object that is attributed: a trained diffusion model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinf.core.types import ApplyFn, Params, PyTree
from jaxinf.diffusion.noise import network_output
from jaxinf.diffusion.process import Process
from jaxinf.diffusion.schedule import Schedule

PARAMETER_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DiffusionModel:
  """A diffusion or flow model whose samples are to be explained.

  Attributes:
    apply_fn: apply_fn(params, inputs [B, …], time [B]) → [B, …], what the process says that the
      network predicts: any JAX function, with dropout off and not under `jit` (curvature is
      registered from its trace). Inputs are float32; time is int32 where the process is discrete,
      and float32 otherwise. A conditional model is apply_fn(params, inputs, time, conditioning),
      with a pytree of arrays [B, …].
    params: pytree of float32, bfloat16 or float16 arrays; the EMA parameters where training kept
      them. Kept as JAX arrays: what is done to NumPy arrays later changes nothing.
    process: how the model was trained: its noise, what it predicts, the weights of its loss.
    cache: what is found once about the model, such as its layers, by whoever finds it.

  Raises:
    ValueError: apply_fn is no function, process is no Process, or a parameter has another type.
  """

  apply_fn: ApplyFn
  params: Params
  process: Process
  cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not callable(self.apply_fn):
      raise ValueError(
        f"apply_fn must be a function (params, inputs, time) → output; got {self.apply_fn!r}."
      )
    try:
      hash(self.apply_fn)
    except TypeError as error:
      raise ValueError(
        "apply_fn has no hash, by which compiled programs are found again: wrap it in a function, "
        "as in lambda params, inputs, time: …"
      ) from error
    if isinstance(self.process, Schedule):
      raise ValueError(
        "process must be a jaxinf.Process: Process.epsilon(schedule) for a network that predicts "
        "the noise of that schedule."
      )
    if not isinstance(self.process, Process):
      raise ValueError(
        "process must be a jaxinf.Process, such as Process.epsilon(schedule) or Process.flow(); "
        f"got {type(self.process).__name__}."
      )
    kept = jax.tree_util.tree_map_with_path(_checked_parameter, self.params)
    object.__setattr__(self, "params", kept)

  def __repr__(self) -> str:
    num = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    return f"DiffusionModel({num:,} parameters, {self.process})"

  def with_params(self, params: Params) -> "DiffusionModel":
    """The model with other parameters of the same shapes; both share one cache."""
    return dataclasses.replace(self, params=params)

  def check_inputs(self, shape: tuple[int, ...], conditioning: PyTree = None) -> None:
    """Raises ValueError unless the model maps inputs [B, *shape] to their like.

    Args:
      shape: of one example, as (H, W, C), (L, C) or (D,).
      conditioning: pytree of arrays [N, …] whose rows the model is given; None for none.
    """
    two_rows = lambda shape, dtype: jax.ShapeDtypeStruct((2, *shape), dtype)
    inputs = two_rows(shape, jnp.float32)
    time = two_rows((), jnp.int32 if self.process.is_discrete else jnp.float32)
    given = jax.tree.map(lambda x: two_rows(x.shape[1:], x.dtype), conditioning)
    network = lambda *operands: network_output(self.apply_fn, *operands)
    try:
      output = jax.eval_shape(network, self.params, inputs, time, given)
    except Exception as error:
      call, what = "apply_fn(params, inputs, time)", ""
      if conditioning is not None:
        call, what = "apply_fn(params, inputs, time, conditioning)", f" and conditioning {given}"
      raise ValueError(
        f"{call} fails for inputs {inputs.shape} float32, time {time.shape} {time.dtype}{what}: "
        f"{error}"
      ) from error
    if output.shape != inputs.shape:
      raise ValueError(
        f"apply_fn must return an array with the shape of its inputs {inputs.shape}; it returns "
        f"{output.shape}."
      )


def _checked_parameter(path: Any, leaf: Any) -> Any:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None or dtype not in PARAMETER_TYPES:
    raise ValueError(
      f"Parameter {jax.tree_util.keystr(path)} is {dtype or type(leaf).__name__}, not float32, "
      "bfloat16 or float16: cast with jax.tree.map(lambda x: x.astype('float32'), params)."
    )
  return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.array(leaf)
