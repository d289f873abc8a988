"""Plans: bytes by hand and as stages then leave them, operations and seconds by proportion.

By a clock that goes on by a second whenever it is looked at, a batch takes one: what is left are
the numbers of batches.
"""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest

from jaxinf import planning
from jaxinf.planning.cost import StageCost
from jaxinf.planning.line import attribute_cost, curvature_cost, index_cost, train_cost
from jaxinf.planning.proof import proof_costs
from jaxinf.planning.reduced import Subject, random_params
from jaxinf.planning.stages import finished_stages
from jaxinf.runs.output import as_json
from jaxinf.runs.perform import perform
from tests import running

STAGES = ("train", "sample", "curvature", "attribute", "index")

# The network of tests/tiny.py on 8 × 8 images: [64 pixels + 4 time features → 8] and [8 → 64], each
# with a bias.
MATRICES = ((8, 69), (64, 9))
PARAMS = sum(map(math.prod, MATRICES))
IMAGES, SAMPLES, LAYERS = 24, 3, 2
_PRODUCTS = r"at most (\d+) products with the exact curvature over (\d+) pairs (\S+) FLOPs"
PLENTY = planning.Limits(None, 2**40, 2**40)


def run_of(workdir, **changes):
  """A tiny run on one device; changes are section__field=value."""
  fields = {path.replace("__", "."): value for path, value in changes.items()}
  return running.run_of(workdir, fields)


def subject_of(workdir, **changes):
  """A tiny run to be planned by the ticking clock."""
  return Subject(run_of(workdir / "run", **changes), workdir, itertools.count().__next__)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
  """Of the main line, on two devices; by the real clock. What it leaves behind is looked at."""
  run = dataclasses.replace(run_of(tmp_path_factory.mktemp("nothing") / "run"), devices=None)
  found = planning.plan(run, limits=PLENTY)
  assert not list(run.workdir.parent.iterdir())
  return found


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
  """The stages of the proof by the ticking clock."""
  return {cost.stage: cost for cost in proof_costs(subject_of(tmp_path_factory.mktemp("proof")))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run whose stages are finished up to the index."""
  run = run_of(tmp_path_factory.mktemp("run") / "work")
  for stage in STAGES:
    perform(run, stage)
  return run


def test_bytes_follow_from_shapes(plan):
  """Numbers of the network counted by hand; float32 but for eigenbases."""
  train, sample, curvature, attribute, index = plan.stages
  state = 4 * (4 * PARAMS) + 3 * 4  # parameters, EMA, two moments; and three counts of steps
  assert train.device["parameters"] + train.device["state"] == train.host["state"] == state
  assert train.device["gradients"] == train.disk["parameters"] == 4 * PARAMS
  assert train.disk["checkpoints"] == 2 * state
  assert train.host["images"] == 4 * IMAGES * 64
  assert sample.disk["images"] == 4 * SAMPLES * 64 * (1 + 21)  # with a trajectory of 21 states
  squares = sum(d_out**2 + d_in**2 for d_out, d_in in MATRICES)
  assert curvature.disk["eigenbases"] == 8 * (squares + PARAMS)
  assert index.device["rotations"] == 4 * (squares + PARAMS)
  blocks = sum(math.ceil(math.prod(m) / 64) for m in MATRICES)
  query_row = blocks * (2 * 64 + 4)  # int16 in blocks of 64 with a step each
  query_rows = SAMPLES * 2
  assert attribute.device["rows of queries"] == query_rows * query_row
  assert attribute.host["rows of queries"] == query_rows * query_row
  of_groups, of_queries = 2 * SAMPLES * IMAGES, 2 * SAMPLES * IMAGES
  assert attribute.disk["scores"] == 4 * (of_groups + of_queries)
  assert attribute.disk["partial scores"] == 4 * IMAGES * 2 * query_rows


def test_bytes_on_the_disk_are_those_that_the_stages_then_leave(finished, plan):
  """Chunks of a store exactly, beside its index and zarr.json; arrays beside ids and headers."""
  chunks = finished.folder("index").rglob("c/*/*")
  assert plan["index"].disk["rows"] == sum(path.stat().st_size for path in chunks)
  for stage, what in (("sample", "images"), ("curvature", "eigenbases"), ("attribute", "scores")):
    left = 0  # of the stage's arrays; trajectories lie apart
    for path in (finished.folder(stage)).glob("**/arrays.npz"):
      with np.load(path) as arrays:
        left += sum(
          array.nbytes
          for name, array in arrays.items()
          if not name.startswith(("query_ids", "train_", "ids"))
        )
    assert plan[stage].disk[what] == left


def test_every_stage_is_priced_and_nothing_left_behind(plan):
  """Without a trained model, in a workdir that there is not: see the fixture."""
  assert [cost.stage for cost in plan.stages] == list(STAGES)
  for cost in plan.stages:
    assert 0 < cost.total_seconds < math.inf and 0 < cost.rate < math.inf
    assert cost.device["workspace"] > 0


def test_query_chunks_and_partitions_divide_what_is_on_a_device(tmp_path, plan):
  """And rounds of draws are counted to the last."""
  changes = dict(attribute__auto_draws=True, attribute__draws=8)
  subject = subject_of(tmp_path, attribute__query_chunk=1, curvature__partitions=2, **changes)
  curvature, curved = curvature_cost(subject)
  attribute = attribute_cost(subject, curved)
  assert attribute.device["rows of queries"] == plan["attribute"].device["rows of queries"] / 3
  whole, part = (cost.device["sums"] for cost in (plan["curvature"], curvature))
  assert whole / 2 <= part < whole  # the larger of two layers
  assert attribute.amount == IMAGES * 8 + SAMPLES * 4
  assert "it may stop after fewer draws" in attribute.notes[0]


def test_seconds_and_operations_grow_in_proportion_to_draws_and_examples(tmp_path):
  """With full batches throughout, so that nothing is padded; operations by XLA's own count."""
  batches = dict(curvature__batch_size=3, attribute__batch_size=4, index__batch_size=4)
  draws = dict(curvature__draws=6, attribute__draws=8, index__draws=8)
  more = draws | dict(attribute__replicates=4, index__replicates=4)

  def costs(name, **changes):
    subject = subject_of(tmp_path / name, **batches, **changes)
    subject.folder.mkdir()
    curvature, curved = curvature_cost(subject)
    return curvature, attribute_cost(subject, curved), index_cost(subject, curved)

  few = costs("few", data__num_examples=48)
  many = costs("many", data__num_examples=96, **more)
  for one, four in ((few[0], many[0]), (few[2], many[2])):
    for field in ("operations", "amount"):
      assert getattr(four, field) == 4 * getattr(one, field)
    assert four.seconds["batches"] == 4 * one.seconds["batches"]
  assert few[0].seconds["batches"] == 48  # 144 pairs by threes
  # In attribute the check of 32 examples stays as it is, but for its draws.
  assert few[1].seconds["batches"] < many[1].seconds["batches"] < 4 * few[1].seconds["batches"]


def test_steps_of_training_cost_the_same_each(tmp_path, plan):
  """The clock is looked at after every second step."""
  many = train_cost(subject_of(tmp_path, train__steps=180))
  assert many.seconds["batches"] == 180 / 2 and many.amount == 180
  # On two devices each has half of the examples and all of the update.
  alone = many.operations / 9
  assert alone < plan["train"].operations < 2 * alone


def test_groups_of_models_are_trained_one_after_another(proof):
  """Two models of all images in 20 steps each, and two groups of four on subsets in 10."""
  assert proof["retrain"].amount == 2 + 2 * 4
  assert proof["retrain"].seconds["batches"] == (2 * 20 + 2 * 10) / 2
  assert proof["retrain"].disk["parameters"] == 10 * 4 * PARAMS
  state = 4 * (4 * PARAMS) + 3 * 4
  assert proof["retrain"].device["state"] == 4 * state


def test_every_stage_of_the_proof_is_priced(proof):
  assert list(proof) == ["retrain", "measure", "evaluate"]
  for cost in proof.values():
    assert 0 < cost.total_seconds < math.inf and cost.operations > 0
    assert cost.device["workspace"] > 0
  # Models in groups of four, where the rehearsal had one alone and one group.
  assert proof["measure"].amount == 10
  assert proof["evaluate"].disk["scores"] == 4 * 3 * 4 * SAMPLES * IMAGES
  assert "not counted" in proof["evaluate"].notes[0]


def test_random_parameters_keep_the_size_of_signals():
  """A layer's outputs have the variance of its inputs: their sum of squares is about the width."""
  kernel = random_params({"kernel": np.zeros((400, 300), np.float32)})["kernel"]
  assert np.var(kernel) == pytest.approx(1 / 400, rel=0.02)  # of 120,000 draws, to 1 / √60,000


@pytest.mark.parametrize(
  ("limits", "stage", "larger", "fields"),
  [
    (dict(device=10**7), "train", {"state": 10**8}, ("each device", "a smaller network (model)")),
    (
      dict(device=10**7),
      "attribute",
      {"gradients": 10**8},
      ("lower attribute.batch_size or raise",),
    ),
    (dict(device=10**7), "attribute", {"rows of queries": 10**8}, ("lower attribute.query_chunk",)),
    (dict(device=10**7), "curvature", {"sums": 10**8}, ("raise curvature.partitions",)),
    (dict(device=10**7), "sample", {"workspace": 10**8}, ("lower sample.batch_size",)),
    (dict(host=10**6), None, {}, ("of the host",)),
    (dict(disk=10**5), None, {}, ("run takes", "index.compression='int4' or index.replicates=1")),
  ],
)
def test_what_does_not_fit_is_said_with_the_field_to_change(plan, limits, stage, larger, fields):
  costs = [
    dataclasses.replace(cost, device={**cost.device, **larger}) if cost.stage == stage else cost
    for cost in plan.stages
  ]
  limits = dataclasses.replace(PLENTY, **limits)
  text = dataclasses.replace(plan, stages=tuple(costs), limits=limits).table()
  warnings = "\n".join(line for line in text.splitlines() if line.startswith("WARNING"))
  for field in fields:
    assert field in warnings


def test_nothing_is_said_where_all_fits(plan):
  assert plan.warnings == () and "WARNING" not in plan.table()


def test_a_plan_for_programs_holds_the_numbers_of_the_table(plan):
  found = json.loads(as_json(plan.as_dict()))
  assert [stage["stage"] for stage in found["stages"]] == list(STAGES)
  for stage, cost in zip(found["stages"], plan.stages, strict=True):
    assert stage["device"] == cost.device and stage["total_seconds"] == cost.total_seconds
  assert found["limits"] == {"device": None, "host": 2**40, "disk": 2**40}
  assert found["finished"] == found["warnings"] == []


def test_seconds_that_are_not_known_stay_so(plan):
  stage = dataclasses.replace(plan["train"], seconds={"compiling": 1.0, "batches": None})
  assert stage.total_seconds is None and stage.rate is None
  assert "In all an unknown time to go" in dataclasses.replace(plan, stages=(stage,)).table()


def test_finished_stages_are_named_and_stale_ones_too(finished, plan):
  assert finished_stages(finished, STAGES) == (STAGES, ())
  assert "In all 0 s to go" in dataclasses.replace(plan, finished=STAGES).table()
  again = lambda **changes: finished_stages(run_of(finished.workdir, **changes), STAGES)
  names, notes = again(attribute__damping=1e-3)
  assert names == ("train", "sample", "curvature", "index")
  assert "".join(notes).count("attribute.damping: 0.0001 → 0.001") == 1
  names, notes = again(train__steps=40)
  assert not names and "".join(notes).count("steps: 20 → 40") == 1


@pytest.mark.parametrize(("method", "passes"), [("ekfac", 2), ("identity", 0), ("exact", 0)])
def test_every_kind_of_curvature_has_its_passes(tmp_path, method, passes):
  """Two for EK-FAC; none where nothing is summed. Solves take an unknown time."""
  subject = subject_of(tmp_path, curvature__kind=method, curvature__batch_size=6)
  cost, curved = curvature_cost(subject)
  assert cost.seconds["batches"] == passes * 72 / 6
  if method == "exact":
    solved = attribute_cost(subject, curved)
    assert solved.total_seconds is None and "not known beforehand" in solved.notes[-1]
    # 500 iterations and a check at the one damping for two replicates, over 24 × 3 pairs.
    said = solved.notes[-1].replace(",", "")
    products, pairs, flops = map(float, re.search(_PRODUCTS, said).groups())
    assert (products, pairs) == (501 * 2, 72)
    # Two FLOPs for a product and a sum. Forward mode takes each matrix with two vectors, reverse
    # mode too, but for the inputs of the first; the network itself is an eighth.
    assert 4 * PARAMS < flops / (products * pairs) < 10 * PARAMS


def test_unknown_lines_and_impossible_settings_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"Unknown line to plan 'al'; there are: all, benchmark"):
    planning.plan(run_of(tmp_path), "al")
  with pytest.raises(ValueError, match=r"num_steps must lie in 1…20; got 30"):
    planning.plan(run_of(tmp_path, sample__num_steps=30), limits=PLENTY)
  assert not list(tmp_path.iterdir())


def test_several_models_take_their_number_of_times_but_one_compilation():
  seconds = {"compiling": 3.0, "batches": 2.0, "besides": None}
  one = StageCost("train", 20, "steps", 5.0, seconds, {"state": 7}, {"state": 8}, {"kept": 9})
  assert one.times(1) is one
  four = one.times(4)
  assert (four.amount, four.operations, four.disk) == (80, 20.0, {"kept": 36})
  assert four.seconds == {"compiling": 3.0, "batches": 8.0, "besides": None}
  assert (four.device, four.host) == (one.device, one.host) and "4 models" in four.notes[0]
  unknown = dataclasses.replace(one, operations=None).times(2)
  assert unknown.operations is None
