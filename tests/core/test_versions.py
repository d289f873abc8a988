"""Versions that do not work together are named in one line."""

import pytest

from jaxinf.core.versions import check_versions


@pytest.mark.parametrize("version", [(0, 8, 0), (0, 9, 1)])
def test_versions_that_work_pass(version):
  check_versions(version)


@pytest.mark.parametrize("version", [(0, 4, 30), (0, 7, 2)])
def test_too_old_a_jax_is_refused_in_one_line(version):
  with pytest.raises(ImportError, match=r"jax 0\.8\.0 to 0\.9\.1") as error:
    check_versions(version)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [(0, 9, 2), (0, 10, 2), (0, 12, 0)])
def test_a_newer_jax_needs_the_main_branch_of_kfac_jax(version, monkeypatch):
  """Which has a product that 0.0.8 has not."""
  import kfac_jax

  monkeypatch.delattr(kfac_jax.LossFunction, "multiply_empirical_fisher", raising=False)
  with pytest.raises(ImportError, match="and an older kfac-jax") as error:
    check_versions(version)
  assert "\n" not in str(error.value)
  monkeypatch.setattr(kfac_jax.LossFunction, "multiply_empirical_fisher", None, raising=False)
  check_versions(version)
