"""A curvature comes back from its folder as it was, and only for its own model and examples."""

import chex
import pytest

from jaxinf import DiffusionModel, Process, load_curvature
from tests import nets
from tests.curvature.test_inputs import COMPUTE, KINDS, NUM, fitted

GRADS = nets.random_params(nets.CONV_SHAPES, seed=3)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
  """(curvature, folder)."""
  curvature = fitted(nets.conv_model(), KINDS[request.param], nets.examples(NUM))
  folder = tmp_path_factory.mktemp("curvature")
  curvature.save(folder)
  return curvature, folder


def loaded(folder, model=None, examples=None):
  model, examples = model or nets.conv_model(), examples or nets.examples(NUM)
  return load_curvature(folder, model, examples, COMPUTE)


def test_what_is_loaded_is_what_was_saved(saved):
  curvature, folder = saved
  found = loaded(folder)
  assert type(found) is type(curvature)
  for field in ("kind", "layers", "coverage", "selection", "settings", "diagnostics"):
    assert getattr(found, field) == getattr(curvature, field), field
  assert found.content() == curvature.content()
  for apply in ("multiply", "precondition"):
    results = (getattr(c, apply)(GRADS, 0.1) for c in (found, curvature))
    chex.assert_trees_all_equal(*results)


def test_another_model_is_refused(saved):
  _, folder = saved
  other = nets.conv_model(seed=1)
  weighted = DiffusionModel(
    nets.conv_net, nets.conv_model().params, Process.epsilon(nets.SCHEDULE, "min_snr")
  )
  for model in (other, weighted):
    with pytest.raises(ValueError, match="other parameters or another process"):
      loaded(folder, model)


def test_the_exact_ggn_takes_its_own_examples_alone(saved):
  curvature, folder = saved
  if curvature.kind.name != "exact":
    assert load_curvature(folder, nets.conv_model()).content() == curvature.content()
    return
  with pytest.raises(ValueError, match="give train"):
    load_curvature(folder, nets.conv_model())
  for examples in (nets.examples(NUM, seed=5), nets.examples(NUM, random_flip=True)):
    with pytest.raises(ValueError, match="over other training examples"):
      loaded(folder, examples=examples)


def test_a_folder_without_a_curvature_is_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no finished result"):
    loaded(tmp_path)


def test_a_damaged_folder_is_refused(saved, tmp_path):
  curvature, _ = saved
  curvature.save(tmp_path)
  arrays = tmp_path / "arrays.npz"
  content = bytearray(arrays.read_bytes())
  content[len(content) // 2] ^= 1
  arrays.write_bytes(bytes(content))
  with pytest.raises(ValueError, match=r"arrays\.npz"):
    loaded(tmp_path)
