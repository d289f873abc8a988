"""Damping relative to a layer is ρ times the mean of its eigenvalues, and survives its settings."""

import json

import numpy as np
import pytest

from jaxinf import RelativeDamping
from jaxinf.core.damping import damping_named, damping_of, damping_settings, of_layer


def test_of_a_layer_it_is_rho_times_the_mean_of_all_its_eigenvalues():
  eigenvalues = np.array([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 6.0]]], np.float32)
  assert of_layer(RelativeDamping(0.5), eigenvalues) == 0.5 * 2.0
  assert of_layer(0.5, eigenvalues) == 0.5
  # Without curvature H + λI can be inverted as well, in float32.
  dead = np.float32(of_layer(RelativeDamping(0.5), np.zeros((2, 3))))
  assert dead > 0 and np.isfinite(1 / dead)


@pytest.mark.parametrize("damping", [1e-8, RelativeDamping(0.01)])
def test_settings_tell_its_kind_where_it_is_relative(damping):
  settings = json.loads(json.dumps(damping_settings(damping)))
  assert damping_of(settings) == damping
  assert ("damping_kind" in settings) == isinstance(damping, RelativeDamping)


@pytest.mark.parametrize("rho", [0, -1.0, np.nan, np.inf, "0.1", None])
def test_rho_is_a_positive_number(rho):
  with pytest.raises(ValueError, match="rho must be a positive, finite number; got"):
    RelativeDamping(rho)


def test_an_unknown_kind_is_refused_with_those_that_there_are():
  with pytest.raises(ValueError, match="there are: absolute, relative"):
    damping_named("layer", 0.1)
