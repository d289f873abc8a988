"""What a model is made of, and the inputs that it is asked with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinf.diffusion.model import DiffusionModel
from jaxinf.diffusion.process import Process
from tests import nets
from tests.processes import PROCESSES

EPSILON = PROCESSES["epsilon"]


def conditional_model(process=EPSILON):
  params = nets.random_params(nets.CONDITIONAL_SHAPES)
  return DiffusionModel(nets.conditional_net, params, process)


def test_a_model_is_asked_with_the_inputs_that_it_will_get():
  model = conditional_model()
  labels = np.arange(5, dtype=np.int32)
  model.check_inputs((4, 4, 1), labels)
  with pytest.raises(ValueError, match=r"apply_fn\(params, inputs, time\) fails .*labels"):
    model.check_inputs((4, 4, 1))
  alone = DiffusionModel(nets.conv_net, nets.random_params(nets.CONV_SHAPES), EPSILON)
  with pytest.raises(ValueError, match=r"apply_fn\(params, inputs, time, conditioning\) fails"):
    alone.check_inputs((4, 4, 1), labels)
  with pytest.raises(ValueError, match=r"fails .* and conditioning .*shape=\(2, 7\)"):
    model.check_inputs((4, 4, 1), np.zeros((5, 7), np.int32))


@pytest.mark.parametrize("process", [EPSILON, PROCESSES["edm"]], ids=["discrete", "continuous"])
@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 4, 4, 1)], ids=str)
def test_inputs_of_any_rank_come_with_the_time_of_the_process(process, shape):
  given = []

  def apply_fn(params, inputs, time):
    given.append((inputs.shape, time.shape, time.dtype))
    return inputs

  DiffusionModel(apply_fn, {}, process).check_inputs(shape)
  dtype = jnp.int32 if process.is_discrete else jnp.float32
  assert given == [((2, *shape), (2,), dtype)]


def test_the_output_must_have_the_shape_of_the_input():
  model = DiffusionModel(lambda params, x_t, t, labels: labels, {}, EPSILON)
  message = r"with the shape of its inputs \(2, 4, 4, 1\); it returns \(2,\)"
  with pytest.raises(ValueError, match=message):
    model.check_inputs((4, 4, 1), np.arange(5, dtype=np.int32))


def test_later_changes_of_numpy_parameters_change_nothing():
  params = {"scale": np.ones(2, np.float32)}
  model = DiffusionModel(lambda params, x_t, t: params["scale"] * x_t, params, EPSILON)
  params["scale"][:] = 3
  np.testing.assert_array_equal(model.params["scale"], [1, 1])
  assert isinstance(model.params["scale"], jax.Array)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_floating_parameters_keep_their_type(dtype):
  model = DiffusionModel(lambda params, x_t, t: x_t, {"w": jnp.ones(3, dtype)}, EPSILON)
  assert model.params["w"].dtype == dtype


@pytest.mark.parametrize(
  ("parameter", "found"), [(np.ones(2), "float64"), (np.arange(2), "int64"), (1.0, "float")]
)
def test_other_parameters_are_refused_with_the_cast(parameter, found):
  message = rf"Parameter \['w'\] is {found}, .*cast with jax.tree.map\(lambda x: x.astype"
  with pytest.raises(ValueError, match=message):
    DiffusionModel(lambda params, x_t, t: x_t, {"w": parameter}, EPSILON)


def test_other_parameters_share_what_was_found():
  model = conditional_model()
  model.cache["layers"] = 3
  other = model.with_params(jax.tree.map(lambda x: 2 * x, model.params))
  assert other.cache is model.cache and other.process is model.process
  np.testing.assert_array_equal(other.params["out"]["bias"], 2 * model.params["out"]["bias"])
  assert "cache" not in repr(model)
  assert repr(model).startswith("DiffusionModel(211 parameters, Process.epsilon(Schedule.linear(")


def test_what_is_no_model_is_refused_with_what_to_do():
  with pytest.raises(ValueError, match="apply_fn must be a function"):
    DiffusionModel({}, lambda params, x_t, t: x_t, EPSILON)
  with pytest.raises(ValueError, match=r"Process.epsilon\(schedule\) for a network that predicts"):
    conditional_model(EPSILON.schedule)
  with pytest.raises(ValueError, match=r"such as Process.epsilon\(schedule\).*; got type"):
    conditional_model(Process)
