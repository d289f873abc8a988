"""A sweep holds scores that differ in damping alone, in the order given."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from jaxinf.core.damping import RelativeDamping
from jaxinf.scores.scores import Scores
from jaxinf.scores.sweep import Sweep


def scores_at(damping, **settings) -> Scores:
  values = np.random.default_rng(0).normal(size=(2, 2, 9)).astype(np.float32)
  return Scores(values, np.arange(2), np.arange(9), {"damping": damping, **settings})


def test_a_sweep_keeps_its_order_and_finds_dampings():
  members = [scores_at(damping, check={"spearman": damping}) for damping in (0.1, 1e-8, 1e-3)]
  sweep = Sweep(members)
  assert list(sweep) == members and len(sweep) == 3 and sweep[1] is members[1]
  np.testing.assert_array_equal(sweep.dampings, [0.1, 1e-8, 1e-3])
  np.testing.assert_array_equal(sweep.ascending().dampings, [1e-8, 1e-3, 0.1])
  assert sweep.at(1e-8) is members[1] and sweep.at(float(np.float32(1e-3))) is members[2]
  with pytest.raises(ValueError, match=re.escape("damping 1.0; the sweep has: 0.1, 1e-08, 0.001")):
    sweep.at(1.0)
  assert Sweep(sweep) == sweep and repr(sweep).startswith("Sweep(λ = 0.1, 1e-08, 0.001; 2 queries")
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(sweep)).dampings, sweep.dampings)


def test_a_sweep_is_of_one_kind_of_damping():
  absolute = Sweep([scores_at(0.1), scores_at(0.2)])
  relative = Sweep([scores_at(x, damping_kind="relative") for x in (0.1, 0.2)])
  assert relative.is_relative and repr(relative).startswith("Sweep(ρ = 0.1, 0.2; ")
  assert repr(relative[1]).endswith("; ρ = 0.2)")
  assert relative.at(RelativeDamping(0.2)) is relative.at(0.2) is relative[1]
  with pytest.raises(ValueError, match=r"no scores at the damping RelativeDamping\(rho=0.2\)"):
    absolute.at(RelativeDamping(0.2))
  with pytest.raises(ValueError, match="other settings"):
    Sweep([absolute[0], relative[1]])


def test_a_method_without_damping_gives_a_sweep_of_one():
  alone = dataclasses.replace(scores_at(0.1), settings={"method": "pixels"})
  assert np.isnan(Sweep([alone]).dampings).tolist() == [True]
  with pytest.raises(ValueError, match='need settings\\["damping"\\]'):
    Sweep([alone, scores_at(0.1)])


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(settings={"damping": 0.1}), "each damping once; got [0.1, 0.1]"),
    (dict(query_ids=np.arange(1, 3)), "at 0.2 have other query ids than those at 0.1"),
    (dict(train_ids=np.arange(9)[::-1]), "other training ids"),
    (dict(replicate_values=np.zeros((3, 2, 9))), "other replicates of draws"),
    (dict(query_replicate_values=np.zeros((3, 2, 9))), "other replicates of draws"),
    (dict(settings={"damping": 0.2, "seed": 1}), "other settings"),
  ],
)
def test_scores_that_are_no_sweep_are_refused(change, message):
  other = dataclasses.replace(scores_at(0.2), **change)
  with pytest.raises(ValueError, match=re.escape(message)):
    Sweep([scores_at(0.1), other])


def test_a_sweep_is_made_of_scores():
  for members in ([], [np.zeros((2, 9))]):
    with pytest.raises(ValueError, match="made of Scores, one or more"):
      Sweep(members)


def test_parts_of_the_queries_are_joined_with_how_well_each_was_solved():
  solved = lambda *residuals: {"residuals": list(residuals), "iterations": [7] * len(residuals)}
  one, other = (
    Sweep(scores_at(damping, solves=solved(*found)) for damping, found in pairs)
    for pairs in (((1e-2, (0.1, 0.2)), (1e-3, (0.3, 0.4))), ((1e-2, (0.5,)), (1e-3, (0.6,))))
  )
  whole = Sweep.of_parts([one, other])
  assert [scores.settings["solves"] for scores in whole] == [
    solved(0.1, 0.2, 0.5),
    solved(0.3, 0.4, 0.6),
  ]
  assert "solves" not in Sweep.of_parts([Sweep([scores_at(1.0)])] * 2)[0].settings
