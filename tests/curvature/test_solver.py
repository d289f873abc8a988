"""Solvers as keys of results know them, and the fits that they need."""

import dataclasses

from jaxinf import ExactGGN, Solver
from jaxinf.curvature.kinds import kind_of, settings_of
from jaxinf.curvature.solver import PRECONDITIONERS
from jaxinf.runs.config import settings
from jaxinf.runs.sections import CurvatureConfig

FIRST = {"tolerance": 1e-4, "max_iterations": 200, "precision": "float32", "sketch_rank": 0}


def test_keys_leave_out_what_came_later():
  """Of results that were kept before there were other methods and preconditioners."""
  assert Solver().settings == settings(Solver()) == FIRST
  solver = Solver(method="stochastic", decay=0.5)
  assert solver.settings == settings(solver) == FIRST | {"method": "stochastic", "decay": 0.5}
  assert settings(CurvatureConfig())["solver"].keys() == FIRST.keys()


def test_a_kind_comes_back_from_its_settings():
  for solver in (Solver(), Solver(preconditioner="kfac-nystrom", sketch_rank=3, step_pairs=8)):
    assert kind_of(settings_of(ExactGGN(solver))) == ExactGGN(solver)
  before = {"name": "exact", "solver": FIRST | {"sketch_rank": 9}}
  assert kind_of(before) == ExactGGN(Solver(sketch_rank=9))


def test_a_fit_makes_the_passes_that_the_preconditioner_needs():
  for name, parts in PRECONDITIONERS.items():
    kind = ExactGGN(Solver(preconditioner=name, sketch_rank=5))
    assert kind.passes == parts.kronecker == ("kfac" in name)
    assert kind.corrects == ("ekfac" in name)
    assert parts.sketched == ("nystrom" in name)


def test_where_none_is_named_a_sketch_comes_before_a_fit():
  parts = lambda **fields: Solver(**fields).parts
  assert parts() == PRECONDITIONERS["ekfac"]
  assert parts(sketch_rank=5) == PRECONDITIONERS["nystrom"]
  assert parts(sketch_rank=5, method="stochastic") == PRECONDITIONERS["ekfac"]
  assert dataclasses.replace(Solver(), preconditioner="none").parts == PRECONDITIONERS["none"]
