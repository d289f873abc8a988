"""Rows of queries in one of several processes, which has a share of them."""

import types

import numpy as np

from jaxinf.attribution.queries import query_rows
from jaxinf.compression.compression import Uncompressed
from jaxinf.engine import processes


def test_a_process_checks_only_rows_of_its_own(monkeypatch):
  """The second of two, with rows 3 – 5 of three queries in two replicates: one query is whole."""
  monkeypatch.setattr(processes, "share", lambda num: (num // 2, num))
  monkeypatch.setattr(processes, "gathered", lambda array, num: np.concatenate([array, array]))
  curvature = types.SimpleNamespace(
    has_eigenbasis=True,
    layers=[types.SimpleNamespace(name="layer")],
    precondition_rows=lambda grads, damping: grads.items(),
    eigenvalues=lambda name: np.ones((2, 2), np.float32),
  )
  own = {"layer": np.arange(12, dtype=np.float32).reshape(3, 2, 2)}
  found = query_rows(
    curvature, iter([own]), num_rows=6, dampings=(1.0,), compression=Uncompressed(), groups=2
  )
  np.testing.assert_array_equal(found.exact["layer"], own["layer"][:2])
  assert len(found.checked) == 2
