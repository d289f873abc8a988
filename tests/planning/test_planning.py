"""Plans: bytes by hand and as stages then leave them, operations and seconds by proportion."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxinf import planning
from jaxinf.planning.passes import decomposition_seconds
from jaxinf.planning.subject import Subject
from jaxinf.planning.trials import num_operations, random_params
from jaxinf.runs import run as runs
from jaxinf.runs.config import typed
from jaxinf.runs.perform import perform
from tests import tiny

STAGES = ("train", "sample", "curvature", "attribute", "index")

# The network of tests/tiny.py on 8 × 8 images: [64 pixels + 4 time features → 8] and [8 → 64], each
# with a bias.
MATRICES = ((8, 69), (64, 9))
PARAMS = sum(map(math.prod, MATRICES))
IMAGES, SAMPLES, LAYERS = 24, 3, 2
PLENTY = planning.Limits(None, 2**40, 2**40)


@dataclasses.dataclass(frozen=True)
class FakeWatch(planning.Stopwatch):
  """Every program compiles in 1 s, places its operands in 0 s and takes 2 s a batch."""

  batch: float | None = 2.0

  def program(self, program):
    return planning.Trial(compiling=1.0, placing=0.0, batch=self.batch, workspace=1000)

  def call(self, function, *, repeats=1):
    return planning.Call(first=0.5, again=0.25)

  def disk_rate(self, folder):
    return math.inf


def run_of(workdir, **changes):
  """A tiny run on one device; changes are section__field=value."""
  config = tiny.get_config()
  for path, value in changes.items():
    section, field = path.split("__")
    config[section][field] = value
  return runs.Run(typed(config), workdir, jax.devices()[:1])


def fake_plan(workdir, limits=PLENTY, watch=None, **changes):
  return planning.plan(run_of(workdir, **changes), watch=watch or FakeWatch(), limits=limits)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
  return fake_plan(tmp_path_factory.mktemp("nothing"))


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
  assert train.device["state"] == train.host["state"] == state
  assert train.device["gradients"] == train.disk["parameters"] == 4 * PARAMS
  assert train.disk["checkpoints"] == 2 * state
  assert train.host["images"] == 4 * IMAGES * 64
  assert sample.disk["images"] == 4 * SAMPLES * 64 * (1 + 21)  # with a trajectory of 21 states
  squares = sum(d_out**2 + d_in**2 for d_out, d_in in MATRICES)
  assert curvature.disk["eigenbases"] == 8 * (squares + PARAMS)
  assert index.device["rotations"] == 4 * (squares + PARAMS)
  blocks = sum(math.ceil(math.prod(m) / 64) for m in MATRICES)
  query_row, query_rows = blocks * (64 + 4), SAMPLES * 2  # int8 in blocks of 64 with a step each
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
        left += sum(array.nbytes for name, array in arrays.items() if "ids" not in name)
    assert plan[stage].disk[what] == left


def test_query_blocks_and_partitions_divide_what_is_on_a_device(tmp_path, plan):
  parts = fake_plan(tmp_path, attribute__query_blocks=3, curvature__partitions=2)
  whole, part = (p["attribute"].device["rows of queries"] for p in (plan, parts))
  assert part == whole / 3
  whole, part = (p["curvature"].device["sums"] for p in (plan, parts))
  assert whole / 2 <= part < whole  # the larger of two layers


def test_seconds_are_those_of_the_batches_there_are(plan):
  """2 s a batch: 20 steps; one batch of 3 samples of 20 steps, of which 10 were tried; …"""
  assert plan["train"].seconds["batches"] == 20 * 2
  assert plan["sample"].seconds["batches"] == 2 * 20 / 10
  assert plan["curvature"].seconds["batches"] == 2  # 72 pairs in a batch of 128 at most
  # All 48 rows of 2 draws in one batch, once more to check the compression, and 6 of queries, an
  # eighth of them; and scores of the batch.
  assert plan["attribute"].seconds["batches"] == 2 * (1 + 1 + 1 / 8) + 2
  assert plan["index"].seconds["batches"] == 2 + 2
  for cost in plan.stages:
    assert 0 < cost.total_seconds < math.inf


def test_seconds_and_operations_grow_in_proportion_to_draws_and_images(tmp_path):
  """With full batches throughout, so that nothing is padded; operations by XLA's own count."""
  sizes = dict(curvature__batch_size=12, attribute__batch_size=12, index__batch_size=12)
  less = fake_plan(tmp_path, **sizes)
  draws = dict(curvature__draws=6, attribute__draws=8, index__draws=8)
  more = fake_plan(tmp_path, **sizes, **draws, attribute__draw_groups=4, index__draw_groups=4)
  half = fake_plan(tmp_path, **sizes, data__num_examples=12)
  for stage in ("curvature", "index"):
    for field in ("operations", "amount"):
      assert getattr(more[stage], field) == 2 * getattr(less[stage], field)
      assert getattr(less[stage], field) == 2 * getattr(half[stage], field)
    seconds = [plan[stage].seconds["batches"] for plan in (more, less, half)]
    assert seconds[0] == 2 * seconds[1] == 4 * seconds[2]
  # In attribute the gradients of queries and the check of 32 images stay as they are.
  parts = [(p["attribute"].seconds["batches"], p["attribute"].operations) for p in (less, half)]
  assert all(whole > part > whole / 2 for whole, part in zip(*parts, strict=True))


def test_steps_of_training_and_sampling_cost_the_same_each(tmp_path, plan):
  other = fake_plan(tmp_path, train__steps=60, sample__sampler="ddim", sample__num_steps=10)
  for field in ("operations", "amount"):
    assert getattr(other["train"], field) == 3 * getattr(plan["train"], field)
  assert other["train"].seconds["batches"] == 3 * plan["train"].seconds["batches"]
  assert other["sample"].operations == plan["sample"].operations / 2
  assert other["sample"].seconds["batches"] == plan["sample"].seconds["batches"] / 2


def test_operations_are_those_of_the_products():
  """2 · rows · columns · inner of a matrix product, and None where a loop hides how many."""
  product = lambda a, b: a @ b
  a, b = np.ones((8, 16), np.float32), np.ones((16, 4), np.float32)
  assert num_operations(product, a, b) == 2 * 8 * 16 * 4
  looped = lambda a: jax.lax.scan(lambda c, _: (c * 2.0, None), a, None, length=5)[0]
  assert num_operations(looped, a) is None


def test_large_factors_are_extrapolated_by_the_cube_of_their_size(tmp_path, monkeypatch):
  monkeypatch.setattr("jaxinf.planning.passes._TIMED_ROWS", 32)
  found = decomposition_seconds(Subject(run_of(tmp_path), FakeWatch()))
  factors = [d for matrix in MATRICES for d in matrix]
  assert found == pytest.approx(sum(0.25 * max(1, d / 32) ** 3 for d in factors))


def test_random_parameters_keep_the_size_of_signals():
  """A layer's outputs have the variance of its inputs: their sum of squares is about the width."""
  kernel = random_params({"kernel": np.zeros((400, 300), np.float32)})["kernel"]
  assert np.var(kernel) == pytest.approx(1 / 400, rel=0.02)  # of 120,000 draws, to 1 / √60,000


@pytest.mark.parametrize(
  ("limits", "stage", "larger", "fields"),
  [
    (dict(device=10_000), None, {}, ("train takes", "each device", "a smaller network (model)")),
    (dict(device=100_000), None, {}, ("attribute takes", "lower attribute.batch_size or raise")),
    (dict(device=10**7), "attribute", {"rows of queries": 10**8}, ("attribute.query_blocks",)),
    (dict(device=10**7), "curvature", {"sums": 10**8}, ("raise curvature.partitions",)),
    (dict(device=10**7), "sample", {"workspace": 10**8}, ("lower sample.batch_size",)),
    (dict(host=10**6), None, {}, ("of the host",)),
    (dict(disk=10**5), None, {}, ("run takes", "index.compression='int4' or index.draw_groups=1")),
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


def test_a_program_that_does_not_fit_is_compiled_and_not_run():
  """Its inputs take 8 MB, and more than 1 MB there is not."""

  def not_run(_):
    raise AssertionError

  function = jax.pmap(lambda a, b: jax.pure_callback(not_run, a, a) @ b, devices=jax.devices()[:1])
  ones = np.ones((1000, 1000), np.float32)
  program = planning.Program(function, ones, lambda number: ones[None])
  trial = planning.Stopwatch(jax.devices()[:1], most_bytes=10**6).program(program)
  assert trial.batch is None and trial.compiling > 0


def test_seconds_that_are_not_known_stay_so(plan):
  stage = dataclasses.replace(plan["train"], seconds={"compiling": 1.0, "batches": None})
  assert stage.total_seconds is None and stage.rate is None
  assert "In all an unknown time to go" in dataclasses.replace(plan, stages=(stage,)).table()


def test_finished_stages_are_named_and_stale_ones_too(finished, tmp_path):
  again = fake_plan(finished.workdir)
  assert again.finished == STAGES
  assert "In all 0 s to go" in again.table()
  other = fake_plan(finished.workdir, attribute__damping=1e-3)
  assert other.finished == ("train", "sample", "curvature", "index")
  assert other.table().count("attribute.damping: 0.0001 → 0.001") == 1
  trained_longer = fake_plan(finished.workdir, train__steps=40)
  assert not trained_longer.finished and trained_longer.table().count("steps: 20 → 40") == 1


@pytest.mark.parametrize("method", ["ekfac", "identity", "cg"])
def test_every_method_of_curvature_has_its_passes(tmp_path, method):
  """Two for EK-FAC; none where nothing is summed, and no index of cg."""
  found = fake_plan(tmp_path, curvature__method=method, attribute__auto_draws=True)
  passes = {"ekfac": 2, "identity": 0, "cg": 0}[method]
  assert found["curvature"].seconds["batches"] == 2 * passes
  assert [cost.stage for cost in found.stages][4:] == ["index"] * (method != "cg")
  assert "it may stop after fewer draws" in found.table()


def test_a_real_plan_takes_positive_times_and_leaves_nothing(tmp_path):
  """On two devices, without a trained model, in a workdir that stays empty."""
  run = dataclasses.replace(run_of(tmp_path / "run"), devices=None)
  found = planning.plan(run)
  assert [cost.stage for cost in found.stages] == [
    "train",
    "sample",
    "curvature",
    "attribute",
    "index",
  ]
  for cost in found.stages:
    assert 0 < cost.total_seconds < math.inf and 0 < cost.rate < math.inf
    assert cost.device["workspace"] > 0
  assert not list(tmp_path.iterdir())
