"""What enters the library with a task: conditioning and the inputs of a model."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxinf
from jaxinf.diffusion.model import checked_conditioning
from tests import nets


def test_conditioning_keeps_its_values_and_form():
  given = {"labels": [np.arange(3)], "mask": jnp.array([True, False, True]), "text": None}
  checked = checked_conditioning(given, 3, "c")
  assert checked.keys() == given.keys() and checked["text"] is None
  np.testing.assert_array_equal(checked["labels"][0], np.int32([0, 1, 2]), strict=True)
  np.testing.assert_array_equal(checked["mask"], [True, False, True], strict=True)
  assert checked_conditioning(None, 3, "c") is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floating_conditioning_passes_through(dtype):
  text = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(dtype)
  np.testing.assert_array_equal(checked_conditioning(text, 3, "c"), text, strict=True)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (np.zeros(4, int), r"c must be an array with one row for each of the 3 images; .*\(4,\)"),
    ({"labels": [0, 1, 2]}, r"c\['labels'\]\[0\] must be an array with one row"),
    ({"text": np.zeros((3, 2))}, r"c\['text'\] is float64: cast it with .astype\('float32'\)"),
    (np.array([0, np.nan, 1], np.float32), "c is not finite"),
    (np.array([0, np.inf, 1], ml_dtypes.bfloat16), "c is not finite"),
    (np.array(["cat", "dog", "owl"]), "c must hold numbers or booleans"),
    (np.array([0, 1, 2**40]), "c has integers that do not fit int32"),
    ({}, "c holds no arrays: pass None"),
  ],
)
def test_conditioning_that_no_model_could_take_is_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    checked_conditioning(bad, 3, "c")


def test_a_model_is_asked_with_the_inputs_that_it_will_get():
  task = nets.conditional_task()
  labels = np.arange(5, dtype=np.int32)
  task.check_images((4, 4, 1), labels)
  with pytest.raises(ValueError, match=r"apply_fn\(params, x_t, t\) fails .*labels"):
    task.check_images((4, 4, 1))
  with pytest.raises(ValueError, match=r"apply_fn\(params, x_t, t, conditioning\) fails"):
    nets.conv_task().check_images((4, 4, 1), labels)
  with pytest.raises(ValueError, match=r"fails .* and conditioning .*shape=\(2, 7\)"):
    task.check_images((4, 4, 1), np.zeros((5, 7), np.int32))


def test_the_noise_must_have_the_shape_of_the_image():
  task = jaxinf.Task(lambda params, x_t, t, labels: labels, {}, nets.SCHEDULE)
  with pytest.raises(ValueError, match=r"with the shape of x_t \(2, 4, 4, 1\); it returns"):
    task.check_images((4, 4, 1), np.arange(5, dtype=np.int32))
